// Tiles of attention and the products between them; for kernel sources only.
//
// Rows of one operand lie in the lanes of the vectors and entries of the other are broadcast. So the statistics of a
// row are vectors, nothing is summed across lanes, head sizes need not fill a vector, and the broadcast operand is read
// where it lies, with whatever strides it has.
#pragma once

#include <cstdint>
#include <utility>

#include "sharpcore/attention_tangent.h"
#include "sharpcore/simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// For functions whose vectors must stay in registers: those of the innermost loops.
#define SHARPCORE_INLINE inline __attribute__((always_inline))

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
    SHARPCORE_INLINE void add_product(const T* lanes, const T* scalars, Index down_stride, Index term_stride,
                                      Index terms) {
        for (Index i = 0; i < terms; ++i) {
            Vec<T> row[kAcross];
#pragma GCC unroll 4
            for (int h = 0; h < kAcross; ++h) row[h] = load(lanes + i * kTileRows<T> + h * kLanes<T>);
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                const T scalar = scalars[m * down_stride + i * term_stride];
#pragma GCC unroll 4
                for (int h = 0; h < kAcross; ++h) at[m][h] += scalar * row[h];
            }
        }
    }
};

// max(x, low), NaN where x is NaN.
template <class T>
inline Vec<T> at_least(Vec<T> x, T low) {
#if defined(__AVX512F__)
    // One instruction; the comparison below becomes two. GCC warns of the unmasked intrinsic.
    if constexpr (sizeof(T) == 4)
        return _mm512_mask_max_ps(x, 0xffff, broadcast(low), x);
    else
        return _mm512_mask_max_pd(x, 0xff, broadcast(low), x);
#else
    return x < low ? broadcast(low) : x;
#endif
}

// What exp_or_zero needs of a type: the power that becomes zero, and a polynomial for 2^r on [-1/2, 1/2]: minimax of
// relative error 2.6e-9 in float, Taylor's in double, ln(2)^i / i!.
template <class T>
struct PowerConstants;

template <>
struct PowerConstants<float> {
    static constexpr float low = -88.2f;
    static constexpr int degree = 6;
    static constexpr float coefficients[] = {1.0f,           0x1.62e432p-1f,  0x1.ebfbe2p-3f, 0x1.c6ae72p-5f,
                                             0x1.3b270ep-7f, 0x1.5f7276p-10f, 0x1.470b4ap-13f};
};

template <>
struct PowerConstants<double> {
    static constexpr double low = -709.2;
    static constexpr int degree = 13;
    static constexpr double coefficients[] = {0x1.0000000000000p+0,  0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,
                                              0x1.c6b08d704a0c0p-5,  0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6731p-10,
                                              0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
                                              0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32,
                                              0x1.c3bd650fc2986p-36, 0x1.816193166d0f9p-40};
};

// x = exp(x), zero where x < -87.7 (float) or -708.7 (double); for x below 88 or 709. Several vectors at once, step by
// step, hide the latency of the steps.
template <class T, int n>
SHARPCORE_INLINE void exp_or_zero(Vec<T> (&x)[n]) {
    using C = ExpConstants<T>;
    using P = PowerConstants<T>;
    using Bits = typename VectorOf<T>::Bits;
    constexpr T log2e = static_cast<T>(1.4426950408889634);
    Vec<T> shifted[n], sum[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = at_least<T>(x[i], P::low);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) shifted[i] = x[i] * log2e + C::shift;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = x[i] * log2e - (shifted[i] - C::shift);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) sum[i] = P::coefficients[P::degree] * x[i] + P::coefficients[P::degree - 1];
#pragma GCC unroll 16
    for (int term = P::degree - 2; term >= 0; --term)
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) sum[i] = sum[i] * x[i] + P::coefficients[term];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
        Bits power;
        std::memcpy(&power, &shifted[i], sizeof(power));
        power = (power << C::mantissa) + C::one;
        Vec<T> scale;
        std::memcpy(&scale, &power, sizeof(scale));
        x[i] = sum[i] * scale;
    }
}

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

// panel[e][r] = scale * rows[r][e] for e < width, r < kTileRows; zero for r >= count.
template <class T>
void pack_panel(T* panel, const T* rows, Index row_stride, Index count, Index width, T scale) {
    constexpr Index lanes = kLanes<T>;
    for (Index first = 0; first < kTileRows<T>; first += lanes) {
        for (Index e = 0; e < width; e += lanes) {
            // The last square moves back over the one before it, or is read in part where there is none.
            const Index begin = e + lanes <= width || width < lanes ? e : width - lanes;
            Vec<T> square[lanes] = {};
            for (Index r = 0; r < lanes && first + r < count; ++r) {
                const T* row = rows + (first + r) * row_stride + begin;
                square[r] = scale * (width < lanes ? load_partial(row, width) : load(row));
            }
            transpose<T>(square);
            const Index height = width < lanes ? width : lanes;
            for (Index i = 0; i < height; ++i) store(panel + (begin + i) * kTileRows<T> + first, square[i]);
        }
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
            for (Index i = 0; i < height; ++i) square[i] = load(panel + (begin + i) * kTileRows<T> + first);
            transpose<T>(square);
            for (Index r = 0; r < lanes && first + r < count; ++r) write(first + r, begin, square[r], height);
        }
    }
}

// The part of an operand that belongs to one tangent, batch entry and head.
template <class T>
struct Rows {
    const T* data;
    Index stride;

    Rows(const AttentionOperand& operand, Index tangent, Index batch, Index head)
        : data(operand.data == nullptr ? nullptr
                                       : static_cast<const T*>(operand.data) + tangent * operand.count_stride +
                                             batch * operand.batch_stride + head * operand.head_stride),
          stride(operand.row_stride) {}

    const T* row(Index index) const { return data + index * stride; }
};

// Up to kTileRows rows of a mask in the lanes, `count` entries of each: tile[i][lane], zero beyond `lanes`.
template <class T>
void fill_mask(T* tile, const T* mask, Index lane_stride, Index lanes, Index stride, Index count) {
    for (Index i = 0; i < count; ++i)
        for (Index lane = 0; lane < kTileRows<T>; ++lane)
            tile[i * kTileRows<T> + lane] = lane < lanes ? mask[lane * lane_stride + i * stride] : T(0);
}

// What is subtracted from the scores of a row: its log-sum-exp. That of a row without any admissible key is -inf, as
// are its scores, and its probabilities are zero.
template <class T>
inline T shift_of(T lse) {
    return lse == -static_cast<T>(__builtin_inf()) ? T(0) : lse;
}

// tile[i] = exp(panel^T rows[first + i] - shift), the shift belonging to the lanes or to the rows; with `masked` the
// tile holds the mask before.
template <bool masked, bool shift_of_lanes, class T>
void fill_probability(T* tile, const T* panel, const T* shift, const Rows<T>& rows, Index first, Index count,
                      Index width) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        constexpr int together = down < 4 ? down : 4;
        Accumulators<T, down> score;
        score.add_product(panel, rows.row(first + i), rows.stride, 1, width);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
#pragma GCC unroll 16
            for (int m = 0; m < down; m += together) {
                T* place = tile + (i + m) * kTileRows<T> + h * kLanes<T>;
                Vec<T> x[together];
#pragma GCC unroll 16
                for (int n = 0; n < together; ++n) {
                    x[n] = score.at[m + n][h];
                    if constexpr (masked) x[n] += load(place + n * kTileRows<T>);
                    if constexpr (shift_of_lanes)
                        x[n] -= load(shift + h * kLanes<T>);
                    else
                        x[n] -= shift[i + m + n];
                }
                exp_or_zero<T>(x);
#pragma GCC unroll 16
                for (int n = 0; n < together; ++n) store(place + n * kTileRows<T>, x[n]);
            }
        }
    });
}

// panel[j] += sum over i < count of tile[i] rows[first + i][j], for one tile and its rows or for two.
template <bool one, bool two, class T>
void add_products(T* panel, const T* tile, const Rows<T>& rows, const T* second_tile, const Rows<T>& second_rows,
                  Index first, Index count, Index width) {
    in_steps(width, [&](Index j, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> sum;
        if constexpr (one) sum.add_product(tile, rows.row(first) + j, 1, rows.stride, count);
        if constexpr (two) sum.add_product(second_tile, second_rows.row(first) + j, 1, second_rows.stride, count);
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

// panel[j] += sum over i < count of tile[i] rows[first + i][j]
template <class T>
void add_product(T* panel, const T* tile, const Rows<T>& rows, Index first, Index count, Index width) {
    add_products<true, false>(panel, tile, rows, tile, rows, first, count, width);
}

// Most tiles of a task that are worked on together: they share what a block of the other operand costs to bring into
// the cache.
constexpr Index kTiles = 8;

// Rows of the other operand in a block, a multiple of every kTileRows: a tile of so many rows fits into the first-level
// cache beside the panels of small heads.
constexpr Index kBlock = 64;

// Scratch memory of a thread is at most about this, or what one tile and one tangent need: so it depends on the head
// size and not on how many rows or keys there are.
constexpr Index kScratchBytes = 512 * 1024;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

// How the work is shared out: a task has some tiles of one head, a group, and some of the tangents, a split.
struct Shares {
    Index heads, groups, splits;
    Index tiles;       // of a group
    Index tangents;    // of a split, at most
    bool whole_heads;  // a task has all groups of its head

    Index tasks() const { return heads * (whole_heads ? 1 : groups) * splits; }
};

// `bytes(tiles, tangents)` is the scratch memory of a task. How tangents are split changes no result: each is computed
// by itself.
template <class Bytes>
Shares share_out(Index heads, Index tiles, Index count, int threads, Bytes bytes, bool whole_heads = false,
                 Index least_splits = 1) {
    Shares shares{heads, 1, least_splits, 1, 1, whole_heads};
    const auto update = [&] {
        shares.groups = (tiles + shares.tiles - 1) / shares.tiles;
        shares.tangents = (count + shares.splits - 1) / shares.splits;
    };
    const auto too_few = [&] { return threads > 1 && shares.tasks() < kTasksPerThread * threads; };
    for (update(); shares.splits < count && bytes(1, shares.tangents) > kScratchBytes; update()) ++shares.splits;
    while (shares.tiles < kTiles && shares.tiles < tiles && bytes(shares.tiles + 1, shares.tangents) <= kScratchBytes)
        ++shares.tiles;
    for (update(); too_few() && !whole_heads && shares.tiles > 1; update()) --shares.tiles;
    for (; too_few() && shares.splits < count; update()) ++shares.splits;
    shares.tiles = (tiles + shares.groups - 1) / shares.groups;
    return shares;
}

}  // namespace sharpcore::SHARPCORE_ISA
