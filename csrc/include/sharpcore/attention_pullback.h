// What the two kinds of tasks of attention_adjoint have in common: operands, P and dS of a block, rows in and out; for
// kernel sources only.
#pragma once

#include "sharpcore/attention_adjoint.h"
#include "sharpcore/attention_tile.h"

namespace sharpcore::SHARPCORE_ISA {

// A [size, E] operand has so many tiles.
template <class T>
constexpr Index tiles_of(Index size) {
    return (size + kTileRows<T> - 1) / kTileRows<T>;
}

// The part of the arguments that belongs to one batch entry, one head and some cotangents.
template <class N>
struct Part {
    using T = typename N::T;
    using Storage = typename N::Storage;

    const AttentionAdjointArguments& arguments;
    Index batch, head, first_cotangent, cotangents;

    Rows<Storage> primal(const AttentionOperand& operand) const { return {operand, 0, batch, head}; }
    Rows<Storage> vectors(const AttentionOperand& operand, Index index) const {
        return {operand, first_cotangent + index, batch, head};
    }
    Scaling<typename N::Term> scaling() const {
        return {arguments.primal.scale, arguments.primal.mask.data != nullptr};
    }
    T lse(Index row) const {
        const AttentionPrimal& p = arguments.primal;
        return static_cast<const T*>(
            p.lse)[batch * p.lse_batch_stride + head * p.lse_head_stride + row * p.lse_row_stride];
    }
    // The entry of the mask that belongs to a row and a key.
    Index mask(Index row, Index key) const {
        const AttentionMask& m = arguments.primal.mask;
        return batch * m.batch_stride + head * m.head_stride + row * m.row_stride + key * m.key_stride;
    }
};

// sums[r] = sum over j of a[first + r][j] b[first + r][j] for r < count
template <class T, class Storage>
void row_products(T* sums, const Rows<Storage>& a, const Rows<Storage>& b, Index first, Index count, Index width) {
    constexpr Index lanes = kLanes<T>;
    for (Index start = 0; start < count; start += lanes) {
        Vec<T> square[lanes] = {};
        for (Index r = 0; r < lanes && start + r < count; ++r) {
            const Storage *left = a.row(first + start + r), *right = b.row(first + start + r);
            Index j = 0;
            for (; j + lanes <= width; j += lanes) square[r] += load(left + j) * load(right + j);
            if (j < width) square[r] += load_first(left + j, width - j) * load_first(right + j, width - j);
        }
        transpose<T>(square);
        Vec<T> sum = square[0];
        for (Index i = 1; i < lanes; ++i) sum += square[i];
        if (start + lanes <= count)
            store(sums + start, sum);
        else
            store_first(sums + start, sum, count - start);
    }
}

// change[i] = P[i] * (panel^T rows[i] - shift), the shift belonging to the lanes or to the rows, as terms of products
// down the rows; with `keep` as numbers in `kept`, too.
template <bool shift_of_lanes, bool keep, class Term, class T>
void fill_change(Term* change, T* kept, const T* probability, const Term* panel, const T* shift, const Rows<Term>& rows,
                 Index count, Index terms) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> product;
        product.add_product(panel, rows.row(i), rows.stride, 1, terms);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> x[down];
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                x[m] = product.at[m][h];
                if constexpr (shift_of_lanes)
                    x[m] -= load(shift + h * kLanes<T>);
                else
                    x[m] -= shift[i + m];
                x[m] *= load(probability + (i + m) * kTileRows<T> + h * kLanes<T>);
            }
            store_terms(change + terms_of<Term>(i) * kTileRows<T> + h * kLanes<T>, x);
            if constexpr (keep && kPaired<Term>) store_terms(kept + i * kTileRows<T> + h * kLanes<T>, x);
        }
    });
}

// P of a block in `probability`, and as terms of products down the rows in `probabilities` where that is not the same.
template <bool shift_of_lanes, class N>
void fill_probabilities(typename N::T* probability, typename N::Term* probabilities, const typename N::Term* panel,
                        const Part<N>& part, Index mask, Index lane_stride, Index lanes, Index stride,
                        const typename N::T* shift, const Rows<typename N::Term>& rows, Index count) {
    using T = typename N::T;
    using Term = typename N::Term;
    const AttentionPrimal& p = part.arguments.primal;
    const auto take = [&](Index i, int h, const auto& x) {
        store_terms(probability + i * kTileRows<T> + h * kLanes<T>, x);
        if constexpr (kPaired<Term>)
            if (probabilities != nullptr)
                store_terms(probabilities + terms_of<Term>(i) * kTileRows<T> + h * kLanes<T>, x);
    };
    const Index terms = terms_of<Term>(p.width);
    if (p.mask.data != nullptr) {
        fill_mask(probability, p.mask, mask, lane_stride, lanes, stride, count);
        for_probabilities<true, shift_of_lanes>(probability, panel, part.scaling(), shift, rows, count, terms, take);
    } else {
        for_probabilities<false, shift_of_lanes>(probability, panel, part.scaling(), shift, rows, count, terms, take);
    }
}

// to[lane][i] = from[i][lane] for i < kTileRows.
template <class T>
void transpose_tile(T* to, const T* from) {
    constexpr Index lanes = kLanes<T>;
    for (Index down = 0; down < kTileRows<T>; down += lanes) {
        for (Index across = 0; across < kTileRows<T>; across += lanes) {
            Vec<T> square[lanes];
            for (Index i = 0; i < lanes; ++i) square[i] = load(from + (down + i) * kTileRows<T> + across);
            transpose<T>(square);
            for (Index i = 0; i < lanes; ++i) store(to + (across + i) * kTileRows<T> + down, square[i]);
        }
    }
}

// rows[first + r] = factor * column r of the panel, for r < count
template <class T, class Storage>
void write_panel(const Rows<Storage>& rows, const T* panel, Index first, Index count, Index width, T factor) {
    unpack_panel(panel, count, width, [&](Index r, Index begin, Vec<T> entries, Index how_many) {
        Storage* place = const_cast<Storage*>(rows.row(first + r)) + begin;
        if (how_many == kLanes<T>)
            store(place, factor * entries);
        else
            store_first(place, factor * entries, how_many);
    });
}

template <class T>
void clear(T* panels, Index count) {
    for (Index i = 0; i < count * kTileRows<T>; ++i) panels[i] = 0;
}

}  // namespace sharpcore::SHARPCORE_ISA
