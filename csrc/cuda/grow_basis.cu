// Block Gram-Schmidt with Cholesky QR, and column by column where that is not safe.
//
// The usual case reads a basis three times (the reorthogonalized Pythagorean variant of Carson, Lund, Ma and Oktay,
// 2024, "Reorthogonalized Pythagorean variants of block classical Gram-Schmidt"). With W the vectors as columns:
//   1. C = V^T W and W^T W, which give the Gram matrix W^T W - C^T C = R^T R of the remainders;
//   2. X = (W - V C) R^-1, and at once E = V^T X and X^T X, which give X^T X - E^T E = S^T S;
//   3. Q = (X - V E) S^-1, the new rows. W = V (C + E R) + Q (S R).
// Rounding leaves X orthonormal to about eps ||R^-1||^2 with the columns of W scaled to 1; the second time, that is as
// good as exact. Where R is worse conditioned than that allows, or a remainder may be one to be dropped, R = S = 1
// makes the same three steps two passes of plain block Gram-Schmidt, and one block of threads goes on column by column
// as the reference does. Which of the two it is, is known on the device alone: every kernel is launched.
//
// Sums are over slices of the vectors, parts of several slices, and the parts, each in one order: no batch and no
// schedule changes a bit.
#include <cmath>
#include <stdexcept>

#include "cuda/grow_basis.h"
#include "cuda/lanes.h"

namespace sharpcore::cuda {
namespace {

using Index = std::int64_t;

// As in the reference.
constexpr double kRounding = 64 * 0x1p-52;
constexpr double kKept = 0.5;
constexpr int kMostPasses = 3;

// Cholesky QR is safe where each remainder has this part of its vector's square, the inverse of R no larger a norm
// than this, and no remainder is so close to the bound for dropping that rounding could decide.
constexpr double kSafeSquare = 0x1p-20, kSafeInverse = 0x1p12, kClear = 1 + 0x1p-20;

// Elements of vectors that a block works on at once, and the most parts that vectors are divided into. Neither they nor
// anything else depends on the batch.
constexpr int kSlice = kThreads;
constexpr Index kMostParts = 256;

// Blocks of a grid in its second direction.
constexpr Index kMostBlocks = 65535;

constexpr int kSlow = -1;

struct Job {
    GrowBasisArguments a;
    Index first;          // the vectors from `first` on, `columns` of them, are taken now
    int columns, width;   // `width` of them, a power of two, have memory: those behind `columns` are zero
    Index slices, parts;  // of a vector
    double* vectors;      // [batch, width, size]: remainders
    double* partial;      // [batch, parts, limit + width, width]: products with the basis, then with each other
    double* sums[2];      // [batch, limit + width, width]: the same of whole vectors, after the first and second sweep
    double* factors[2];   // [batch, width + 1, width]: R and S, upper triangles; the inverses of their diagonals
    double* before;       // [batch, width]: norms after the first pass
    double* least;        // [batch, width]: remainders of at most this norm give no row
    Index* mode;          // [batch]: kSlow, or a bit for each column that gives a row
    int sweep;            // whose sums are reduced

    __host__ __device__ Index columns_of_sums() const { return (a.limit + width) * width; }

    // The rows of a basis so far; negative where nothing is to be done.
    __device__ Index rows_of(Index sample) const {
        const Index n = a.sizes[sample];
        return n < 0 || first == 0 ? n : n + a.ranks[sample];
    }

    __device__ double* basis(Index sample) const { return a.basis + sample * a.rows * a.size; }

    __device__ double* factor(int which, Index sample) const { return factors[which] + sample * (width + 1) * width; }

    __device__ double entry(Index sample, int column, Index i) const {
        if (column >= columns || i >= a.size) return 0;
        const Index at = (first + column) * a.block_count_stride + sample * a.block_batch_stride + i;
        return a.dtype == Dtype::float32 ? static_cast<double>(static_cast<const float*>(a.block)[at])
                                         : static_cast<const double*>(a.block)[at];
    }

    // Where the coefficient of a column lies that belongs to a row of the basis: rows of earlier groups are new ones.
    __device__ double& coefficient(Index sample, Index row, int column) const {
        const Index n = a.sizes[sample], j = first + column;
        return row < n ? a.coefficients[(sample * a.rows + row) * a.count + j]
                       : a.triangle[(sample * a.count + row - n) * a.count + j];
    }
};

// Products of `count` rows with the vectors of a tile: sums[row * width + vector], to which those of an earlier slice
// are kept. A warp takes several rows at a time; each of its lanes has the same sum to itself at every slice.
template <int width, int unrolled>
__device__ void multiply(double* sums, const double* rows, Index stride, Index count,
                         const double (&tile)[width][kSlice], Index size, bool earlier) {
    constexpr int together = smaller(width < 4 ? 8 : 4, kWarp / width), each = kWarp / (together * width);
#pragma unroll 1
    for (Index first = warp() * together; first < count; first += kWarps * together) {
        const double* const from = rows + first * stride;
        const Index left = count - first;
        double sum[together * width] = {};
#pragma unroll unrolled
        for (int i = lane(); i < kSlice; i += kWarp) {
            double w[width];
#pragma unroll
            for (int k = 0; k < width; ++k) w[k] = tile[k][i];
#pragma unroll
            for (int r = 0; r < together; ++r) {
                const double v = r < left && i < size ? from[r * stride + i] : 0;
#pragma unroll
                for (int k = 0; k < width; ++k) sum[r * width + k] += v * w[k];
            }
        }
        const double total = sum_lanes(sum);
        const Index place = first * width + lane() / each;
        if (lane() % each == 0 && place < count * width) sums[place] = earlier ? sums[place] + total : total;
    }
}

// Takes the rows, times coefficients [count, width], off one element of each vector; `ahead` rows are fetched at once.
template <int width, int ahead>
__device__ void subtract(double (&w)[width], const double* rows, Index stride, Index count,
                         const double* coefficients) {
    Index m = 0;
#pragma unroll 1
    for (; m + ahead <= count; m += ahead) {
        double v[ahead];
#pragma unroll
        for (int r = 0; r < ahead; ++r) v[r] = rows[(m + r) * stride];
#pragma unroll
        for (int r = 0; r < ahead; ++r)
#pragma unroll
            for (int k = 0; k < width; ++k) w[k] -= coefficients[(m + r) * width + k] * v[r];
    }
#pragma unroll 1
    for (; m < count; ++m) {
        const double v = rows[m * stride];
#pragma unroll
        for (int k = 0; k < width; ++k) w[k] -= coefficients[m * width + k] * v;
    }
}

// w R^-1 for one element of each vector.
template <int width>
__device__ void solve(double (&w)[width], const double* factor) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
#pragma unroll
        for (int i = 0; i < k; ++i) w[k] -= w[i] * factor[i * width + k];
        w[k] *= factor[width * width + k];
    }
}

// The first sweep, and the second: products of the vectors, or of what the first left of them.
template <int width, bool second>
__global__ void __launch_bounds__(kThreads, 2) multiply_kernel(Job job) {
    // As much at once as there are registers for.
    constexpr int unrolled = second && width == kMostColumns ? 1 : 2;
    __shared__ double tile[width][kSlice];
    const Index sample = blockIdx.y, n = job.rows_of(sample), size = job.a.size;
    if (n < 0) return;
    const double* const basis = job.basis(sample);
    double* const partial = job.partial + (sample * job.parts + blockIdx.x) * job.columns_of_sums();
    for (Index slice = blockIdx.x; slice < job.slices; slice += job.parts) {
        const Index begin = slice * kSlice, i = begin + threadIdx.x;
        double w[width];
#pragma unroll
        for (int k = 0; k < width; ++k) w[k] = job.entry(sample, k, i);
        if (second && i < size) {
            subtract<width, 4>(w, basis + i, size, n, job.sums[0] + sample * job.columns_of_sums());
            solve<width>(w, job.factor(0, sample));
#pragma unroll
            for (int k = 0; k < width; ++k) job.vectors[(sample * width + k) * size + i] = w[k];
        }
#pragma unroll
        for (int k = 0; k < width; ++k) tile[k][threadIdx.x] = w[k];
        __syncthreads();
        const bool earlier = slice != blockIdx.x;
        multiply<width, unrolled>(partial, basis + begin, size, n, tile, size - begin, earlier);
        multiply<width, unrolled>(partial + job.a.limit * width, tile[0], kSlice, width, tile, kSlice, earlier);
        __syncthreads();
    }
}

// Adds up the parts.
__global__ void __launch_bounds__(kThreads) reduce_kernel(Job job) {
    __shared__ double sums[kWarps][kWarp];
    const Index sample = blockIdx.y, n = job.rows_of(sample);
    if (n < 0) return;
    const Index first = static_cast<Index>(blockIdx.x) * kWarp, place = first + lane(), all = job.columns_of_sums();
    const Index ours = n * job.width, theirs = job.a.limit * job.width;
    if (first >= ours && first + kWarp <= theirs) return;
    const bool wanted = place < ours || (place >= theirs && place < all);
    const double* const partial = job.partial + sample * job.parts * all + place;
    double sum = 0;
    if (wanted)
#pragma unroll 4
        for (Index part = warp(); part < job.parts; part += kWarps) sum += partial[part * all];
    sums[warp()][lane()] = sum;
    __syncthreads();
    if (warp() > 0 || !wanted) return;
    sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += sums[i][lane()];
    job.sums[job.sweep][sample * all + place] = sum;
}

// The Gram matrix of what is left of the vectors: that of the vectors, less that of their products with the basis.
__device__ void remaining_gram(double (&gram)[kMostColumns * kMostColumns], const double* sums, Index n, Index limit,
                               int width) {
    __shared__ double parts[kThreads + kMostColumns * kMostColumns];
    const int entries = width * width, pieces = kThreads / entries > 0 ? kThreads / entries : 1;
    for (int item = threadIdx.x; item < entries * pieces; item += kThreads) {
        const int row = item % entries / width, column = item % width;
        double sum = 0;
#pragma unroll 4
        for (Index m = item / entries; m < n; m += pieces) sum += sums[m * width + row] * sums[m * width + column];
        parts[item] = sum;
    }
    __syncthreads();
    for (int entry = threadIdx.x; entry < entries; entry += kThreads) {
        double sum = 0;
        for (int piece = 0; piece < pieces; ++piece) sum += parts[piece * entries + entry];
        gram[entry] = sums[limit * width + entry] - sum;
    }
    __syncthreads();
}

// Makes the Cholesky factor of `gram` in its place, by the lanes of the first warp: the upper triangle, of which the
// columns that are zero have a one on the diagonal. The lower triangle is left as it was.
__device__ void factorize(double (&gram)[kMostColumns * kMostColumns], Index zero, int width) {
    const int column = lane();
    for (int j = 0; j < width; ++j) {
        double pivot = 1;
        if ((zero >> j & 1) == 0) pivot = sqrt(gram[j * width + j]);
        __syncwarp();
        if (column == j) gram[j * width + j] = pivot;
        if (column > j && column < width) gram[j * width + column] /= pivot;
        __syncwarp();
        if (column > j && column < width)
            for (int i = j + 1; i <= column; ++i)
                gram[i * width + column] -= gram[j * width + i] * gram[j * width + column];
        __syncwarp();
    }
}

// What later kernels take for R or S: the upper triangle of `gram`, or 1.
__device__ void write_factor(double* factor, const double (&gram)[kMostColumns * kMostColumns], bool unit, int width,
                             int thread, int threads) {
    for (int entry = thread; entry < (width + 1) * width; entry += threads) {
        const int i = entry / width, k = entry % width;
        if (i == width)
            factor[entry] = unit ? 1 : 1 / gram[k * width + k];
        else
            factor[entry] = !unit && i <= k ? gram[entry] : i == k ? 1 : 0;
    }
}

// Decides how a sample goes on, and makes R.
__global__ void __launch_bounds__(kThreads) first_factor_kernel(Job job) {
    __shared__ double gram[kMostColumns * kMostColumns], scaled[kMostColumns * kMostColumns];
    __shared__ double inverse[kMostColumns];
    const Index sample = blockIdx.x, n = job.rows_of(sample);
    const int width = job.width;
    if (n < 0) return;
    const double* const sums = job.sums[0] + sample * job.columns_of_sums();
    const double* const squares = sums + job.a.limit * width;
    remaining_gram(gram, sums, n, job.a.limit, width);
    if (warp() > 0) return;
    Index zero = 0, rank = 0;
    for (int k = 0; k < width; ++k) {
        if (squares[k * width + k] == 0)
            zero |= Index{1} << k;
        else
            ++rank;
    }
    factorize(gram, zero, width);
    // The same with the vectors scaled to 1, and what its inverse is like, a column a lane.
    const int column = lane();
    if (column < width) {
        const double norm = zero >> column & 1 ? 1 : sqrt(squares[column * width + column]);
        for (int i = 0; i <= column; ++i) scaled[i * width + column] = gram[i * width + column] / norm;
    }
    __syncwarp();
    if (column < width) {
        const double norm = sqrt(squares[column * width + column]);
        const double floor = job.a.floor[sample], rounding = kRounding * norm;
        // As in the reference also where one of them is NaN.
        const double least = rounding > floor ? rounding : floor;
        job.least[sample * width + column] = least;
        const double left = gram[column * width + column], part = scaled[column * width + column];
        double solution[kMostColumns], square = 0;
#pragma unroll
        for (int i = kMostColumns - 1; i >= 0; --i) {
            solution[i] = i == column ? 1 : 0;
#pragma unroll
            for (int k = i + 1; k < kMostColumns; ++k)
                if (k <= column && i < column) solution[i] -= scaled[i * width + k] * solution[k];
            if (i <= column) solution[i] /= scaled[i * width + i];
            if (i <= column) square += solution[i] * solution[i];
        }
        // Written so that NaN is not safe.
        const bool safe = (zero >> column & 1) != 0 || (part * part >= kSafeSquare && left > kClear * least);
        inverse[column] = safe ? square : -1;
    }
    __syncwarp();
    double total = 0;
    bool safe = n + rank <= job.a.limit;
    for (int k = 0; k < width; ++k) {
        safe = safe && inverse[k] >= 0;
        total += inverse[k];
    }
    safe = safe && total <= kSafeInverse * kSafeInverse;
    write_factor(job.factor(0, sample), gram, !safe, width, lane(), kWarp);
    if (lane() == 0) job.mode[sample] = safe ? ~zero & ((Index{1} << job.columns) - 1) : kSlow;
}

// Makes S, the coefficients, and the triangle but for what is found column by column.
__global__ void __launch_bounds__(kThreads) second_factor_kernel(Job job) {
    __shared__ double gram[kMostColumns * kMostColumns], first[kMostColumns * kMostColumns];
    const Index sample = blockIdx.x, n = job.rows_of(sample), count = job.a.count;
    const int width = job.width;
    // What belongs to no row is zero.
    for (Index item = threadIdx.x; item < job.a.rows * job.columns; item += kThreads)
        job.a.coefficients[(sample * job.a.rows + item / job.columns) * count + job.first + item % job.columns] = 0;
    for (Index item = threadIdx.x; item < count * job.columns; item += kThreads)
        job.a.triangle[(sample * count + item / job.columns) * count + job.first + item % job.columns] = 0;
    if (static_cast<int>(threadIdx.x) < job.columns) job.a.dropped[sample * count + job.first + threadIdx.x] = 0;
    if (n < 0) return;
    const double* const once = job.sums[0] + sample * job.columns_of_sums();
    const double* const twice = job.sums[1] + sample * job.columns_of_sums();
    const Index mode = job.mode[sample];
    for (int entry = threadIdx.x; entry < width * width; entry += kThreads) first[entry] = job.factor(0, sample)[entry];
    remaining_gram(gram, twice, n, job.a.limit, width);
    if (mode != kSlow && warp() == 0) factorize(gram, ~mode, width);
    __syncthreads();
    write_factor(job.factor(1, sample), gram, mode == kSlow, width, threadIdx.x, kThreads);
    if (static_cast<int>(threadIdx.x) < width)
        job.before[sample * width + threadIdx.x] = sqrt(twice[(job.a.limit + threadIdx.x) * width + threadIdx.x]);
    for (Index item = threadIdx.x; item < n * job.columns; item += kThreads) {
        const Index m = item / job.columns;
        const int k = static_cast<int>(item % job.columns);
        double sum = once[m * width + k];
        for (int i = 0; i <= k; ++i) sum += twice[m * width + i] * first[i * width + k];
        job.coefficient(sample, m, k) = sum;
    }
    if (mode == kSlow) return;
    for (int entry = threadIdx.x; entry < job.columns * job.columns; entry += kThreads) {
        const int i = entry / job.columns, k = entry % job.columns;
        if (i > k || (mode >> i & 1) == 0 || (mode >> k & 1) == 0) continue;
        double sum = 0;
        for (int l = i; l <= k; ++l) sum += gram[i * width + l] * first[l * width + k];
        Index row = n;
        for (int l = 0; l < i; ++l) row += mode >> l & 1;
        job.coefficient(sample, row, k) = sum;
    }
}

// The third sweep: new rows, or what two passes left of the vectors.
template <int width>
__global__ void __launch_bounds__(kThreads) subtract_kernel(Job job) {
    const Index sample = blockIdx.y, n = job.rows_of(sample), size = job.a.size;
    if (n < 0) return;
    const Index mode = job.mode[sample];
    double* const basis = job.basis(sample);
    double* const vectors = job.vectors + sample * width * size;
    const double* const sums = job.sums[1] + sample * job.columns_of_sums();
    for (Index i = static_cast<Index>(blockIdx.x) * kSlice + threadIdx.x; i < size; i += job.parts * kSlice) {
        double w[width];
#pragma unroll
        for (int k = 0; k < width; ++k) w[k] = vectors[k * size + i];
        subtract<width, 8>(w, basis + i, size, n, sums);
        solve<width>(w, job.factor(1, sample));
        double* row = basis + n * size + i;
#pragma unroll
        for (int k = 0; k < width; ++k) {
            if (mode == kSlow) {
                vectors[k * size + i] = w[k];
            } else if ((mode >> k & 1) != 0) {
                *row = w[k];
                row += size;
            }
        }
    }
}

__device__ double norm(const double* vector, Index size) {
    double sum = 0;
#pragma unroll 4
    for (Index i = threadIdx.x; i < size; i += kThreads) sum += vector[i] * vector[i];
    return sqrt(sum_block(sum));
}

// One pass of column `column` over the rows [row, end) of the basis.
__device__ void one_pass(const Job& job, Index sample, int column, double* vector, Index row, Index end) {
    __shared__ double tile[1][kSlice];
    const Index size = job.a.size;
    const double* const basis = job.basis(sample) + row * size;
    double* const products = job.sums[0] + sample * job.columns_of_sums();
    for (Index begin = 0; begin < size; begin += kSlice) {
        const Index i = begin + threadIdx.x;
        tile[0][threadIdx.x] = i < size ? vector[i] : 0;
        __syncthreads();
        multiply<1, 2>(products, basis + begin, size, end - row, tile, size - begin, begin > 0);
        __syncthreads();
    }
    for (Index m = threadIdx.x; m < end - row; m += kThreads) job.coefficient(sample, row + m, column) += products[m];
    for (Index i = threadIdx.x; i < size; i += kThreads) {
        double w[1] = {vector[i]};
        subtract<1, 8>(w, basis + i, size, end - row, products);
        vector[i] = w[0];
    }
    __syncthreads();
}

// One column after another, where that is asked for; and how many rows have come.
__global__ void __launch_bounds__(kThreads, 1) columns_kernel(Job job) {
    const Index sample = blockIdx.x, n = job.rows_of(sample), size = job.a.size;
    const Index mode = n < 0 ? 0 : job.mode[sample];
    Index rank = 0;
    if (mode != kSlow)
        for (int k = 0; k < job.columns; ++k) rank += mode >> k & 1;
    for (int j = 0; mode == kSlow && j < job.columns; ++j) {
        double* const vector = job.vectors + (sample * job.width + j) * size;
        double kept = norm(vector, size), left = kept;
        // A column that the second pass shortened, or that the new rows shorten, goes through whole passes again.
        bool again = kept < kKept * job.before[sample * job.width + j];
        if (rank > 0) {
            for (int pass = 0; pass < 2; ++pass) one_pass(job, sample, j, vector, n, n + rank);
            left = norm(vector, size);
        }
        const double least = job.least[sample * job.width + j];
        for (int pass = 0; pass < kMostPasses; ++pass) {
            if (left <= least || !(again || left < kKept * kept)) break;
            again = false;
            kept = left;
            one_pass(job, sample, j, vector, 0, n + rank);
            left = norm(vector, size);
        }
        if (left <= least || n + rank >= job.a.limit) {
            if (threadIdx.x == 0) job.a.dropped[sample * job.a.count + job.first + j] = left;
            continue;
        }
        // A norm is the root of a number, so its inverse is finite.
        const double inverse = 1 / left;
        double* const row = job.basis(sample) + (n + rank) * size;
        for (Index i = threadIdx.x; i < size; i += kThreads) row[i] = vector[i] * inverse;
        if (threadIdx.x == 0) job.coefficient(sample, n + rank, j) = left;
        ++rank;
        __syncthreads();
    }
    // Every thread has read where the basis ended.
    __syncthreads();
    if (threadIdx.x == 0) job.a.ranks[sample] = (n < 0 || job.first == 0 ? 0 : job.a.ranks[sample]) + rank;
}

template <int width>
void take(Job job, Stream stream) {
    const auto batch = static_cast<unsigned>(job.a.batch), parts = static_cast<unsigned>(job.parts);
    const dim3 slices(parts, batch), samples(batch);
    const dim3 sums(static_cast<unsigned>((job.columns_of_sums() + kWarp - 1) / kWarp), batch);
    launch(multiply_kernel<width, false>, slices, 0, stream, job);
    launch(reduce_kernel, sums, 0, stream, job);
    launch(first_factor_kernel, samples, 0, stream, job);
    launch(multiply_kernel<width, true>, slices, 0, stream, job);
    job.sweep = 1;
    launch(reduce_kernel, sums, 0, stream, job);
    launch(second_factor_kernel, samples, 0, stream, job);
    launch(subtract_kernel<width>, slices, 0, stream, job);
    launch(columns_kernel, samples, 0, stream, job);
}

int width_of(Index columns) {
    int width = 1;
    while (width < columns && width < kMostColumns) width *= 2;
    return width;
}

// Lays out the memory that a group of columns needs, from `workspace` on; how many doubles that is.
Index lay_out(Job& job, double* workspace) {
    const Index batch = job.a.batch, width = job.width;
    double* next = workspace;
    const auto give = [&](Index doubles) {
        double* const given = next;
        next += doubles;
        return given;
    };
    job.slices = (job.a.size + kSlice - 1) / kSlice;
    job.parts = job.slices < kMostParts ? job.slices : kMostParts;
    job.vectors = give(batch * width * job.a.size);
    job.partial = give(batch * job.parts * job.columns_of_sums());
    for (double*& sums : job.sums) sums = give(batch * job.columns_of_sums());
    for (double*& factors : job.factors) factors = give(batch * (width + 1) * width);
    job.before = give(batch * width);
    job.least = give(batch * width);
    static_assert(sizeof(Index) == sizeof(double), "doubles are counted");
    job.mode = reinterpret_cast<Index*>(give(batch));
    return next - workspace;
}

}  // namespace

Index grow_basis_workspace(const GrowBasisArguments& a) {
    Job job{};
    job.a = a;
    job.width = width_of(a.count);
    return lay_out(job, nullptr);
}

void grow_basis(const GrowBasisArguments& a, double* workspace, void* stream) {
    if (a.batch > kMostBlocks) throw std::invalid_argument("grow_basis: expected at most 65,535 bases");
    const auto on = static_cast<Stream>(stream);
    Job job{};
    job.a = a;
    for (; job.first < a.count; job.first += kMostColumns) {
        const Index left = a.count - job.first;
        job.columns = static_cast<int>(left < kMostColumns ? left : kMostColumns);
        job.width = width_of(left);
        lay_out(job, workspace);
        job.sweep = 0;
        switch (job.width) {
            case 1:
                take<1>(job, on);
                break;
            case 2:
                take<2>(job, on);
                break;
            case 4:
                take<4>(job, on);
                break;
            default:
                take<kMostColumns>(job, on);
        }
    }
}

}  // namespace sharpcore::cuda
