// SiLU(u) = u sigmoid(u) and its derivative on vectors; for kernel sources only.
#pragma once

#include "sharpcore/simd.h"

namespace sharpcore::SHARPCORE_ISA {

template <class T>
struct Sigmoid {
    Vec<T> u;         // the argument, clamped to where exp(-u) and its reciprocal are normal numbers; NaN stays NaN
    Vec<T> negative;  // exp(-u)
    Vec<T> value;     // 1 / (1 + exp(-u))
};

// 1 / x for 1 <= x < 2^127.
inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
    // 14 bits, and one step of Newton's iteration: less than one unit in the last place at half the price of a
    // division.
    typedef float Floats __attribute__((vector_size(64)));
    const Floats guess = __builtin_ia32_rcp14ps512_mask(x, Floats{}, static_cast<unsigned short>(-1));
    return guess + guess * (1.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

inline Vec<double> exp_negative(Vec<double> u) { return exp<double>(-u); }

// 2^f on [-1/2, 1/2]: relative error 1.9e-9 (Remez fit in 50 digits).
constexpr float kExp2[] = {1.0000000005541647f,   0.6931472057371958f,    0.24022646890645522f,   0.05550328777105325f,
                           0.009618488956331182f, 0.0013399931177239738f, 0.00015345812161311629f};

// exp(-u) = 2^n 2^f with the integer n next to -u log2(e) and |f| <= 1/2; n goes into the exponent by an
// integer addition. What log2(e) lacks as a float makes a relative error of 1.4e-8 |u|.
inline Vec<float> exp_negative(Vec<float> u) {
    using C = ExpConstants<float>;
    using Bits = VectorOf<float>::Bits;
    constexpr float log2e = 1.4426950408889634f;
    const Vec<float> shifted = C::shift - u * log2e;
    const Vec<float> f = (C::shift - shifted) - u * log2e;
    Vec<float> sum = broadcast(kExp2[6]);
#pragma GCC unroll 8
    for (int i = 5; i >= 0; --i) sum = sum * f + kExp2[i];
    Bits bits, power;
    std::memcpy(&bits, &sum, sizeof(bits));
    std::memcpy(&power, &shifted, sizeof(power));
    bits += power << C::mantissa;
    std::memcpy(&sum, &bits, sizeof(sum));
    return sum;
}

template <class T>
inline Sigmoid<T> sigmoid(Vec<T> u) {
    u = clamp<T>(u, -ExpConstants<T>::limit, ExpConstants<T>::limit);
    const Vec<T> e = exp_negative(u);
    return {u, e, reciprocal(T(1) + e)};
}

// sigmoid(u) (1 + u sigmoid(-u)); exp(-u) / (1 + exp(-u)) is sigmoid(-u) without cancellation.
template <class T>
inline Vec<T> silu_derivative(Vec<T> argument) {
    const Sigmoid<T> s = sigmoid<T>(argument);
    return s.value * (T(1) + s.u * (s.negative * s.value));
}

}  // namespace sharpcore::SHARPCORE_ISA
