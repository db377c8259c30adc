// GEGLU, y = h gelu(g): its value, its derivatives, and these applied to K tangents (or cotangents) at once.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// A wide row has 2 * columns elements: those that belong to h, then those that belong to g. A narrow one has
// `columns`. Rows follow each other without gaps. Strides count elements.
struct GegluForwardArguments {
    void* value;             // [rows] narrow
    void* factors;           // [rows] wide: dy/dh = gelu(g), then dy/dg = h gelu'(g); may be the projection
    const void* projection;  // [rows] wide: h, then g
    Dtype dtype;             // of every tensor
    bool tanh;               // the approximation of GELU by tanh
    std::int64_t rows, columns;
    int threads;
};

struct GegluArguments {
    void* out;            // tangents: [count, rows] narrow; cotangents: [count, rows] wide
    const void* vectors;  // tangents: [count, rows] wide; cotangents: [count, rows] narrow
    const void* factors;  // [rows] wide, as written by geglu_forward
    Dtype dtype;          // of every tensor
    std::int64_t count, rows, columns;
    std::int64_t out_count_stride, vector_count_stride;
    int threads;
};

}  // namespace sharpcore

SHARPCORE_DECLARE_KERNEL(geglu_forward, GegluForwardArguments)

// out = dy/dh h' + dy/dg g', v = [h' | g'].
SHARPCORE_DECLARE_KERNEL(geglu_tangent, GegluArguments)

// out = [dy/dh v | dy/dg v].
SHARPCORE_DECLARE_KERNEL(geglu_adjoint, GegluArguments)
