// Derivative of LayerNorm for K tangents (or cotangents) at once.
#pragma once

#include <cstdint>

#include "sharpcore/isa.h"

namespace sharpcore {

// Vectors are [count, batch, rows, size], x is [batch, rows, size]; out and x have no gaps, the vectors none inside of
// a batch. There a row lies in one piece, or, where `columns` is set, as a column: rows are fastest. Strides count
// elements.
struct LayerNormArguments {
    void* out;
    const void* vectors;  // the tangents or cotangents
    const void* x;
    const void* mean;    // [batch, rows]
    const void* rstd;    // [batch, rows]
    const void* weight;  // [size], or null: ones
    bool float64;        // the type of every tensor: double, or float
    bool columns;
    std::int64_t count, batch, rows, size;
    std::int64_t vector_count_stride, vector_batch_stride;
    int threads;
};

}  // namespace sharpcore

// out = weight rstd (v - mean(v) - xhat mean(xhat v)), means over a row.
SHARPCORE_DECLARE_KERNEL(layer_norm_tangent, LayerNormArguments)

// out = rstd (h - mean(h) - xhat mean(xhat h)), h = weight v.
SHARPCORE_DECLARE_KERNEL(layer_norm_adjoint, LayerNormArguments)
