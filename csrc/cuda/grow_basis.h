// Growth of orthonormal bases by blocks of vectors on the GPU.
#pragma once

#include <cstdint>

#include "sharpcore/grow_basis.h"

namespace sharpcore::cuda {

// Doubles of `workspace` that `grow_basis` needs; what is in them does not matter.
std::int64_t grow_basis_workspace(const GrowBasisArguments& arguments);

// As its namesake in sharpcore/backends/reference, with `sizes` and `floor` on the device; the same bits in any batch.
// The block may lie in the basis where it has at most kMostColumns vectors. `threads` does not matter.
void grow_basis(const GrowBasisArguments& arguments, double* workspace, void* stream);

// Vectors that share a reading of the basis. More are taken in groups of as many.
constexpr int kMostColumns = 8;

}  // namespace sharpcore::cuda
