// Derivative of GEGLU, y = h gelu(g), for K tangents (or cotangents) at once.
#pragma once

#include <cstdint>

#include "sharpcore/isa.h"

namespace sharpcore {

// A wide row is [h | g], 2 * columns elements; a narrow one has `columns`. Rows follow each other without gaps.
// Strides count elements.
struct GegluArguments {
    void* out;               // tangents: [count, rows] narrow; cotangents: [count, rows] wide
    const void* vectors;     // tangents: [count, rows] wide; cotangents: [count, rows] narrow
    const void* projection;  // [rows] wide
    bool float64;            // the type of every tensor: double, or float
    bool tanh;               // the approximation of GELU by tanh
    std::int64_t count, rows, columns;
    std::int64_t out_count_stride, vector_count_stride;
    int threads;
};

}  // namespace sharpcore

// out = gelu(g) h' + h gelu'(g) g', v = [h' | g'].
SHARPCORE_DECLARE_KERNEL(geglu_tangent, GegluArguments)

// out = [gelu(g) v | h gelu'(g) v].
SHARPCORE_DECLARE_KERNEL(geglu_adjoint, GegluArguments)
