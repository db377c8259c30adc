// Entries of vectors moved between lanes: pairs interleaved and taken apart, squares transposed; for kernel sources
// only.
#pragma once

#include <utility>

#include "sharpcore/simd.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHARPCORE_SHUFFLE 1
#endif
#endif

namespace sharpcore::SHARPCORE_ISA {

// The entries of [a | b] at the given places.
template <class T, int... place>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, place...>) {
#ifdef SHARPCORE_SHUFFLE
    return __builtin_shufflevector(a, b, place...);
#else
    constexpr int lanes = sizeof...(place);
    return Vec<T>{(place < lanes ? a[place % lanes] : b[place % lanes])...};
#endif
}

template <bool upper, int... lane>
constexpr auto interleaved_places(std::integer_sequence<int, lane...>) {
    constexpr int lanes = sizeof...(lane), start = upper ? lanes / 2 : 0;
    return std::integer_sequence<int, (start + lane / 2 + lane % 2 * lanes)...>{};
}

template <bool odd, int... lane>
constexpr auto every_other_place(std::integer_sequence<int, lane...>) {
    return std::integer_sequence<int, (2 * lane + odd)...>{};
}

template <class T>
using Lanes = std::make_integer_sequence<int, static_cast<int>(kLanes<T>)>;

// Entries of a and b in turn, those of their lower or upper halves.
template <bool upper, class T>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
    return shuffle<T>(a, b, interleaved_places<upper>(Lanes<T>{}));
}

// The entries of [a | b] with even, or with odd index.
template <bool odd, class T>
inline Vec<T> every_other(Vec<T> a, Vec<T> b) {
    return shuffle<T>(a, b, every_other_place<odd>(Lanes<T>{}));
}

// A square of vectors becomes its transpose: each round interleaves the rows of its upper with those of its lower half.
template <class T>
inline void transpose(Vec<T>* square) {
    constexpr int lanes = static_cast<int>(kLanes<T>);
#pragma GCC unroll 4
    for (int round = 1; round < lanes; round *= 2) {
        Vec<T> turned[lanes];
#pragma GCC unroll 8
        for (int i = 0; i < lanes / 2; ++i) {
            turned[2 * i] = interleave<false, T>(square[i], square[i + lanes / 2]);
            turned[2 * i + 1] = interleave<true, T>(square[i], square[i + lanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = turned[i];
    }
}

}  // namespace sharpcore::SHARPCORE_ISA
