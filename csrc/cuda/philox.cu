// Random probes of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011), one counter a thread. The reference in
// sharpcore/backends/reference/philox.py says which number is made of what. This source makes the same bits: it is
// compiled so that no product fuses with a sum.
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cuda/lanes.h"
#include "cuda/philox.h"

namespace sharpcore::cuda {
namespace {

using Index = std::int64_t;
using Word = std::uint32_t;
using Bits = std::uint64_t;

// Counters of 128 signs that a block makes, and normal numbers that it makes: a power of two, so that the sum of their
// squares is a part of the sum of neighbours over the whole row.
constexpr int kSignCounters = 32;
constexpr Index kSigns = 128 * kSignCounters, kNormals = 2 * kThreads;

struct Job {
    PhiloxArguments arguments;
    Index pieces;     // blocks of a row
    double* sums;     // [rows, 2, pieces]: sums of squares of each piece, and room to add them up
    bool only_total;  // whether the sums are wanted, not the numbers
};

struct Words {
    Word word[4];
};

template <class To, class From>
__device__ inline To reinterpret(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

__device__ inline Words philox(const PhiloxArguments& a, Index row, Index counter) {
    const auto sample = static_cast<Bits>(a.sample_ids[row % a.samples]);
    Word c0 = static_cast<Word>(a.kind) << 30 | static_cast<Word>(counter);
    Word c1 = static_cast<Word>(a.first + row / a.samples);
    Word c2 = static_cast<Word>(sample), c3 = static_cast<Word>(sample >> 32);
    Word k0 = static_cast<Word>(a.seed), k1 = static_cast<Word>(a.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const Bits product0 = static_cast<Bits>(c0) * 0xD2511F53u, product1 = static_cast<Bits>(c2) * 0xCD9E8D57u;
        c0 = static_cast<Word>(product1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<Word>(product0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<Word>(product1);
        c3 = static_cast<Word>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// log(u) for 0 < u < 1.
__device__ inline double logarithm(double u) {
    constexpr Bits root_half = 0x3fe6a09e667f3bcdu, one = 0x3ff0000000000000u;  // of sqrt(1/2) and 1
    constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
    const Bits bits = reinterpret<Bits>(u);
    // The exponent of u / sqrt(1/2), raised by that of 1 so that it is positive.
    const Bits exponent = (bits + (one - root_half)) >> 52;
    const double e = static_cast<double>(static_cast<int>(exponent) - 1023);
    const double f = reinterpret<double>(bits - (exponent << 52) + one) - 1.0;
    const double s = f / (2.0 + f), z = s * s;
    double sum = z * 0.14810362639819422 + 0.15313179277392916;
    sum = sum * z + 0.18183570998444593;
    sum = sum * z + 0.2222219910037862;
    sum = sum * z + 0.2857142872920423;
    sum = sum * z + 0.39999999999520114;
    sum = sum * z + 0.666666666666671;
    const double remainder = z * sum, half = 0.5 * f * f;
    return e * ln2_high - ((half - (s * (half + remainder) + e * ln2_low)) - f);
}

__device__ inline double sine(double t, double z) {
    double sum = z * 5.633936132273839e-08 + -3.5986459595301474e-06;
    sum = sum * z + 0.00016044115236531464;
    sum = sum * z + -0.004681754132695618;
    sum = sum * z + 0.07969262624607465;
    sum = sum * z + -0.6459640975062453;
    return t * (1.5707963267948966 + z * sum);
}

__device__ inline double cosine(double z) {
    double sum = z * -6.321258921032388e-09 + 4.7106122863704585e-07;
    sum = sum * z + -2.520203696171001e-05;
    sum = sum * z + 0.0009192602742368791;
    sum = sum * z + -0.02086348076331817;
    sum = sum * z + 0.25366950790104714;
    sum = sum * z + -1.2337005501361697;
    return 1.0 + z * sum;
}

struct Pair {
    double first, second;
};

__device__ inline Pair box_muller(const Words& words) {
    // (2 k + 1) / 2^53 of 52 bits k, exactly.
    const Bits low = (static_cast<Bits>(words.word[1]) << 32 | words.word[0]) >> 12;
    const Bits high = (static_cast<Bits>(words.word[3] & 0x3fffffffu) << 32 | words.word[2]) >> 10;
    const double u = static_cast<double>(static_cast<Index>(2 * low + 1)) * 0x1p-53;
    const double t = static_cast<double>(static_cast<Index>(2 * high + 1)) * 0x1p-53 - 0.5;
    double radius = sqrt(-2.0 * logarithm(u));
    if (words.word[3] >> 31 != 0) radius = -radius;
    const double z = t * t, c = radius * cosine(z), s = radius * sine(t, z);
    return (words.word[3] >> 30 & 1u) != 0 ? Pair{s, c} : Pair{c, s};
}

__device__ inline void write(const PhiloxArguments& a, Index place, double value) {
    if (a.dtype == Dtype::float64) {
        static_cast<double*>(a.out)[place] = value;
    } else if (a.dtype == Dtype::float32) {
        static_cast<float*>(a.out)[place] = static_cast<float>(value);
    } else {
        const Word bits = reinterpret<Word>(static_cast<float>(value));
        static_cast<std::uint16_t*>(a.out)[place] =
            static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

__global__ void __launch_bounds__(kThreads) signs_kernel(Job job) {
    __shared__ Word words[kSignCounters][4];
    const PhiloxArguments& a = job.arguments;
    const Index row = blockIdx.x / job.pieces, begin = blockIdx.x % job.pieces * kSigns;
    for (int counter = threadIdx.x; counter < kSignCounters; counter += kThreads) {
        const Words made = philox(a, row, begin / 128 + counter);
        for (int j = 0; j < 4; ++j) words[counter][j] = made.word[j];
    }
    __syncthreads();
    const Index size = a.dimension - begin < kSigns ? a.dimension - begin : kSigns;
    for (Index i = threadIdx.x; i < size; i += kThreads) {
        const bool negative = (words[i / 128][i % 128 / 32] >> (i % 32) & 1u) != 0;
        write(a, row * a.dimension + begin + i, negative ? -1.0 : 1.0);
    }
}

// Normal numbers, on the sphere times the factor that makes their norm the root of the dimension; or the sums of their
// squares.
__global__ void __launch_bounds__(kThreads) normals_kernel(Job job) {
    __shared__ double of_warps[kWarps];
    const PhiloxArguments& a = job.arguments;
    const Index row = blockIdx.x / job.pieces, piece = blockIdx.x % job.pieces;
    const Index place = piece * kNormals + 2 * threadIdx.x;
    double* const sums = job.sums + 2 * row * job.pieces;
    Pair pair{0, 0};
    if (place < a.dimension) pair = box_muller(philox(a, row, place / 2));
    if (place + 1 >= a.dimension) pair.second = 0;
    if (job.only_total) {
        // Neighbours, then neighbouring sums, and so on.
        double sum = pair.first * pair.first + pair.second * pair.second;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane() == 0) of_warps[warp()] = sum;
        for (int step = 1; step < kWarps; step *= 2) {
            __syncthreads();
            if (lane() == 0 && warp() % (2 * step) == 0) of_warps[warp()] += of_warps[warp() + step];
        }
        if (threadIdx.x == 0) sums[piece] = of_warps[0];
        return;
    }
    if (a.kind == ProbeKind::sphere) {
        const double scale = sqrt(static_cast<double>(a.dimension) / sums[0]);
        pair = {pair.first * scale, pair.second * scale};
    }
    if (place < a.dimension) write(a, row * a.dimension + place, pair.first);
    if (place + 1 < a.dimension) write(a, row * a.dimension + place + 1, pair.second);
}

// Adds up the pieces of a row; the total is the first of its sums.
__global__ void __launch_bounds__(kThreads) total_kernel(Job job) {
    const Index row = blockIdx.x;
    double* from = job.sums + 2 * row * job.pieces;
    double* to = from + job.pieces;
    Index count = job.pieces;
    for (; count > 1; count = (count + 1) / 2) {
        for (Index i = threadIdx.x; i < (count + 1) / 2; i += kThreads)
            to[i] = from[2 * i] + (2 * i + 1 < count ? from[2 * i + 1] : 0);
        __syncthreads();
        double* const swapped = from;
        from = to;
        to = swapped;
    }
    if (threadIdx.x == 0) job.sums[2 * row * job.pieces] = from[0];
}

Index pieces(const PhiloxArguments& a) {
    const Index size = a.kind == ProbeKind::rademacher ? kSigns : kNormals;
    return (a.dimension + size - 1) / size;
}

}  // namespace

Index philox_workspace(const PhiloxArguments& a) {
    return a.kind == ProbeKind::sphere ? 2 * a.count * a.samples * pieces(a) : 0;
}

void philox_probes(const PhiloxArguments& a, double* workspace, void* stream) {
    const auto on = static_cast<Stream>(stream);
    const Index rows = a.count * a.samples;
    Job job{a, pieces(a), workspace, false};
    const Index blocks = rows * job.pieces;
    if (blocks > 0x7fffffff) throw std::invalid_argument("philox_probes: too many numbers for one launch");
    const dim3 grid(static_cast<unsigned>(blocks));
    if (a.kind == ProbeKind::rademacher) {
        launch(signs_kernel, grid, 0, on, job);
        return;
    }
    if (a.kind == ProbeKind::sphere) {
        job.only_total = true;
        launch(normals_kernel, grid, 0, on, job);
        launch(total_kernel, dim3(static_cast<unsigned>(rows)), 0, on, job);
        job.only_total = false;
    }
    launch(normals_kernel, grid, 0, on, job);
}

}  // namespace sharpcore::cuda
