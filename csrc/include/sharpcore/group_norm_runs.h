// The two sweeps of GroupNorm's derivative where positions are fastest in memory: a group is one run of its channels.
// For the source of that derivative only.
#pragma once

#include "sharpcore/group_norm_scale.h"

namespace sharpcore::SHARPCORE_ISA {

// Partial sums side by side, and terms of one lane that are added up in T.
constexpr int kStrip = 4;
constexpr Index kTermsPerLane = 32;

// How far ahead lines are asked for that results will go to.
constexpr Index kWriteAheadBytes = 2048;

// Constants of one channel.
template <class T>
struct Channel {
    Vec<T> mean, gain, rate, start;

    Channel(T mean_of_group, const Factors<T>& factors)
        : mean(broadcast(mean_of_group)),
          gain(broadcast(factors.gain)),
          rate(broadcast(factors.rate)),
          start(broadcast(factors.start)) {}
};

template <class T>
struct Totals {
    double sum[kLanes<T>] = {}, product[kLanes<T>] = {};

    Means<T> means(Index size, T rstd) const {
        double all_sum = 0, all_product = 0;
        for (Index lane = 0; lane < kLanes<T>; ++lane) {
            all_sum += sum[lane];
            all_product += product[lane];
        }
        return {all_sum, all_product, size, rstd};
    }
};

// Adds v and v (x - mean), for cotangents scale v and scale v (x - mean), to the totals of each vector of a tile.
template <bool adjoint, bool silu, Scale mode, int tile, class S, class T>
__attribute__((noinline)) void run_sums(Totals<T>* totals, const S* const* vectors, const S* x, T* kept, Index size,
                                        const Channel<T>& channel) {
    Vec<T> sum[tile][kStrip] = {}, product[tile][kStrip] = {};
    const S* v[tile];
    for (int t = 0; t < tile; ++t) v[t] = vectors[t];
    const auto add = [&](int j, auto access) {
        const Vec<T> centred = access.read(x) - channel.mean;
        Vec<T> scale{};
        if constexpr (adjoint)
            scale = scale_at<silu, mode, T>(access, kept, centred, channel.gain, channel.rate, channel.start);
#pragma GCC unroll 2
        for (int t = 0; t < tile; ++t) {
            Vec<T> vector = access.read(v[t]);
            if constexpr (adjoint) vector *= scale;
            sum[t][j] += vector;
            product[t][j] += vector * centred;
        }
    };
    const auto flush = [&] {
        for (int t = 0; t < tile; ++t) {
            add_lanes<T>(totals[t].sum, (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]));
            add_lanes<T>(totals[t].product, (product[t][0] + product[t][1]) + (product[t][2] + product[t][3]));
            for (int j = 0; j < kStrip; ++j) sum[t][j] = product[t][j] = Vec<T>{};
        }
    };
    Index i = 0;
    while (i + kStrip * kLanes<T> <= size) {
        for (Index term = 0; term < kTermsPerLane && i + kStrip * kLanes<T> <= size; ++term)
#pragma GCC unroll 4
            for (int j = 0; j < kStrip; ++j, i += kLanes<T>) add(j, WholeVector{i});
        flush();
    }
    for (; i + kLanes<T> <= size; i += kLanes<T>) add(0, WholeVector{i});
    // Zeros in the lanes past the end of v: what x - mean is there does not matter.
    if (i < size) add(1, PartOfVector{i, size - i});
    flush();
}

// With `fetching` the lines that results go to are asked for some time before.
template <bool adjoint, bool silu, Scale mode, bool streaming, int tile, class S, class T>
__attribute__((noinline)) void run_write(S* const* results, const S* const* vectors, const S* x, T* kept, Index size,
                                         const Channel<T>& channel, const Means<T>* means, bool fetching) {
    const Index ahead = fetching ? kWriteAheadBytes / static_cast<Index>(sizeof(S)) : 0;
    Vec<T> offset[tile], slope[tile];
    const S* v[tile];
    S* out[tile];
    for (int t = 0; t < tile; ++t) {
        offset[t] = broadcast(means[t].offset);
        slope[t] = broadcast(means[t].slope);
        v[t] = vectors[t];
        out[t] = results[t];
    }
    sweep_row<T>(size, [&](auto access) {
        const Vec<T> centred = access.read(x) - channel.mean;
        const Vec<T> scale = scale_at<silu, mode, T>(access, kept, centred, channel.gain, channel.rate, channel.start);
#pragma GCC unroll 2
        for (int t = 0; t < tile; ++t) {
            const Vec<T> result = result_of<adjoint, T>(access.read(v[t]), centred, scale, offset[t], slope[t]);
            if constexpr (streaming) {
                stream(out[t] + access.at, result);
            } else {
                __builtin_prefetch(out[t] + access.at + ahead, 1);
                access.write(out[t], result);
            }
        }
    });
}

}  // namespace sharpcore::SHARPCORE_ISA
