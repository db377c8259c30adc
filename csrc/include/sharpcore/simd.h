// Vectors as wide as the instruction set being compiled for, and exp on them; for kernel sources only.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef SHARPCORE_ISA
#error "simd.h is for sources that CMake compiles once per instruction set"
#endif

namespace sharpcore::SHARPCORE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef std::int32_t SignedBits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorOf<double> {
    typedef double Type __attribute__((vector_size(kVectorBytes)));
    typedef std::uint64_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef std::int64_t SignedBits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::Type;

template <class T>
constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(T));

template <class T>
inline Vec<T> load(const T* from) {
    Vec<T> vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <class T>
inline void store(T* to, Vec<T> vector) {
    std::memcpy(to, &vector, sizeof(vector));
}

// The first `count` < lanes entries, zeros after them.
template <class T>
inline Vec<T> load_partial(const T* from, std::int64_t count) {
    T lanes[kLanes<T>] = {};
    for (std::int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
}

template <class T>
inline void store_partial(T* to, Vec<T> vector, std::int64_t count) {
    T lanes[kLanes<T>];
    store(lanes, vector);
    for (std::int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// The upper half of a float's bits: a number as it lies in memory. It is computed with as float: loads widen it, stores
// round it to the nearest, ties to even.
struct bfloat16 {
    std::uint16_t bits;
};

template <class Storage>
struct ComputeOf {
    using Type = Storage;
};

template <>
struct ComputeOf<bfloat16> {
    using Type = float;
};

// What numbers that are stored as `Storage` are computed in.
template <class Storage>
using Compute = typename ComputeOf<Storage>::Type;

typedef std::uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<float> load(const bfloat16* from) {
    HalfBits half;
    std::memcpy(&half, from, sizeof(half));
    const auto bits = __builtin_convertvector(half, VectorOf<float>::Bits) << 16;
    Vec<float> vector;
    std::memcpy(&vector, &bits, sizeof(vector));
    return vector;
}

inline void store(bfloat16* to, Vec<float> vector) {
    using Bits = VectorOf<float>::Bits;
    Bits bits;
    std::memcpy(&bits, &vector, sizeof(bits));
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN over to zero
    const HalfBits half = __builtin_convertvector(vector == vector ? rounded : nan, HalfBits);
    std::memcpy(to, &half, sizeof(half));
}

inline Vec<float> load_partial(const bfloat16* from, std::int64_t count) {
    bfloat16 lanes[kLanes<float>] = {};
    for (std::int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
}

inline void store_partial(bfloat16* to, Vec<float> vector, std::int64_t count) {
    bfloat16 lanes[kLanes<float>];
    store(lanes, vector);
    for (std::int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

template <class T>
inline Vec<T> broadcast(T value) {
    return value - Vec<T>{};
}

// NaN stays NaN: every comparison with it is false.
template <class T>
inline Vec<T> clamp(Vec<T> x, T low, T high) {
    x = x < low ? broadcast(low) : x;
    return x > high ? broadcast(high) : x;
}

// What exp needs of a type. Adding `shift` = 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits;
// ln2_high has so few bits that n * ln2_high is exact; the Taylor polynomial of degree `degree` on
// [-ln(2)/2, ln(2)/2] is exact to less than half a unit in the last place.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    static constexpr float shift = 12582912.0f;
    static constexpr float ln2_high = 0x1.62e4p-1f;
    static constexpr float ln2_low = 0x1.7f7d1cp-20f;
    static constexpr float limit = 87.0f;
    static constexpr int degree = 7;
    static constexpr int mantissa = 23;
    static constexpr std::uint32_t one = 0x3f800000u;
};

template <>
struct ExpConstants<double> {
    static constexpr double shift = 6755399441055744.0;
    static constexpr double ln2_high = 0x1.62e42fefa38p-1;
    static constexpr double ln2_low = 0x1.ef35793c7673p-45;
    static constexpr double limit = 708.0;
    static constexpr int degree = 13;
    static constexpr int mantissa = 52;
    static constexpr std::uint64_t one = 0x3ff0000000000000ull;
};

constexpr double kInverseFactorials[] = {
    1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800,
};

// exp(x) for |x| <= ExpConstants<T>::limit, to about one unit in the last place.
template <class T>
inline Vec<T> exp(Vec<T> x) {
    using C = ExpConstants<T>;
    using Bits = typename VectorOf<T>::Bits;
    constexpr T log2e = static_cast<T>(1.4426950408889634);
    const Vec<T> shifted = x * log2e + C::shift;
    const Vec<T> n = shifted - C::shift;
    const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
    Vec<T> sum = broadcast(static_cast<T>(kInverseFactorials[C::degree]));
#pragma GCC unroll 16
    for (int i = C::degree - 1; i >= 0; --i) sum = sum * r + static_cast<T>(kInverseFactorials[i]);
    Bits power;
    std::memcpy(&power, &shifted, sizeof(power));
    power = (power << C::mantissa) + C::one;
    Vec<T> scale;
    std::memcpy(&scale, &power, sizeof(scale));
    return sum * scale;
}

}  // namespace sharpcore::SHARPCORE_ISA
