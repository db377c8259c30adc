// Powers of two, for the probabilities of attention; for kernel sources only.
#pragma once

#include "sharpcore/simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// For functions whose vectors must stay in registers: those of the innermost loops.
#define SHARPCORE_INLINE inline __attribute__((always_inline))

namespace sharpcore::SHARPCORE_ISA {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

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

// What power_or_zero needs of a type: the power that becomes zero, and a polynomial for 2^r on [-1/2, 1/2] that is 1
// at 0: in float minimax of relative error 1.1e-7, in double Taylor's, ln(2)^i / i!.
template <class T>
struct PowerConstants;

template <>
struct PowerConstants<float> {
    static constexpr float low = -127.0f;
    static constexpr int degree = 5;
    static constexpr float coefficients[] = {1.0f,           0x1.62e42ap-1f, 0x1.ebf9bcp-3f,
                                             0x1.c6b754p-5f, 0x1.3cea84p-7f, 0x1.5bb93cp-10f};
};

template <>
struct PowerConstants<double> {
    static constexpr double low = -1023.0;
    static constexpr int degree = 13;
    static constexpr double coefficients[] = {0x1.0000000000000p+0,  0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,
                                              0x1.c6b08d704a0c0p-5,  0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6731p-10,
                                              0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
                                              0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32,
                                              0x1.c3bd650fc2986p-36, 0x1.816193166d0f9p-40};
};

// For results that are rounded to bfloat16: minimax of relative error 2.8e-6, a thousandth of that rounding.
struct ShortPowerConstants {
    static constexpr float low = -127.0f;
    static constexpr int degree = 4;
    static constexpr float coefficients[] = {1.0f, 0x1.62e12cp-1f, 0x1.ec0378p-3f, 0x1.c9fc46p-5f, 0x1.3a02ccp-7f};
};

// x = 2^x, or e^x if `natural`, zero where that is below 2^-126.5 (float) or 2^-1022.5 (double); for results below
// 2^127 or 2^1023. Several vectors at once, step by step, hide the latency of the steps.
template <class P, bool natural, class T, int n>
SHARPCORE_INLINE void power_or_zero(Vec<T> (&x)[n]) {
    using C = ExpConstants<T>;
    using Bits = typename VectorOf<T>::Bits;
    constexpr T unit = static_cast<T>(natural ? kLog2e : 1.0);
    Vec<T> shifted[n], sum[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = at_least<T>(x[i], static_cast<T>(P::low / static_cast<double>(unit)));
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) shifted[i] = x[i] * unit + C::shift;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = x[i] * unit - (shifted[i] - C::shift);
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

}  // namespace sharpcore::SHARPCORE_ISA
