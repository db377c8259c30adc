// A step of block Lanczos on the GPU, from the products to the next block to multiply.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"

namespace sharpcore::cuda {

// As in sharpcore/backends/reference/lanczos_step.py. Every tensor lies in memory without gaps but for products, whose
// [size] do; strides count elements.
struct LanczosStepArguments {
    double* basis;      // [batch, rows, size]
    double* projected;  // [batch, rows, rows]
    double* lost;       // [batch, rows]
    double* norm;       // [batch], as all that follow
    std::int64_t *sizes, *processed, *multiplied, *deflated, *breakdowns;
    const bool* frozen;
    std::int64_t* faults;
    const void* products;  // [count, batch, size]
    std::int64_t product_count_stride, product_batch_stride;
    void* out;  // [count, batch, size], the next block
    Dtype product_dtype, out_dtype;
    std::int64_t count, batch, rows, size, limit;
    double share, tolerance;
};

// Doubles of `workspace` that `lanczos_step` needs; what is in them does not matter.
std::int64_t lanczos_step_workspace(const LanczosStepArguments& arguments);

void lanczos_step(const LanczosStepArguments& arguments, double* workspace, void* stream);

}  // namespace sharpcore::cuda
