// Sums over the lanes of a warp and the threads of a block, in an order that is always the same.
#pragma once

#include "cuda/launch.h"

namespace sharpcore::cuda {

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Lanes half a group apart give each other half of their values and keep the sums; then the halves do the same.
template <int half, int count>
__device__ inline void exchange_halves(double (&values)[count]) {
    if constexpr (half > 0) {
        constexpr int step = kWarp * half / count;
        const bool upper = (lane() & step) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const double given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
            values[i] = kept + __shfl_xor_sync(kAllLanes, given, step);
        }
        exchange_halves<half / 2>(values);
    }
}

// Sums over the lanes of each of `count` values, a power of two of at most kWarp: lane l gets that of the value
// l / (kWarp / count).
template <int count>
__device__ inline double sum_lanes(double (&values)[count]) {
    static_assert(count > 0 && (count & (count - 1)) == 0 && count <= kWarp, "a sum for each lane, or fewer");
    exchange_halves<count / 2>(values);
#pragma unroll
    for (int step = kWarp / (2 * count); step > 0; step /= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], step);
    return values[0];
}

__device__ inline double sum_lanes(double value) {
    double values[1] = {value};
    return sum_lanes(values);
}

__device__ inline double largest_of_lanes(double value) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(kAllLanes, value, step);
        value = other > value ? other : value;
    }
    return value;
}

// The sum over all threads of a block, for each of them.
__device__ inline double sum_block(double value) {
    __shared__ double sums[kWarps];
    value = sum_lanes(value);
    if (lane() == 0) sums[warp()] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < kWarps; ++i) value += sums[i];
    __syncthreads();
    return value;
}

// Likewise of numbers that are not negative; NaN counts as zero.
__device__ inline double largest_of_block(double value) {
    __shared__ double largest[kWarps];
    value = largest_of_lanes(value > 0 ? value : 0);
    if (lane() == 0) largest[warp()] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < kWarps; ++i) value = largest[i] > value ? largest[i] : value;
    __syncthreads();
    return value;
}

}  // namespace sharpcore::cuda
