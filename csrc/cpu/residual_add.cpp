// Sum of two operands of which one, or both, lie transposed to the result: square tiles are turned in registers on
// their way, so that every operand is read once and in whole cache lines.
#include "sharpcore/residual_add.h"

#include "sharpcore/for_vectors.h"
#include "sharpcore/parallel.h"
#include "sharpcore/transpose.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = ResidualAddArguments;

// A matrix of the sum as it lies in memory: entry (r, c) at r * row + c, or at c * row + r where it is transposed.
template <class Storage>
struct Matrix {
    const Storage* data;
    Index row;
};

// A tile of `height` x `width` entries, at most a square of vectors, from (r, c) on; its rows are vectors.
template <bool whole, bool transposed, class Storage>
inline void read_tile(Vec<Compute<Storage>>* tile, Matrix<Storage> from, Index r, Index c, Index height, Index width) {
    using T = Compute<Storage>;
    const Index lines = transposed ? width : height, length = transposed ? height : width;
    const Storage* data = from.data + (transposed ? c * from.row + r : r * from.row + c);
#pragma GCC unroll 16
    for (Index i = 0; i < kLanes<T>; ++i) {
        if constexpr (whole)
            tile[i] = load(data + i * from.row);
        else
            tile[i] = i < lines ? load_partial(data + i * from.row, length) : Vec<T>{};
    }
    if constexpr (transposed) transpose<T>(tile);
}

template <bool whole, bool first_transposed, bool second_transposed, class Storage>
inline void add_tile(Storage* out, Matrix<Storage> first, Matrix<Storage> second, Compute<Storage> scale, Index columns,
                     Index r, Index c, Index height, Index width) {
    using T = Compute<Storage>;
    Vec<T> a[kLanes<T>], b[kLanes<T>];
    read_tile<whole, second_transposed, Storage>(b, second, r, c, height, width);
    read_tile<whole, first_transposed, Storage>(a, first, r, c, height, width);
#pragma GCC unroll 16
    for (Index i = 0; i < kLanes<T>; ++i) {
        Storage* const to = out + (r + i) * columns + c;
        if constexpr (whole)
            store(to, a[i] + scale * b[i]);
        else if (i < height)
            store_partial(to, a[i] + scale * b[i], width);
    }
}

// Rows and columns of a task: in each direction a line of memory is read to its end soon after its start.
constexpr Index kBlock = 64;

struct Work {
    const Arguments& arguments;
    Index row_blocks, column_blocks;
};

template <bool first_transposed, bool second_transposed, class Storage>
void add_block(const void* job, Index task, int) noexcept {
    using T = Compute<Storage>;
    const auto& [a, row_blocks, column_blocks] = *static_cast<const Work*>(job);
    const Index image = task / (row_blocks * column_blocks), k = image / a.batch, n = image % a.batch;
    const Index row = task / column_blocks % row_blocks * kBlock, column = task % column_blocks * kBlock;
    const Index row_end = row + kBlock < a.rows ? row + kBlock : a.rows;
    const Index column_end = column + kBlock < a.columns ? column + kBlock : a.columns;
    const auto matrix = [&, k = k, n = n](const ResidualOperand& operand) {
        return Matrix<Storage>{
            static_cast<const Storage*>(operand.data) + k * operand.count_stride + n * operand.batch_stride,
            operand.transposed ? a.rows : a.columns};
    };
    const Matrix<Storage> first = matrix(a.first), second = matrix(a.second);
    Storage* const out = static_cast<Storage*>(a.out) + k * a.out_count_stride + n * a.out_batch_stride;
    const T scale = static_cast<T>(a.scale);
    for (Index r = row; r < row_end; r += kLanes<T>) {
        for (Index c = column; c < column_end; c += kLanes<T>) {
            const Index height = row_end - r < kLanes<T> ? row_end - r : kLanes<T>;
            const Index width = column_end - c < kLanes<T> ? column_end - c : kLanes<T>;
            if (height == kLanes<T> && width == kLanes<T>)
                add_tile<true, first_transposed, second_transposed>(out, first, second, scale, a.columns, r, c, height,
                                                                    width);
            else
                add_tile<false, first_transposed, second_transposed>(out, first, second, scale, a.columns, r, c, height,
                                                                     width);
        }
    }
}

template <class Storage>
TaskFunction choose_task(const Arguments& a) {
    if (a.first.transposed)
        return a.second.transposed ? add_block<true, true, Storage> : add_block<true, false, Storage>;
    return a.second.transposed ? add_block<false, true, Storage> : add_block<false, false, Storage>;
}

}  // namespace

void residual_add(const Arguments& a) {
    const Work work{a, (a.rows + kBlock - 1) / kBlock, (a.columns + kBlock - 1) / kBlock};
    with_storage(a.dtype, [&](auto one) {
        parallel_for(a.count * a.batch * work.row_blocks * work.column_blocks, a.threads, choose_task<decltype(one)>(a),
                     &work);
    });
}

}  // namespace sharpcore::SHARPCORE_ISA
