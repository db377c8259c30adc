// Eigenproblems of many small symmetric matrices on the GPU, and residuals of Ritz pairs.
#pragma once

#include <cstdint>

namespace sharpcore::cuda {

// The largest matrices that are taken.
constexpr std::int64_t kMostEigenRows = 128;

struct SymmetricEigenArguments {
    const double* matrices;     // [batch, rows, rows], rows at most kMostEigenRows; what lies in memory without gaps
    const std::int64_t* sizes;  // [batch], or nullptr: the leading rows and columns that count
    double* values;             // [batch, rows]
    double* vectors;            // [batch, rows, rows]
    std::int64_t batch, rows;
};

struct RitzResidualsArguments {
    const double* projected;                // [batch, rows, rows]
    const double* lost;                     // [batch, rows]
    const std::int64_t *processed, *sizes;  // [batch]
    const double* values;                   // [batch, count]
    const double* weights;                  // [batch, count, count]
    double *coupling, *noise;               // [batch, count]
    std::int64_t batch, rows, count;
};

// Doubles of `workspace` that `symmetric_eigen` needs; what is in them does not matter.
std::int64_t symmetric_eigen_workspace(const SymmetricEigenArguments& arguments);

// As their namesakes in sharpcore/backends/reference/symmetric_eigen.py.
void symmetric_eigen(const SymmetricEigenArguments& arguments, double* workspace, void* stream);

void ritz_residuals(const RitzResidualsArguments& arguments, void* stream);

}  // namespace sharpcore::cuda
