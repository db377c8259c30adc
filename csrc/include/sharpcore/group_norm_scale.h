// The factor by which GroupNorm and SiLU multiply a vector, scale = act'(u) weight rstd, and the means that they take
// out of it; for the sources of their derivatives only.
#pragma once

#include "sharpcore/silu.h"
#include "sharpcore/sweep.h"

namespace sharpcore::SHARPCORE_ISA {

using Index = std::int64_t;

// Vectors that pass together, and share what is read of x and the scale.
constexpr int kTile = 2;

// Terms that are added up in T before they go into a double keep float sums as exact as pairwise ones. Their number
// does not depend on the tile, so a vector's result does not depend on its neighbours.

// What a sweep does with the scale: computes it, computes and keeps it, reads what was kept, or computes it while
// memory is waited for, in rows that are fetched ahead as no cache holds their block.
enum class Scale { compute, keep, read, compute_afar };

// Cotangents need the scale in the first sweep, which keeps it for the second one.
template <bool adjoint>
constexpr Scale mode_of_sums(Scale mode) {
    return adjoint && mode == Scale::compute ? Scale::keep : mode;
}

template <bool adjoint>
constexpr Scale mode_of_write(Scale mode) {
    return adjoint && mode != Scale::compute_afar ? Scale::read : mode;
}

// Calls sweep(constant of the mode) for a mode that is known when the program runs.
template <Scale mode>
struct Mode {
    static constexpr Scale value = mode;
};

template <bool silu, class Sweep>
inline void with_mode(Scale mode, Sweep sweep) {
    if (mode == Scale::compute_afar)
        sweep(Mode<Scale::compute_afar>{});
    else if (!silu || mode == Scale::compute)
        sweep(Mode<Scale::compute>{});
    else if (mode == Scale::keep)
        sweep(Mode<silu ? Scale::keep : Scale::compute>{});
    else
        sweep(Mode<silu ? Scale::read : Scale::compute>{});
}

// Whether the results of this storage type may be stored past the cache.
template <class S>
constexpr bool kStreams = false;
template <>
constexpr bool kStreams<float> = kCanStream;

// What the sums of a group come to: the mean of v, and that of v xhat times rstd, as x - mean lacks it.
template <class T>
struct Means {
    T offset, slope;

    Means(double sum, double product, Index size, T rstd)
        : offset(static_cast<T>(sum / static_cast<double>(size))),
          slope(static_cast<T>(product / static_cast<double>(size) * rstd * rstd)) {}
};

template <bool adjoint, class T>
inline Vec<T> result_of(Vec<T> v, Vec<T> centred, Vec<T> scale, Vec<T> offset, Vec<T> slope) {
    if constexpr (adjoint) return scale * v - offset - centred * slope;
    return scale * (v - offset - centred * slope);
}

// What a channel's scale is made from: gain = weight rstd, and the argument of SiLU, u = gain (x - mean) + bias, as the
// exponent -u log2(e) = rate (x - mean) + start. An infinite or undefined bias makes the gain undefined, and with it
// the scale, which a bound on the exponent would hide.
template <class T>
struct Factors {
    T gain, rate, start;

    template <bool silu>
    static Factors of(T weight, T rstd, T bias) {
        const T gain = weight * rstd;
        return {silu ? gain + (bias - bias) : gain, gain * kExponentRate<T>, bias * kExponentRate<T>};
    }
};

// The scale at one vector of x - mean.
template <bool silu, Scale mode, class T, class Access>
inline Vec<T> scale_at(Access access, T* kept, Vec<T> centred, Vec<T> gain, Vec<T> rate, Vec<T> start) {
    if constexpr (!silu) return gain;
    if constexpr (mode == Scale::read) return access.read(kept);
    const Vec<T> scale = silu_derivative_at<T>(rate * centred + start) * gain;
    if constexpr (mode == Scale::keep) access.write(kept, scale);
    return scale;
}

}  // namespace sharpcore::SHARPCORE_ISA
