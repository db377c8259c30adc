// Random probes of Philox4x32-10 on the GPU.
#pragma once

#include <cstdint>

#include "sharpcore/philox.h"

namespace sharpcore::cuda {

// Doubles of `workspace` that `philox_probes` needs.
std::int64_t philox_workspace(const PhiloxArguments& arguments);

// As its namesake in sharpcore/backends/reference, the same bits. `threads` of the arguments does not matter.
void philox_probes(const PhiloxArguments& arguments, double* workspace, void* stream);

}  // namespace sharpcore::cuda
