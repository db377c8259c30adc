// Block Gram-Schmidt in sweeps over chunks of the vectors: in one sweep a chunk of the block has the basis taken off
// and, with that chunk of the basis still in the cache, is multiplied by it for the next pass. Sums over a chunk are
// made in one order and added up chunk after chunk, so they depend on neither the threads nor the batch.
#include "sharpcore/grow_basis.h"

#include "sharpcore/parallel.h"
#include "sharpcore/simd.h"
#include "sharpcore/transpose.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = GrowBasisArguments;
using Doubles = Vec<double>;

constexpr Index kWidth = kLanes<double>;

// As in the reference.
constexpr double kRounding = 64 * 0x1p-52;
constexpr double kKept = 0.5;
constexpr int kMostPasses = 3;

// Elements of a vector that are worked on at once.
constexpr Index kChunk = 256;

// Columns of a tile, and rows beside as many of them: their sums fill half of the registers.
constexpr int kColumns = 4;
constexpr int kRows = kVectorBytes == 64 ? 4 : 2;

// Rows that are fetched ahead of those being read: pieces of rows are too short for the CPU to foresee.
constexpr Index kAhead = 8;

// Rows of doubles in memory.
template <class T>
struct Rows {
    T* data;
    Index stride;

    T* row(Index i) const { return data + i * stride; }
    Rows from(Index i) const { return {row(i), stride}; }
    Rows at(Index i) const { return {data + i, stride}; }
};

using Read = Rows<const double>;

// Sums of the lanes of `count` vectors, halves added to halves.
template <int count>
inline void sum_lanes(double* sums, const Doubles* vectors) {
#pragma GCC unroll 16
    for (int first = 0; first < count; first += static_cast<int>(kWidth)) {
        Doubles square[kWidth];
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; ++i) square[i] = first + i < count ? vectors[first + i] : Doubles{};
        transpose<double>(square);
#pragma GCC unroll 4
        for (Index half = kWidth / 2; half > 0; half /= 2)
#pragma GCC unroll 8
            for (Index i = 0; i < half; ++i) square[i] += square[i + half];
        if (first + kWidth <= count)
            store(sums + first, square[0]);
        else
            store_partial(sums + first, square[0], count - first);
    }
}

// The products of `rows` rows with `columns` others over `size` elements: sums[row * row_step + column * column_step].
template <int rows, int columns>
inline void multiply_tile(double* sums, Index row_step, Index column_step, Read left, Read right, Index size) {
    Doubles sum[rows * columns] = {};
    const auto add = [&](Index i, auto read) {
        Doubles b[columns];
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) b[c] = read(right.row(c) + i);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            if constexpr (rows > 1) __builtin_prefetch(left.row(r + kAhead) + i, 0, 2);
            const Doubles a = read(left.row(r) + i);
#pragma GCC unroll 4
            for (int c = 0; c < columns; ++c) sum[r * columns + c] += a * b[c];
        }
    };
    Index i = 0;
    for (; i + kWidth <= size; i += kWidth) add(i, [](const double* from) { return load(from); });
    if (const Index rest = size - i; rest > 0) add(i, [rest](const double* from) { return load_partial(from, rest); });
    double tile[rows * columns];
    sum_lanes<rows * columns>(tile, sum);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) sums[r * row_step + c * column_step] = tile[r * columns + c];
}

template <int columns>
inline void multiply_columns(double* sums, Index row_step, Index column_step, Read left, Index rows, Read right,
                             Index size) {
    Index r = 0;
    for (; r + kRows <= rows; r += kRows)
        multiply_tile<kRows, columns>(sums + r * row_step, row_step, column_step, left.from(r), right, size);
    for (; r < rows; ++r)
        multiply_tile<1, columns>(sums + r * row_step, row_step, column_step, left.from(r), right, size);
}

// The products of all `rows` rows with all `columns` others, [rows, columns].
void multiply(double* sums, Read left, Index rows, Read right, Index columns, Index size) {
    if (columns == 1) {
        // One column has too few sums in the making; the rows take the place of columns.
        Index r = 0;
        for (; r + kColumns <= rows; r += kColumns)
            multiply_tile<1, kColumns>(sums + r, 0, 1, right, left.from(r), size);
        for (; r < rows; ++r) multiply_tile<1, 1>(sums + r, 0, 1, right, left.from(r), size);
        return;
    }
    for (Index c = 0; c < columns; c += kColumns) {
        const Read some = right.from(c);
        switch (columns - c) {
            case 1:
                multiply_columns<1>(sums + c, columns, 1, left, rows, some, size);
                break;
            case 2:
                multiply_columns<2>(sums + c, columns, 1, left, rows, some, size);
                break;
            case 3:
                multiply_columns<3>(sums + c, columns, 1, left, rows, some, size);
                break;
            default:
                multiply_columns<kColumns>(sums + c, columns, 1, left, rows, some, size);
        }
    }
}

// Takes off `columns` vectors the rows of the basis, times [count, columns] coefficients of `step` a row, in `width`
// vectors that `read` and `write` know of; rows `next` further on are fetched.
template <int columns, int width, class Load, class Store>
inline void subtract_tile(Rows<double> vectors, Read basis, Index count, const double* coefficients, Index step,
                          Load read, Store write, Index next = 0) {
    Doubles left[columns * width];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c)
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) left[c * width + i] = read(vectors.row(c) + i * kWidth);
    for (Index m = 0; m < count; ++m) {
        const double* const row = basis.row(m);
        if (next != 0)
#pragma GCC unroll 4
            for (int i = 0; i < width; ++i) __builtin_prefetch(row + next + i * kWidth, 0, 2);
        Doubles v[width];
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) v[i] = read(row + i * kWidth);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) {
            const Doubles factor = broadcast(coefficients[m * step + c]);
#pragma GCC unroll 4
            for (int i = 0; i < width; ++i) left[c * width + i] -= factor * v[i];
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c)
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) write(vectors.row(c) + i * kWidth, left[c * width + i]);
}

template <int columns>
inline void subtract_columns(Rows<double> vectors, Read basis, Index count, const double* coefficients, Index step,
                             Index size, Index next) {
    const auto read = [](const double* from) { return load(from); };
    const auto write = [](double* to, Doubles vector) { store(to, vector); };
    Index i = 0;
    for (; i + kRows * kWidth <= size; i += kRows * kWidth)
        subtract_tile<columns, kRows>(vectors.at(i), basis.at(i), count, coefficients, step, read, write, next);
    for (; i + kWidth <= size; i += kWidth)
        subtract_tile<columns, 1>(vectors.at(i), basis.at(i), count, coefficients, step, read, write);
    if (const Index rest = size - i; rest > 0)
        subtract_tile<columns, 1>(
            vectors.at(i), basis.at(i), count, coefficients, step,
            [rest](const double* from) { return load_partial(from, rest); },
            [rest](double* to, Doubles vector) { store_partial(to, vector, rest); });
}

void subtract(Rows<double> vectors, Index columns, Read basis, Index count, const double* coefficients, Index size,
              Index next) {
    for (Index c = 0; c < columns; c += kColumns, next = 0) {
        const Rows<double> some = vectors.from(c);
        switch (columns - c) {
            case 1:
                subtract_columns<1>(some, basis, count, coefficients + c, columns, size, next);
                break;
            case 2:
                subtract_columns<2>(some, basis, count, coefficients + c, columns, size, next);
                break;
            case 3:
                subtract_columns<3>(some, basis, count, coefficients + c, columns, size, next);
                break;
            default:
                subtract_columns<kColumns>(some, basis, count, coefficients + c, columns, size, next);
        }
    }
}

double sum_of_squares(const double* vector, Index size) {
    Doubles sum[4] = {};
    Index i = 0;
    for (; i + 4 * kWidth <= size; i += 4 * kWidth)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Doubles part = load(vector + i + j * kWidth);
            sum[j] += part * part;
        }
    for (; i + kWidth <= size; i += kWidth) {
        const Doubles part = load(vector + i);
        sum[0] += part * part;
    }
    if (i < size) {
        const Doubles part = load_partial(vector + i, size - i);
        sum[1] += part * part;
    }
    const Doubles total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    double result;
    sum_lanes<1>(&result, &total);
    return result;
}

// What is done to a chunk of some vectors, with some rows of the basis: each step where it is asked for.
struct Sweep {
    double* vectors;  // the chunks of the first, `chunk_stride` apart; those of others lie kChunk behind each other
    Index chunk_stride;
    Index columns;
    Read basis;
    Index count, size;
    const void* block;  // where the vectors are copied from
    Index block_stride;
    Dtype dtype;
    const double* coefficients;  // [count, columns]: what is taken off
    Index next;                  // how far away the rows lie that are fetched meanwhile; 0: none are
    bool norms, multiply;        // whether the norms, and the products with the basis, are wanted
    double* partial;             // [chunks, 1 + count, columns]: squares of the norms, then products
};

template <class T>
void copy(double* to, const T* from, Index size) {
    for (Index i = 0; i < size; ++i) to[i] = static_cast<double>(from[i]);
}

void scale(double* to, const double* from, double by, Index size) {
    for (Index i = 0; i < size; ++i) to[i] = from[i] * by;
}

void do_chunk(const void* job, Index chunk, int) noexcept {
    const Sweep& sweep = *static_cast<const Sweep*>(job);
    const Index begin = chunk * kChunk;
    const Index size = begin + kChunk < sweep.size ? kChunk : sweep.size - begin;
    const Rows<double> vectors{sweep.vectors + chunk * sweep.chunk_stride, kChunk};
    const Read basis = sweep.basis.at(begin);
    if (sweep.block != nullptr)
        for (Index c = 0; c < sweep.columns; ++c) {
            const Index from = c * sweep.block_stride + begin;
            if (sweep.dtype == Dtype::float32)
                copy(vectors.row(c), static_cast<const float*>(sweep.block) + from, size);
            else
                copy(vectors.row(c), static_cast<const double*>(sweep.block) + from, size);
        }
    if (sweep.coefficients != nullptr)
        subtract(vectors, sweep.columns, basis, sweep.count, sweep.coefficients, size, sweep.next);
    double* const partial = sweep.partial + chunk * (1 + sweep.count) * sweep.columns;
    if (sweep.norms)
        for (Index c = 0; c < sweep.columns; ++c) partial[c] = sum_of_squares(vectors.row(c), size);
    if (sweep.multiply)
        multiply(partial + sweep.columns, basis, sweep.count, {vectors.data, vectors.stride}, sweep.columns, size);
}

// Products and sums, for which it pays to call other threads.
constexpr Index kParallelWork = Index{1} << 18;

// The memory that one problem takes.
struct Memory {
    double* vectors;   // [chunks, count, kChunk]
    double* partial;   // [chunks, 1 + limit, count]
    double* products;  // [1 + limit, count]
    double* before;    // [count], as those below
    double* norms;
    double* tolerance;
};

class Problem {
public:
    Problem(const Arguments& arguments, Index i, const Memory& memory, int threads)
        : a_(arguments),
          memory_(memory),
          threads_(threads),
          i_(i),
          n_(arguments.sizes[i]),
          basis_(arguments.basis + i * arguments.rows * arguments.size),
          coefficients_(arguments.coefficients + i * arguments.rows * arguments.count),
          triangle_(arguments.triangle + i * arguments.count * arguments.count),
          dropped_(arguments.dropped + i * arguments.count) {}

    void grow() {
        fill(coefficients_, a_.rows * a_.count);
        fill(triangle_, a_.count * a_.count);
        fill(dropped_, a_.count);
        a_.ranks[i_] = 0;
        if (n_ < 0 || a_.count == 0) return;
        two_passes();
        for (Index j = 0; j < a_.count; ++j) add_column(j);
        a_.ranks[i_] = rank_;
    }

private:
    static void fill(double* numbers, Index count) {
        for (Index k = 0; k < count; ++k) numbers[k] = 0;
    }

    // A sweep of `columns` vectors from `first` on with `count` rows of the basis from `row` on.
    Sweep sweep(Index first, Index columns, Index row, Index count) const {
        Sweep s{};
        s.vectors = memory_.vectors + first * kChunk;
        s.chunk_stride = a_.count * kChunk;
        s.columns = columns;
        s.basis = {basis_ + row * a_.size, a_.size};
        s.count = count;
        s.size = a_.size;
        s.partial = memory_.partial;
        return s;
    }

    // Makes a sweep and adds up what its chunks gave: squares of the norms, then products. It begins where the last
    // one ended, with what is in the cache.
    void run(const Sweep& s) {
        const Index chunks = (s.size + kChunk - 1) / kChunk;
        const Index first = s.norms ? 0 : s.columns, last = (s.multiply ? 1 + s.count : 1) * s.columns;
        const Index work = s.columns * s.size * s.count * ((s.multiply ? 1 : 0) + (s.coefficients != nullptr ? 1 : 0));
        if (threads_ > 1 && work >= kParallelWork)
            parallel_for(chunks, threads_, do_chunk, &s);
        else
            for (Index k = 0; k < chunks; ++k) do_chunk(&s, backwards_ ? chunks - 1 - k : k, 0);
        backwards_ = !backwards_;
        fill(memory_.products + first, last - first);
        for (Index chunk = 0; chunk < chunks; ++chunk) {
            const double* const partial = s.partial + chunk * (1 + s.count) * s.columns;
            for (Index k = first; k < last; ++k) memory_.products[k] += partial[k];
        }
    }

    void take_norms(double* norms) const {
        for (Index j = 0; j < a_.count; ++j) norms[j] = __builtin_sqrt(memory_.products[j]);
    }

    void two_passes() {
        Sweep s = sweep(0, a_.count, 0, n_);
        const Index element = a_.dtype == Dtype::float32 ? sizeof(float) : sizeof(double);
        s.block = static_cast<const char*>(a_.block) + i_ * a_.block_batch_stride * element;
        s.block_stride = a_.block_count_stride;
        s.dtype = a_.dtype;
        s.norms = true;
        s.multiply = n_ > 0;
        run(s);
        take_norms(memory_.norms);
        for (Index j = 0; j < a_.count; ++j) {
            memory_.tolerance[j] = kRounding * memory_.norms[j];
            memory_.before[j] = memory_.norms[j];
        }
        if (n_ == 0) return;
        s.block = nullptr;
        s.coefficients = memory_.products + a_.count;
        for (const bool again : {true, false}) {
            for (Index k = 0; k < n_ * a_.count; ++k) coefficients_[k] += s.coefficients[k];
            s.multiply = again;
            // There is time to fetch the basis that this thread will probably see next.
            const Index ahead = a_.threads > 1 ? a_.threads : 1;
            if (!again && i_ + ahead < a_.batch) s.next = ahead * a_.rows * a_.size;
            run(s);
            take_norms(again ? memory_.before : memory_.norms);
        }
    }

    // Passes of column j over the `count` rows of the basis from `row` on; what is left of its norm.
    double passes(Index j, Index row, Index count, int times) {
        Sweep s = sweep(j, 1, row, count);
        s.multiply = true;
        run(s);
        const double* const products = memory_.products + 1;
        s.coefficients = products;
        for (; times > 0; --times) {
            for (Index m = 0; m < count; ++m) {
                double& coefficient =
                    row + m < n_ ? coefficients_[(row + m) * a_.count + j] : triangle_[(row + m - n_) * a_.count + j];
                coefficient += products[m];
            }
            s.multiply = times > 1;
            s.norms = times == 1;
            run(s);
        }
        return __builtin_sqrt(memory_.products[0]);
    }

    void add_column(Index j) {
        // A column that the second pass shortened, or that the new rows shorten, goes through whole passes again.
        double norm = memory_.norms[j], left = norm;
        bool again = norm < kKept * memory_.before[j];
        if (rank_ > 0) left = passes(j, n_, rank_, 2);
        // Written so that NaN decides as it does in the reference.
        const double least = memory_.tolerance[j] > a_.floor[i_] ? memory_.tolerance[j] : a_.floor[i_];
        for (int k = 0; k < kMostPasses; ++k) {
            if (left <= least || !(again || left < kKept * norm)) break;
            again = false;
            norm = left;
            left = passes(j, 0, n_ + rank_, 1);
        }
        if (left <= least || n_ + rank_ >= a_.limit) {
            dropped_[j] = left;
            return;
        }
        // A norm is the root of a number, so its inverse is finite.
        double* const row = basis_ + (n_ + rank_) * a_.size;
        for (Index begin = 0; begin < a_.size; begin += kChunk)
            scale(row + begin, memory_.vectors + begin * a_.count + j * kChunk, 1 / left,
                  begin + kChunk < a_.size ? kChunk : a_.size - begin);
        triangle_[rank_ * a_.count + j] = left;
        ++rank_;
    }

    const Arguments& a_;
    const Memory memory_;
    const int threads_;
    const Index i_, n_;
    double *const basis_, *const coefficients_, *const triangle_, *const dropped_;
    Index rank_ = 0;
    bool backwards_ = false;
};

// The sizes of a problem's memory, in numbers.
struct Plan {
    const Arguments& arguments;
    const Scratch& scratch;
    Index vectors, partial, products;

    Memory memory(int slot) const {
        double* const all = static_cast<double*>(scratch.slot(slot));
        double* const norms = all + vectors + partial + products;
        const Index count = arguments.count;
        return {all, all + vectors, all + vectors + partial, norms, norms + count, norms + 2 * count};
    }
};

void do_problem(const void* job, Index i, int slot) noexcept {
    const Plan& plan = *static_cast<const Plan*>(job);
    Problem(plan.arguments, i, plan.memory(slot), 1).grow();
}

}  // namespace

void grow_basis(const Arguments& a) {
    const Index chunks = (a.size + kChunk - 1) / kChunk;
    const Index vectors = chunks * a.count * kChunk, products = (1 + a.limit) * a.count, partial = chunks * products;
    const Index needed = vectors + partial + products + 3 * a.count;
    // Threads share the work of one problem where there are too few of them, and they are large.
    const bool together = 2 * a.batch <= a.threads && a.limit * a.count * a.size >= kParallelWork;
    const int slots = together || a.threads < 1                 ? 1
                      : a.batch < static_cast<Index>(a.threads) ? static_cast<int>(a.batch > 0 ? a.batch : 1)
                                                                : a.threads;
    const Scratch scratch(slots, needed * static_cast<Index>(sizeof(double)));
    const Plan plan{a, scratch, vectors, partial, products};
    if (together)
        for (Index i = 0; i < a.batch; ++i) Problem(a, i, plan.memory(0), a.threads).grow();
    else
        parallel_for(a.batch, slots, do_problem, &plan);
}

}  // namespace sharpcore::SHARPCORE_ISA
