// Derivative of GroupNorm, optionally followed by SiLU, for K tangents (or cotangents) at once.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// Vectors are [count, batch, channels, positions], x is [batch, channels, positions]. In each sample the channels and
// positions lie without gaps, positions fastest, or channels fastest where `channels_last`. Strides count elements.
struct GroupNormSiluArguments {
    void* out;
    const void* vectors;  // the tangents or cotangents
    const void* x;
    const void* mean;    // [batch, groups]
    const void* rstd;    // [batch, groups]
    const void* weight;  // [channels] or [batch, channels], or null: ones
    const void* bias;    // [channels] or [batch, channels], or null: zeros
    Dtype dtype;         // of out, vectors and x; the others are float for bfloat16, else the same
    std::int64_t count, batch, channels, positions, groups;
    std::int64_t out_count_stride, out_batch_stride;
    std::int64_t vector_count_stride, vector_batch_stride;
    std::int64_t x_batch_stride;
    std::int64_t weight_batch_stride, bias_batch_stride;  // 0 where the samples share them
    bool channels_last;
    bool silu;
    int threads;
};

}  // namespace sharpcore

// out = act'(u) weight rstd (v - mean(v) - xhat mean(xhat v)), u = weight xhat + bias, means over a group.
SHARPCORE_DECLARE_KERNEL(group_norm_silu_tangent, GroupNormSiluArguments)

// out = rstd (h - mean(h) - xhat mean(xhat h)), h = weight act'(u) v.
SHARPCORE_DECLARE_KERNEL(group_norm_silu_adjoint, GroupNormSiluArguments)
