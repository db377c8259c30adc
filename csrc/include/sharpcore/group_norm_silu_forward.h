// GroupNorm, optionally followed by SiLU, and the statistics that its derivative needs.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// out and x are [batch, channels, positions], without gaps in each sample: positions fastest, or channels fastest where
// `channels_last`. Strides count elements.
struct GroupNormSiluForwardArguments {
    void* out;
    void* mean;  // [batch, groups]
    void* rstd;  // [batch, groups]
    const void* x;
    const void* weight;  // [channels] or [batch, channels], or null: ones
    const void* bias;    // [channels] or [batch, channels], or null: zeros
    Dtype dtype;         // of out and x; the others are float for bfloat16, else the same
    double eps;
    std::int64_t batch, channels, positions, groups;
    std::int64_t out_batch_stride, x_batch_stride;
    std::int64_t weight_batch_stride, bias_batch_stride;  // 0 where the samples share them
    bool channels_last;
    bool silu;
    int threads;
};

}  // namespace sharpcore

// out = act(weight xhat + bias), xhat = (x - mean) rstd, rstd = 1 / sqrt(variance + eps) of a group.
SHARPCORE_DECLARE_KERNEL(group_norm_silu_forward, GroupNormSiluForwardArguments)
