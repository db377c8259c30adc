// The sigmoid and the derivative of SiLU(u) = u sigmoid(u) on vectors, as functions of z = -u log2(e): exp(-u) is 2^z.
// For kernel sources only.
#pragma once

#include "sharpcore/simd.h"

namespace sharpcore::SHARPCORE_ISA {

// z / u
template <class T>
constexpr T kExponentRate = static_cast<T>(-1.4426950408889634);

// Where 2^z and 1 / (1 + 2^z) are normal numbers, z is at most this on either side.
template <class T>
constexpr T kExponentLimit = sizeof(T) == 4 ? T(126) : T(1021);

// z within those limits; NaN becomes one of them, so who needs it brings it in otherwise. As integers positive numbers
// are in order, and as unsigned ones negative numbers are: comparing those leaves the units that multiply to others.
template <class T>
inline Vec<T> bounded(Vec<T> z) {
    using Unsigned = typename VectorOf<T>::Bits;
    using Signed = typename VectorOf<T>::SignedBits;
    const Vec<T> highest = broadcast(kExponentLimit<T>), lowest = broadcast(-kExponentLimit<T>);
    Signed bits, most;
    std::memcpy(&bits, &z, sizeof(bits));
    std::memcpy(&most, &highest, sizeof(most));
    bits = bits < most ? bits : most;
    Unsigned clamped, least;
    std::memcpy(&clamped, &bits, sizeof(clamped));
    std::memcpy(&least, &lowest, sizeof(least));
    clamped = clamped < least ? clamped : least;
    std::memcpy(&z, &clamped, sizeof(z));
    return z;
}

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

constexpr double kNaturalOfTwo = 0.6931471805599453;

inline Vec<double> power_of_two(Vec<double> z) { return exp<double>(z * kNaturalOfTwo); }

// 2^f on [-1/2, 1/2], 1 at 0: relative error 1.1e-7, of which less than a third comes out in the derivative of SiLU.
constexpr float kPowerOfTwo[] = {1.0f, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b754p-5f, 0x1.3cea84p-7f, 0x1.5bb93cp-10f};

// 2^z = 2^n 2^f with the integer n next to z; n goes into the exponent by an integer addition.
inline Vec<float> power_of_two(Vec<float> z) {
    using C = ExpConstants<float>;
    using Bits = VectorOf<float>::Bits;
    const Vec<float> shifted = z + C::shift;
    const Vec<float> f = z - (shifted - C::shift);
    Vec<float> sum = broadcast(kPowerOfTwo[5]);
#pragma GCC unroll 8
    for (int i = 4; i >= 0; --i) sum = sum * f + kPowerOfTwo[i];
    Bits bits, power;
    std::memcpy(&bits, &sum, sizeof(bits));
    std::memcpy(&power, &shifted, sizeof(power));
    bits += power << C::mantissa;
    std::memcpy(&sum, &bits, sizeof(sum));
    return sum;
}

// sigmoid(u), a number for NaN.
template <class T>
inline Vec<T> sigmoid_at(Vec<T> z) {
    return reciprocal(T(1) + power_of_two(bounded<T>(z)));
}

// sigmoid(u) (1 + u sigmoid(-u)), a number for NaN; 2^z / (1 + 2^z) is sigmoid(-u) without cancellation.
template <class T>
inline Vec<T> silu_derivative_at(Vec<T> z) {
    z = bounded<T>(z);
    const Vec<T> e = power_of_two(z), s = reciprocal(T(1) + e);
    return s * (T(1) - static_cast<T>(kNaturalOfTwo) * (z * (e * s)));
}

}  // namespace sharpcore::SHARPCORE_ISA
