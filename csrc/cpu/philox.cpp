// Random probes of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011), a vector of counters at a time. The reference
// in sharpcore/backends/reference/philox.py says which number is made of what. This source makes the same bits: it is
// compiled so that no product fuses with a sum, and every operation has its place there.
#include "sharpcore/philox.h"

#include <cstring>
#include <type_traits>
#include <utility>

#include "sharpcore/for_vectors.h"
#include "sharpcore/parallel.h"
#include "sharpcore/transpose.h"

#if SHARPCORE_X86
#include <immintrin.h>
#endif

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Real = Vec<double>;
using Bits = VectorOf<double>::Bits;

constexpr Index kBlocks = kLanes<double>;  // blocks of 128 bits that are made at once
constexpr std::uint64_t kWord = 0xffffffffu;
constexpr std::uint64_t kOne = 0x3ff0000000000000u;       // the bits of 1.0
constexpr std::uint64_t kMantissa = 0x000fffffffffffffu;  // those of a fraction
constexpr std::uint64_t kSign = 0x8000000000000000u;

template <class To, class From>
inline To reinterpret(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

#if defined(__AVX512F__)
constexpr __mmask8 kAll = 0xff;  // GCC 12 warns of the undefined lanes that the unmasked intrinsics start from
#endif

// Products of 32-bit words; what lies above them in `words` does not matter.
inline Bits multiply(Bits words, std::uint32_t factor) {
#if defined(__AVX512F__)
    return reinterpret<Bits>(_mm512_maskz_mul_epu32(kAll, reinterpret<__m512i>(words), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
    return reinterpret<Bits>(_mm256_mul_epu32(reinterpret<__m256i>(words), _mm256_set1_epi64x(factor)));
#elif SHARPCORE_X86
    return reinterpret<Bits>(_mm_mul_epu32(reinterpret<__m128i>(words), _mm_set1_epi64x(factor)));
#else
    return (words & kWord) * static_cast<std::uint64_t>(factor);
#endif
}

inline Real root(Real x) {
#if defined(__AVX512F__)
    return reinterpret<Real>(_mm512_maskz_sqrt_pd(kAll, reinterpret<__m512d>(x)));
#elif defined(__AVX2__)
    return reinterpret<Real>(_mm256_sqrt_pd(reinterpret<__m256d>(x)));
#elif SHARPCORE_X86
    return reinterpret<Real>(_mm_sqrt_pd(reinterpret<__m128d>(x)));
#else
    for (Index i = 0; i < kBlocks; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}

// The part of key and counter that a probe of a sample has to itself.
struct Stream {
    std::uint32_t key[2];
    std::uint64_t kind, probe, sample_low, sample_high;
};

struct Block {
    Bits low, high;  // the words 0 and 1, and 2 and 3, the first of each pair below the second
};

// The blocks `block`, `block` + 1, ...
inline Block philox(const Stream& stream, Index block) {
    Bits c0 = Bits{} + (stream.kind << 30 | static_cast<std::uint64_t>(block));
    for (Index i = 0; i < kBlocks; ++i) c0[i] += static_cast<std::uint64_t>(i);
    Bits c1 = Bits{} + stream.probe, c2 = Bits{} + stream.sample_low, c3 = Bits{} + stream.sample_high;
    std::uint32_t k0 = stream.key[0], k1 = stream.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Bits product0 = multiply(c0, 0xD2511F53u), product1 = multiply(c2, 0xCD9E8D57u);
        c0 = (product1 >> 32) ^ c1 ^ static_cast<std::uint64_t>(k0);
        c2 = (product0 >> 32) ^ c3 ^ static_cast<std::uint64_t>(k1);
        c1 = product1;
        c3 = product0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {(c0 & kWord) | (c1 << 32), (c2 & kWord) | (c3 << 32)};
}

template <int count>
inline Real polynomial(const double (&coefficients)[count], Real z) {
    Real sum = z * coefficients[count - 1] + coefficients[count - 2];
#pragma GCC unroll 8
    for (int i = count - 3; i >= 0; --i) sum = sum * z + coefficients[i];
    return sum;
}

constexpr double kLog[] = {0.666666666666671,   0.39999999999520114, 0.2857142872920423, 0.2222219910037862,
                           0.18183570998444593, 0.15313179277392916, 0.14810362639819422};
constexpr double kSin[] = {-0.6459640975062453,    0.07969262624607465,     -0.004681754132695618,
                           0.00016044115236531464, -3.5986459595301474e-06, 5.633936132273839e-08};
constexpr double kCos[] = {-1.2337005501361697,    0.25366950790104714,    -0.02086348076331817,  0.0009192602742368791,
                           -2.520203696171001e-05, 4.7106122863704585e-07, -6.321258921032388e-09};

// log(u) for 0 < u < 1.
inline Real logarithm(Real u) {
    constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcdu;  // the bits of sqrt(1/2)
    constexpr double shift = 0x1p52;
    const Bits bits = reinterpret<Bits>(u);
    // The exponent of u / sqrt(1/2), raised by that of 1 so that it is positive, becomes the low bits of a number.
    const Bits exponent = (bits + (kOne - root_half)) >> 52;
    const Real e = reinterpret<Real>(exponent | reinterpret<std::uint64_t>(shift)) - (shift + 1023.0);
    const Real f = reinterpret<Real>(bits - (exponent << 52) + kOne) - 1.0;
    const Real s = f / (2.0 + f);
    const Real z = s * s;
    const Real remainder = z * polynomial(kLog, z);
    const Real half = 0.5 * f * f;
    return e * ExpConstants<double>::ln2_high -
           ((half - (s * (half + remainder) + e * ExpConstants<double>::ln2_low)) - f);
}

struct Pair {
    Real first, second;
};

inline Pair box_muller(Block block) {
    // Fractions of 52 bits: 1 + k / 2^52 first, then (2 k + 1) / 2^53, less 1/2 for t.
    const Real u = reinterpret<Real>((block.low >> 12) | kOne) - (1.0 - 0x1p-53);
    const Real t = (reinterpret<Real>(((block.high >> 10) & kMantissa) | kOne) - 1.5) + 0x1p-53;
    const Real radius = reinterpret<Real>(reinterpret<Bits>(root(-2.0 * logarithm(u))) | (block.high & kSign));
    const Real z = t * t;
    const Bits sine = reinterpret<Bits>(t * (1.5707963267948966 + z * polynomial(kSin, z)));
    const Bits cosine = reinterpret<Bits>(1.0 + z * polynomial(kCos, z));
    const Bits swapped = Bits{} - ((block.high >> 62) & 1u), other = (sine ^ cosine) & swapped;
    return {radius * reinterpret<Real>(cosine ^ other), radius * reinterpret<Real>(sine ^ other)};
}

// Elements of a row that are one task. The normal ones are a power of two, so that the sum of their squares is a part
// of the sum of neighbours over the whole row.
constexpr Index kSignsOfTask = 1 << 14, kNormalsOfTask = 1 << 11;

struct Work {
    const PhiloxArguments& arguments;
    Index pieces;            // tasks of a row
    const Scratch* scratch;  // a row of normal numbers and the sums of its pieces, for each slot; or nullptr
};

Index pieces(Index dimension, Index size) { return (dimension + size - 1) / size; }

Index smaller(Index a, Index b) { return a < b ? a : b; }

Stream stream(const PhiloxArguments& a, Index row) {
    const auto sample = static_cast<std::uint64_t>(a.sample_ids[row % a.samples]);
    return {{static_cast<std::uint32_t>(a.seed), static_cast<std::uint32_t>(a.seed >> 32)},
            static_cast<std::uint64_t>(a.kind),
            static_cast<std::uint64_t>(a.first + row / a.samples),
            sample & kWord,
            sample >> 32};
}

// A vector of 1, and -1 where a bit is set, of the lowest bits.
template <class T>
inline Vec<T> signs(std::uint64_t bits) {
    using Lanes = typename VectorOf<T>::Bits;
    using Lane = std::remove_reference_t<decltype(std::declval<Lanes&>()[0])>;
    Lanes lane{};
    for (Index i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<Lane>(i);
    const Lanes shifted = (Lanes{} + static_cast<Lane>(bits)) >> lane;
    return reinterpret<Vec<T>>((shifted << (8 * sizeof(T) - 1)) | reinterpret<Lanes>(broadcast(T(1))));
}

template <class Storage>
void rademacher_task(const void* job, Index task, int) noexcept {
    using T = Compute<Storage>;
    const Work& work = *static_cast<const Work*>(job);
    const PhiloxArguments& a = work.arguments;
    const Index row = task / work.pieces, begin = task % work.pieces * kSignsOfTask;
    const Index end = smaller(begin + kSignsOfTask, a.dimension);
    Storage* const out = static_cast<Storage*>(a.out) + row * a.dimension;
    const Stream source = stream(a, row);
    for (Index start = begin; start < end; start += 128 * kBlocks) {
        const Block block = philox(source, start / 128);
        std::uint64_t words[2][kBlocks];
        std::memcpy(words[0], &block.low, sizeof(block.low));
        std::memcpy(words[1], &block.high, sizeof(block.high));
        for (Index i = start; i < smaller(end, start + 128 * kBlocks); i += kLanes<T>) {
            const Index bit = i - start;
            const Vec<T> values = signs<T>(words[bit / 64 % 2][bit / 128] >> (bit % 64));
            if (end - i < kLanes<T>)
                store_partial(out + i, values, end - i);
            else
                store(out + i, values);
        }
    }
}

// Normal numbers `begin` and following, `size` of them, and a few more up to a whole number of vectors.
void normals(const Stream& source, Index begin, Index size, double* values) {
    for (Index i = 0; i < size; i += 2 * kBlocks) {
        const auto [first, second] = box_muller(philox(source, (begin + i) / 2));
        store(values + i, interleave<false, double>(first, second));
        store(values + i + kBlocks, interleave<true, double>(first, second));
    }
}

inline void round_to(double& out, double value) { out = value; }

inline void round_to(float& out, double value) { out = static_cast<float>(value); }

inline void round_to(bfloat16& out, double value) {
    const auto bits = reinterpret<std::uint32_t>(static_cast<float>(value));
    out.bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class Storage>
void normal_task(const void* job, Index task, int) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const PhiloxArguments& a = work.arguments;
    const Index row = task / work.pieces, begin = task % work.pieces * kNormalsOfTask;
    const Index size = smaller(kNormalsOfTask, a.dimension - begin);
    double values[kNormalsOfTask];
    normals(stream(a, row), begin, size, values);
    Storage* const out = static_cast<Storage*>(a.out) + row * a.dimension + begin;
    for (Index i = 0; i < size; ++i) round_to(out[i], values[i]);
}

// The sum of neighbours; `values` is overwritten and has room for one more.
double sum_of_neighbours(double* values, Index size) {
    for (; size > 1; size /= 2) {
        if (size % 2) values[size++] = 0;
        for (Index i = 0; i < size / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    }
    return values[0];
}

template <class Storage>
void sphere_task(const void* job, Index row, int slot) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const PhiloxArguments& a = work.arguments;
    double* const sums = static_cast<double*>(work.scratch->slot(slot));
    double* const values = sums + work.pieces + 1;
    double squares[kNormalsOfTask];
    const Stream source = stream(a, row);
    for (Index piece = 0; piece < work.pieces; ++piece) {
        const Index begin = piece * kNormalsOfTask, size = smaller(kNormalsOfTask, a.dimension - begin);
        normals(source, begin, size, values + begin);
        for (Index i = 0; i < size; ++i) squares[i] = values[begin + i] * values[begin + i];
        sums[piece] = sum_of_neighbours(squares, size);
    }
    const double scale = __builtin_sqrt(static_cast<double>(a.dimension) / sum_of_neighbours(sums, work.pieces));
    Storage* const out = static_cast<Storage*>(a.out) + row * a.dimension;
    for (Index i = 0; i < a.dimension; ++i) round_to(out[i], values[i] * scale);
}

}  // namespace

void philox_probes(const PhiloxArguments& a) {
    const Index rows = a.count * a.samples;
    with_storage(a.dtype, [&](auto one) {
        using T = decltype(one);
        if (a.kind == ProbeKind::rademacher) {
            const Work work{a, pieces(a.dimension, kSignsOfTask), nullptr};
            parallel_for(rows * work.pieces, a.threads, rademacher_task<T>, &work);
            return;
        }
        const Index parts = pieces(a.dimension, kNormalsOfTask);
        if (a.kind == ProbeKind::normal) {
            const Work work{a, parts, nullptr};
            parallel_for(rows * parts, a.threads, normal_task<T>, &work);
            return;
        }
        const Index doubles = parts + 1 + parts * kNormalsOfTask;
        const int threads = static_cast<int>(smaller(a.threads, rows));
        const Scratch scratch(threads, doubles * static_cast<Index>(sizeof(double)));
        const Work work{a, parts, &scratch};
        parallel_for(rows, threads, sphere_task<T>, &work);
    });
}

}  // namespace sharpcore::SHARPCORE_ISA
