// Growth of orthonormal bases by blocks of vectors: block Gram-Schmidt and QR with deflation, many bases at once.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// Every [size] lies in memory without gaps; strides count elements.
struct GrowBasisArguments {
    double* basis;              // [batch, rows, size] without gaps; new rows are written behind the first sizes[i]
    const std::int64_t* sizes;  // [batch], at most limit; a negative one: nothing is done, the results are zero
    const void* block;          // [count, batch, size], float32 or float64; may lie in the basis
    std::int64_t block_count_stride, block_batch_stride;
    const double* floor;   // [batch]: remainders of at most this norm give no row
    double* coefficients;  // [batch, rows, count] without gaps
    double* triangle;      // [batch, count, count] without gaps
    double* dropped;       // [batch, count]: norms of the remainders that gave no row
    std::int64_t* ranks;   // [batch]: how many rows are new
    Dtype dtype;           // of the block
    std::int64_t count, batch, rows, size, limit;
    int threads;
};

}  // namespace sharpcore

// As its namesake in sharpcore/backends/reference. The same bits for any number of threads and any batch.
SHARPCORE_DECLARE_KERNEL(grow_basis, GrowBasisArguments)
