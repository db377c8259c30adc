// What the products of attention are summed from: numbers, or pairs of bfloat16 where the CPU multiplies those; for
// kernel sources only.
#pragma once

#include <type_traits>

#include "sharpcore/attention_power.h"

namespace sharpcore::SHARPCORE_ISA {

// Two bfloat16 that are adjacent along the sum of a product. The instructions take denormals for zeros.
struct Pair {
    bfloat16 first, second;
};

template <>
struct ComputeOf<Pair> {
    using Type = float;
};

template <class Term>
constexpr bool kPaired = std::is_same_v<Term, Pair>;

// So many terms hold `count` numbers.
template <class Term>
constexpr std::int64_t terms_of(std::int64_t count) {
    return kPaired<Term> ? (count + 1) / 2 : count;
}

// Bits only: pairs travel in vectors of floats.
inline Vec<float> load(const Pair* from) { return load(reinterpret_cast<const float*>(from)); }
inline void store(Pair* to, Vec<float> pairs) { store(reinterpret_cast<float*>(to), pairs); }

inline float to_float(bfloat16 number) {
    const std::uint32_t bits = static_cast<std::uint32_t>(number.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

inline void convert(float* to, const bfloat16* from, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kLanes<float> <= count; i += kLanes<float>) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = to_float(from[i]);
}

// pairs[j] = first[j], second[j]; null: zeros
inline void pair_rows(Pair* pairs, const bfloat16* first, const bfloat16* second, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) pairs[j] = {first[j], second == nullptr ? bfloat16{} : second[j]};
}

// sum + scalar * row
template <class T>
SHARPCORE_INLINE Vec<T> add_term(Vec<T> sum, T scalar, Vec<T> row) {
    return sum + scalar * row;
}

#if defined(__AVX512BF16__)

SHARPCORE_INLINE Vec<float> add_pairs(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

SHARPCORE_INLINE Vec<float> add_term(Vec<float> sum, Pair scalar, Vec<float> row) {
    int bits;
    std::memcpy(&bits, &scalar, sizeof(bits));
    return add_pairs(sum, reinterpret_cast<Vec<float>>(_mm512_set1_epi32(bits)), row);
}

// Pairs of the entries of two vectors, rounded to the nearest, ties to even.
SHARPCORE_INLINE Vec<float> paired(Vec<float> first, Vec<float> second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i side_by_side = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    return reinterpret_cast<Vec<float>>(_mm512_permutexvar_epi16(order, side_by_side));
}

// What tensors of `Storage` are multiplied as.
template <class Storage>
using ProductTerm = std::conditional_t<std::is_same_v<Storage, bfloat16>, Pair, Storage>;
template <class Term>
using PowerOf = std::conditional_t<kPaired<Term>, ShortPowerConstants, PowerConstants<Compute<Term>>>;

#else

template <class Storage>
using ProductTerm = Compute<Storage>;
template <class Term>
using PowerOf = PowerConstants<Compute<Term>>;

#endif

// How tensors of `Stored` are worked on: products are summed from `Term`, all else is computed in T.
template <class Stored>
struct Numbers {
    using Storage = Stored;
    using Term = ProductTerm<Storage>;
    using T = Compute<Storage>;
    static_assert(sizeof(Term) == sizeof(T));
};

}  // namespace sharpcore::SHARPCORE_ISA
