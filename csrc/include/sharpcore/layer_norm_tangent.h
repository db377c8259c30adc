// Derivative of LayerNorm for K tangents (or cotangents) at once.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// Vectors are [count, batch, rows, size], x is [batch, rows, size]; x has no gaps, each result has none, the vectors
// have none inside of a batch. There a row lies in one piece, or, where `columns` is set, as a column: rows are
// fastest. Strides count elements.
struct LayerNormArguments {
    void* out;
    const void* vectors;  // the tangents or cotangents
    const void* x;
    const void* mean;    // [batch, rows]
    const void* rstd;    // [batch, rows]
    const void* weight;  // [size] or [batch, size], or null: ones
    Dtype dtype;         // of out, vectors and x; the others are float for bfloat16, else the same
    bool columns;
    std::int64_t count, batch, rows, size;
    std::int64_t out_count_stride;
    std::int64_t vector_count_stride, vector_batch_stride;
    std::int64_t weight_batch_stride;  // 0 where the samples share it
    int threads;
};

}  // namespace sharpcore

// out = weight rstd (v - mean(v) - xhat mean(xhat v)), means over a row.
SHARPCORE_DECLARE_KERNEL(layer_norm_tangent, LayerNormArguments)

// out = rstd (h - mean(h) - xhat mean(xhat h)), h = weight v.
SHARPCORE_DECLARE_KERNEL(layer_norm_adjoint, LayerNormArguments)
