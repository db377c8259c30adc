// K tangents or cotangents through LayerNorm. A block of rows of x stays in the cache while all K vectors pass; of each
// row of a vector one sweep takes the two means, a second one, which finds the row in the cache, writes the result.
#include "sharpcore/layer_norm_tangent.h"

#include "sharpcore/parallel.h"
#include "sharpcore/simd.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = LayerNormArguments;

// Vectors that are summed side by side.
constexpr int kStrip = 4;

// Elements that are added up in T, by kStrip * kLanes partial sums, before the sum goes into a double: keeps float sums
// as exact as pairwise ones.
template <class T>
constexpr Index kPiece = 32 * kStrip * kLanes<T>;

struct Sums {
    double vector;   // of v, or h for cotangents
    double product;  // of v (x - mean)
};

// Lanes of a and of b, added up pairwise.
template <class T>
inline void add_lanes(Sums& sums, Vec<T> a, Vec<T> b) {
    T first[kLanes<T>], second[kLanes<T>];
    store(first, a);
    store(second, b);
#pragma GCC unroll 8
    for (Index half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (Index i = 0; i < half; ++i) {
            first[i] += first[i + half];
            second[i] += second[i + half];
        }
    sums.vector += static_cast<double>(first[0]);
    sums.product += static_cast<double>(second[0]);
}

template <bool weighted, class S, class T = Compute<S>>
inline Sums row_sums(const S* v, const S* x, const T* weight, Index size, T mean) {
    const Vec<T> m = broadcast(mean);
    Sums sums{0, 0};
    for (Index i = 0; i < size;) {
        const Index end = i + kPiece<T> < size ? i + kPiece<T> : size;
        Vec<T> sum[kStrip] = {}, product[kStrip] = {};
        const auto add = [&](int j, Vec<T> vector, Vec<T> input) {
            sum[j] += vector;
            product[j] += vector * (input - m);
        };
        const auto add_whole = [&](int j, Index at) {
            Vec<T> vector = load(v + at);
            if constexpr (weighted) vector *= load(weight + at);
            add(j, vector, load(x + at));
        };
        for (; i + kStrip * kLanes<T> <= end; i += kStrip * kLanes<T>)
#pragma GCC unroll 4
            for (int j = 0; j < kStrip; ++j) add_whole(j, i + j * kLanes<T>);
        for (; i + kLanes<T> <= end; i += kLanes<T>) add_whole(0, i);
        if (const Index rest = end - i; rest > 0) {
            Vec<T> vector = load_partial(v + i, rest);
            if constexpr (weighted) vector *= load_partial(weight + i, rest);
            // Zeros in the lanes past the end of v make the product there zero, whatever x - mean is.
            add(1, vector, load_partial(x + i, rest));
            i = end;
        }
        add_lanes<T>(sums, (sum[0] + sum[1]) + (sum[2] + sum[3]),
                     (product[0] + product[1]) + (product[2] + product[3]));
    }
    return sums;
}

// Writes gain (v - offset - (x - mean) slope), gain being rstd, times the weight for tangents; for cotangents the
// weight goes to v instead.
template <bool adjoint, bool weighted, class S, class T = Compute<S>>
inline void row_write(S* out, const S* v, const S* x, const T* weight, Index size, T mean, T rstd, T offset, T slope) {
    const Vec<T> m = broadcast(mean), r = broadcast(rstd), o = broadcast(offset), s = broadcast(slope);
    const auto result = [&](Vec<T> vector, Vec<T> input, Vec<T> factor) {
        if constexpr (weighted && adjoint) vector *= factor;
        const Vec<T> projected = (vector - o - (input - m) * s) * r;
        if constexpr (weighted && !adjoint) return projected * factor;
        return projected;
    };
    Index i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>)
        store(out + i, result(load(v + i), load(x + i), weighted ? load(weight + i) : Vec<T>{}));
    if (const Index rest = size - i; rest > 0)
        store_partial(out + i,
                      result(load_partial(v + i, rest), load_partial(x + i, rest),
                             weighted ? load_partial(weight + i, rest) : Vec<T>{}),
                      rest);
}

// Rows of a tile of [size, rows], written one after the other.
template <class S>
void gather_rows(S* to, const S* from, Index rows, Index size, Index from_stride) {
    constexpr Index lanes = kVectorBytes / static_cast<Index>(sizeof(S));
    for (Index i = 0; i < size; i += lanes) {
        const Index width = i + lanes < size ? lanes : size - i;
        for (Index row = 0; row < rows; ++row)
            for (Index j = 0; j < width; ++j) to[row * size + i + j] = from[(i + j) * from_stride + row];
    }
}

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index rows_per_block, blocks, splits;  // blocks: of a batch; splits: ranges of K
};

template <bool adjoint, bool weighted, class S>
void do_task(const void* job, Index task, int slot) noexcept {
    using T = Compute<S>;
    const Work& work = *static_cast<const Work*>(job);
    const Arguments& a = work.arguments;
    const Index split = task % work.splits, part = task / work.splits;
    const Index batch = part / work.blocks, begin = part % work.blocks * work.rows_per_block;
    const Index rows = begin + work.rows_per_block < a.rows ? work.rows_per_block : a.rows - begin;
    const Index first = split * a.count / work.splits, last = (split + 1) * a.count / work.splits;
    const Index start = batch * a.rows + begin;
    const double inverse_size = 1 / static_cast<double>(a.size);
    const T* const weight = weighted ? static_cast<const T*>(a.weight) + batch * a.weight_batch_stride : nullptr;
    for (Index k = first; k < last; ++k) {
        const S* v = static_cast<const S*>(a.vectors) + k * a.vector_count_stride + batch * a.vector_batch_stride;
        if (a.columns) {
            S* const gathered = static_cast<S*>(work.scratch.slot(slot));
            gather_rows<S>(gathered, v + begin, rows, a.size, a.rows);
            v = gathered;
        } else {
            v += begin * a.size;
        }
        S* out = static_cast<S*>(a.out) + k * a.out_count_stride + start * a.size;
        for (Index row = 0; row < rows; ++row) {
            const T mean = static_cast<const T*>(a.mean)[start + row],
                    rstd = static_cast<const T*>(a.rstd)[start + row];
            const S* x = static_cast<const S*>(a.x) + (start + row) * a.size;
            const Sums sums = row_sums < adjoint && weighted, S > (v + row * a.size, x, weight, a.size, mean);
            const T offset = static_cast<T>(sums.vector * inverse_size);
            // The mean of v xhat, times rstd once more as x - mean lacks it.
            const T slope = static_cast<T>(sums.product * inverse_size * rstd * rstd);
            row_write<adjoint, weighted, S>(out + row * a.size, v + row * a.size, x, weight, a.size, mean, rstd, offset,
                                            slope);
        }
    }
}

// Bytes of x in a block: half of what a first-level cache holds.
constexpr Index kBlockBytes = 16384;

// Rows of a block whose vectors lie as columns: whole cache lines of each.
constexpr Index kColumnRows = 32;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

template <bool adjoint, class S>
void run(const Arguments& a) {
    const Index row_bytes = a.size * static_cast<Index>(sizeof(S));
    Index rows_per_block = kBlockBytes / row_bytes;
    const Index least = a.columns ? kColumnRows : 1;
    if (rows_per_block < least) rows_per_block = least;
    if (rows_per_block > a.rows) rows_per_block = a.rows;
    const Index blocks = (a.rows + rows_per_block - 1) / rows_per_block;
    Index splits = 1;
    if (a.threads > 1) {
        splits = (kTasksPerThread * a.threads + a.batch * blocks - 1) / (a.batch * blocks);
        if (splits > a.count) splits = a.count;
    }
    const int threads = a.threads > 1 ? a.threads : 1;
    const Scratch scratch(threads, a.columns ? rows_per_block * row_bytes : 0);
    const Work work{a, scratch, rows_per_block, blocks, splits};
    parallel_for(a.batch * blocks * splits, threads,
                 a.weight == nullptr ? do_task<adjoint, false, S> : do_task<adjoint, true, S>, &work);
}

template <bool adjoint>
void run_any(const Arguments& a) {
    if (a.dtype == Dtype::float64)
        run<adjoint, double>(a);
    else if (a.dtype == Dtype::float32)
        run<adjoint, float>(a);
    else
        run<adjoint, bfloat16>(a);
}

}  // namespace

void layer_norm_tangent(const Arguments& arguments) { run_any<false>(arguments); }

void layer_norm_adjoint(const Arguments& arguments) { run_any<true>(arguments); }

}  // namespace sharpcore::SHARPCORE_ISA
