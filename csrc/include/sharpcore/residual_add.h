// Sum of K tangents with those of a residual that lies in another memory layout.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// A [count, batch] of matrices without gaps: rows x columns, or columns x rows in memory where it is transposed.
// Strides count elements.
struct ResidualOperand {
    const void* data;
    bool transposed;
    std::int64_t count_stride, batch_stride;
};

struct ResidualAddArguments {
    void* out;  // not transposed; may be one of the operands that are not
    std::int64_t out_count_stride, out_batch_stride;
    ResidualOperand first, second;
    double scale;
    Dtype dtype;  // of every tensor
    std::int64_t count, batch, rows, columns;
    int threads;
};

}  // namespace sharpcore

// out = first + scale * second.
SHARPCORE_DECLARE_KERNEL(residual_add, ResidualAddArguments)
