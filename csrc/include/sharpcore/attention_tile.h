// Tiles of attention and the products between them; for kernel sources only.
//
// Rows of one operand lie in the lanes of the vectors and terms of the other are broadcast. So the statistics of a row
// are vectors, nothing is summed across lanes, head sizes need not fill a vector, and the broadcast operand is read
// where it lies, with whatever strides it has, unless its numbers are stored otherwise than they are multiplied.
#pragma once

#include <cstdint>
#include <utility>

#include "sharpcore/attention_tangent.h"
#include "sharpcore/attention_term.h"

namespace sharpcore::SHARPCORE_ISA {

using Index = std::int64_t;

// Vectors side by side in a tile.
constexpr int kAcross = 2;

// Rows in the lanes of a tile.
template <class T>
constexpr Index kTileRows = kAcross * kLanes<T>;

// Accumulators of a product are kDown x kAcross vectors: enough to hide the latency of the multiply-adds, few enough
// to leave registers to the operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDown = 8;
#else
constexpr int kDown = 4;
#endif

template <int number>
struct Constant {
    static constexpr int value = number;
};

// Calls step(first, how many) until 0 ... count - 1 are covered; how many is a compile-time constant, kDown mostly.
template <class Step>
inline void in_steps(Index count, Step step) {
    Index i = 0;
    for (; i + kDown <= count; i += kDown) step(i, Constant<kDown>{});
    if constexpr (kDown > 4) {
        if (i + 4 <= count) {
            step(i, Constant<4>{});
            i += 4;
        }
    }
    if (i + 2 <= count) {
        step(i, Constant<2>{});
        i += 2;
    }
    if (i < count) step(i, Constant<1>{});
}

template <class T, int down>
struct Accumulators {
    Vec<T> at[down][kAcross] = {};

    // at[m] += sum over i of scalars[m * down_stride + i * term_stride] * (row i of `lanes`)
    template <class Term>
    SHARPCORE_INLINE void add_product(const Term* lanes, const Term* scalars, Index down_stride, Index term_stride,
                                      Index terms) {
        for (Index i = 0; i < terms; ++i) {
            Vec<T> row[kAcross];
#pragma GCC unroll 4
            for (int h = 0; h < kAcross; ++h) row[h] = load(lanes + i * kTileRows<T> + h * kLanes<T>);
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                const Term scalar = scalars[m * down_stride + i * term_stride];
#pragma GCC unroll 4
                for (int h = 0; h < kAcross; ++h) at[m][h] = add_term(at[m][h], scalar, row[h]);
            }
        }
    }
};

// A [a0, b0, a1, b1, ...] of the lower (or upper) halves of two vectors.
#if defined(__clang__) || __GNUC__ >= 12
template <class T, bool upper, int... lane>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, lane...>) {
    constexpr int lanes = kLanes<T>;
    return __builtin_shufflevector(a, b, ((upper ? lanes / 2 : 0) + lane / 2 + (lane % 2) * lanes)...);
}
#else
template <class T, bool upper, int... lane>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, lane...>) {
    constexpr int lanes = kLanes<T>;
    return __builtin_shuffle(a, b,
                             typename VectorOf<T>::Bits{((upper ? lanes / 2 : 0) + lane / 2 + (lane % 2) * lanes)...});
}
#endif

// Transposes a square of lanes x lanes entries.
template <class T>
inline void transpose(Vec<T> (&square)[kLanes<T>]) {
    constexpr int lanes = kLanes<T>;
    constexpr auto order = std::make_integer_sequence<int, lanes>{};
#pragma GCC unroll 8
    for (int distance = 1; distance < lanes; distance *= 2) {
        Vec<T> next[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes / 2; ++i) {
            next[2 * i] = interleave<T, false>(square[i], square[i + lanes / 2], order);
            next[2 * i + 1] = interleave<T, true>(square[i], square[i + lanes / 2], order);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = next[i];
    }
}

// load_partial and store_partial of simd.h, in one instruction where there is one.
template <class T>
inline Vec<T> load_first(const T* from, Index count) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return _mm512_maskz_loadu_ps((1u << count) - 1, from);
    else
        return _mm512_maskz_loadu_pd((1u << count) - 1, from);
#else
    return load_partial(from, count);
#endif
}

template <class T>
inline void store_first(T* to, Vec<T> vector, Index count) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(to, (1u << count) - 1, vector);
    else
        _mm512_mask_storeu_pd(to, (1u << count) - 1, vector);
#else
    store_partial(to, vector, count);
#endif
}

inline Vec<float> load_first(const bfloat16* from, Index count) {
#if defined(__AVX512F__)
    bfloat16 lanes[kLanes<float>];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16((1u << count) - 1, from));
    return load(lanes);
#else
    return load_partial(from, count);
#endif
}

inline void store_first(bfloat16* to, Vec<float> vector, Index count) {
#if defined(__AVX512F__)
    bfloat16 rounded[kLanes<float>];
    store(rounded, vector);
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded)));
#else
    store_partial(to, vector, count);
#endif
}

// panel[e][r] = scale * rows[r][e] for e < width, r < kTileRows; zero for r >= count.
template <class T, class Storage>
void pack_panel(T* panel, const Storage* rows, Index row_stride, Index count, Index width, T scale) {
    constexpr Index lanes = kLanes<T>;
    for (Index first = 0; first < kTileRows<T>; first += lanes) {
        for (Index e = 0; e < width; e += lanes) {
            // The last square moves back over the one before it, or is read in part where there is none.
            const Index begin = e + lanes <= width || width < lanes ? e : width - lanes;
            const Storage* corner = rows + first * row_stride + begin;
            Vec<T> square[lanes] = {};
            if (first + lanes <= count && width >= lanes) {
#pragma GCC unroll 16
                for (Index r = 0; r < lanes; ++r) square[r] = scale * load(corner + r * row_stride);
            } else {
                for (Index r = 0; r < lanes && first + r < count; ++r) {
                    const Storage* row = corner + r * row_stride;
                    square[r] = scale * (width < lanes ? load_first(row, width) : load(row));
                }
            }
            transpose<T>(square);
            const Index height = width < lanes ? width : lanes;
            for (Index i = 0; i < height; ++i) store(panel + (begin + i) * kTileRows<T> + first, square[i]);
        }
    }
}

#if defined(__AVX512BF16__)
// panel[e][r] = rows[r][2 e], rows[r][2 e + 1] for e < terms_of(width), zero beyond the width and for r >= count; the
// scale is left to the scores, where it is not rounded to bfloat16.
inline void pack_panel(Pair* panel, const bfloat16* rows, Index row_stride, Index count, Index width, float) {
    constexpr Index lanes = kLanes<float>, tile_rows = kTileRows<float>;
    for (Index first = 0; first < tile_rows; first += lanes) {
        for (Index e = 0; e < width; e += 2 * lanes) {
            const __mmask32 inside = width - e < 2 * lanes ? (1u << (width - e)) - 1 : ~0u;
            Vec<float> square[lanes] = {};
            for (Index r = 0; r < lanes && first + r < count; ++r)
                square[r] =
                    reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_epi16(inside, rows + (first + r) * row_stride + e));
            transpose<float>(square);
            const Index height = terms_of<Pair>(width - e);
            for (Index i = 0; i < lanes && i < height; ++i) store(panel + (e / 2 + i) * tile_rows + first, square[i]);
        }
    }
}
#endif

// Asks for rows that are read, or written, in a while.
template <bool written, class Storage>
void prefetch_rows(const Storage* rows, Index row_stride, Index count, Index width) {
    constexpr Index line = 64 / static_cast<Index>(sizeof(Storage));
    for (Index r = 0; r < count; ++r) {
        const Storage* row = rows + r * row_stride;
        for (Index e = 0; e < width; e += line) __builtin_prefetch(row + e, written, 2);
        if (width > 0) __builtin_prefetch(row + width - 1, written, 2);
    }
}

// Calls write(r, begin, entries, how many) for the rows r < count of a transposed panel[width][kTileRows], piecewise.
template <class T, class Write>
inline void unpack_panel(const T* panel, Index count, Index width, Write write) {
    constexpr Index lanes = kLanes<T>;
    for (Index first = 0; first < count; first += lanes) {
        for (Index e = 0; e < width; e += lanes) {
            const Index begin = e + lanes <= width || width < lanes ? e : width - lanes;
            const Index height = width < lanes ? width : lanes;
            Vec<T> square[lanes] = {};
            if (height == lanes) {
#pragma GCC unroll 16
                for (Index i = 0; i < lanes; ++i) square[i] = load(panel + (begin + i) * kTileRows<T> + first);
            } else {
                for (Index i = 0; i < height; ++i) square[i] = load(panel + (begin + i) * kTileRows<T> + first);
            }
            transpose<T>(square);
            if (first + lanes <= count && height == lanes) {
#pragma GCC unroll 16
                for (Index r = 0; r < lanes; ++r) write(first + r, begin, square[r], lanes);
            } else {
                for (Index r = 0; r < lanes && first + r < count; ++r) write(first + r, begin, square[r], height);
            }
        }
    }
}

// The part of an operand that belongs to one tangent, batch entry and head; or some rows of it as terms.
template <class T>
struct Rows {
    const T* data = nullptr;
    Index stride = 0;

    Rows() = default;
    Rows(const T* first, Index row_stride) : data(first), stride(row_stride) {}
    Rows(const AttentionOperand& operand, Index tangent, Index batch, Index head)
        : data(operand.data == nullptr ? nullptr
                                       : static_cast<const T*>(operand.data) + tangent * operand.count_stride +
                                             batch * operand.batch_stride + head * operand.head_stride),
          stride(operand.row_stride) {}

    const T* row(Index index) const { return data + index * stride; }
    Rows from(Index first) const { return {row(first), stride}; }
};

// Terms of memory that `along_rows` and `down_rows` need for `count` rows: none where they are read where they lie.
template <class Term, class Storage>
constexpr Index terms_in_memory(Index count, Index width) {
    if constexpr (std::is_same_v<Term, Storage>) return 0;
    const Index along = count * terms_of<Term>(width), down = terms_of<Term>(count) * width;
    return along > down ? along : down;
}

// Rows as terms of products that sum along the rows: [count][terms_of(width)].
template <class Term, class Storage>
Rows<Term> along_rows(Term* memory, const Rows<Storage>& rows, Index count, Index width) {
    if constexpr (std::is_same_v<Term, Storage>) {
        return rows;
    } else {
        const Index terms = terms_of<Term>(width);
        for (Index i = 0; i < count; ++i) {
            Term* to = memory + i * terms;
            if constexpr (kPaired<Term>) {
                if (width % 2 != 0) to[terms - 1] = {};
                std::memcpy(static_cast<void*>(to), rows.row(i), static_cast<std::size_t>(width) * sizeof(Storage));
            } else {
                convert(to, rows.row(i), width);
            }
        }
        return {memory, terms};
    }
}

// Rows as terms of products that sum down the rows: [terms_of(count)][width].
template <class Term, class Storage>
Rows<Term> down_rows(Term* memory, const Rows<Storage>& rows, Index count, Index width) {
    if constexpr (kPaired<Term>) {
        for (Index i = 0; i < count; i += 2)
            pair_rows(memory + i / 2 * width, rows.row(i), i + 1 < count ? rows.row(i + 1) : nullptr, width);
        return {memory, width};
    } else {
        return along_rows(memory, rows, count, width);
    }
}

// Up to kTileRows rows of a mask in the lanes, `count` entries of each: tile[i][lane], zero beyond `lanes`. The mask is
// `mask.data` from its entry `first` on.
template <class T>
void fill_mask(T* tile, const AttentionMask& mask, Index first, Index lane_stride, Index lanes, Index stride,
               Index count) {
    const auto fill = [&](auto read) {
        for (Index i = 0; i < count; ++i)
            for (Index lane = 0; lane < kTileRows<T>; ++lane)
                tile[i * kTileRows<T> + lane] = lane < lanes ? read(first + lane * lane_stride + i * stride) : T(0);
    };
    constexpr T left_out = -static_cast<T>(__builtin_inf());
    if (mask.dtype == MaskDtype::boolean)
        fill([&](Index at) { return static_cast<const std::uint8_t*>(mask.data)[at] != 0 ? T(0) : left_out; });
    else if (mask.dtype == MaskDtype::bfloat16)
        fill([&](Index at) { return static_cast<T>(to_float(static_cast<const bfloat16*>(mask.data)[at])); });
    else
        fill([&](Index at) { return static_cast<const T*>(mask.data)[at]; });
}

// Whether scores are natural logarithms, or powers of two. Those of pairs are multiplied by the scale afterwards, since
// before it would round them; log2(e) can be part of it. Not with a mask: log2(e) times the most negative number is
// infinite.
template <class Term, bool masked>
constexpr bool kNatural = masked || !kPaired<Term>;

// What rows of a panel, scores and log-sum-exps are multiplied by for that.
template <class Term>
struct Scaling {
    using T = Compute<Term>;
    T panel, score, shift;

    Scaling(double scale, bool masked)
        : panel(static_cast<T>(kPaired<Term> ? 1.0 : scale)),
          score(static_cast<T>(!kPaired<Term> ? 1.0
                               : masked       ? scale
                                              : scale * kLog2e)),
          shift(static_cast<T>(masked || !kPaired<Term> ? 1.0 : kLog2e)) {}

    // What is subtracted from the scores of a row: its log-sum-exp. That of a row without any admissible key is -inf,
    // as are its scores, and its probabilities are zero.
    T shift_of(T lse) const { return lse == -static_cast<T>(__builtin_inf()) ? T(0) : lse * shift; }
};

// Calls take(i, h, P) with P[n] = exp(scale panel^T rows[i + n] - shift) for the vector h of the lanes, the shift
// belonging to the lanes or to the rows; with `masked` the tile holds the mask.
template <bool masked, bool shift_of_lanes, class Term, class T, class Take>
void for_probabilities(const T* tile, const Term* panel, const Scaling<Term>& scaling, const T* shift,
                       const Rows<Term>& rows, Index count, Index terms, Take take) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        constexpr int together = down < 4 ? down : 4;
        Accumulators<T, down> score;
        score.add_product(panel, rows.row(i), rows.stride, 1, terms);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
#pragma GCC unroll 16
            for (int m = 0; m < down; m += together) {
                Vec<T> x[together];
#pragma GCC unroll 16
                for (int n = 0; n < together; ++n) {
                    x[n] = score.at[m + n][h];
                    if constexpr (kPaired<Term>) x[n] *= scaling.score;
                    if constexpr (masked) x[n] += load(tile + (i + m + n) * kTileRows<T> + h * kLanes<T>);
                    if constexpr (shift_of_lanes)
                        x[n] -= load(shift + h * kLanes<T>);
                    else
                        x[n] -= shift[i + m + n];
                }
                power_or_zero<PowerOf<Term>, kNatural<Term, masked>, T>(x);
                take(i + m, h, x);
            }
        }
    });
}

// Stores the same lanes of n successive rows of a tile as terms of a product down the rows; the rows of the last pair
// may be one.
template <class T, int n>
SHARPCORE_INLINE void store_terms(T* tile, const Vec<T> (&rows)[n]) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store(tile + i * kTileRows<T>, rows[i]);
}

#if defined(__AVX512BF16__)
template <int n>
SHARPCORE_INLINE void store_terms(Pair* tile, const Vec<float> (&rows)[n]) {
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2)
        store(tile + i / 2 * kTileRows<float>, paired(rows[i], i + 1 < n ? rows[i + 1] : Vec<float>{}));
}
#endif

// panel[j] += sum over i < terms of tile[i] rows[i][j], for one tile and its rows or for two.
template <bool one, bool two, class T, class Term>
void add_products(T* panel, const Term* tile, const Rows<Term>& rows, const Term* second_tile,
                  const Rows<Term>& second_rows, Index terms, Index width) {
    in_steps(width, [&](Index j, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> sum;
        if constexpr (one) sum.add_product(tile, rows.data + j, 1, rows.stride, terms);
        if constexpr (two) sum.add_product(second_tile, second_rows.data + j, 1, second_rows.stride, terms);
#pragma GCC unroll 16
        for (int m = 0; m < down; ++m) {
#pragma GCC unroll 4
            for (int h = 0; h < kAcross; ++h) {
                T* place = panel + (j + m) * kTileRows<T> + h * kLanes<T>;
                store(place, load(place) + sum.at[m][h]);
            }
        }
    });
}

// panel[j] += sum over i < terms of tile[i] rows[i][j]
template <class T, class Term>
void add_product(T* panel, const Term* tile, const Rows<Term>& rows, Index terms, Index width) {
    add_products<true, false>(panel, tile, rows, tile, rows, terms, width);
}

}  // namespace sharpcore::SHARPCORE_ISA
