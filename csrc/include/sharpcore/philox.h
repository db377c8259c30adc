// Random probes of Philox4x32-10: signs, normal numbers, and normal numbers on a sphere.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/isa.h"

namespace sharpcore {

// Numbers as in sharpcore/backends/reference/philox.py.
enum class ProbeKind { rademacher, normal, sphere };

struct PhiloxArguments {
    void* out;                       // [count, samples, dimension]
    const std::int64_t* sample_ids;  // [samples], none negative
    Dtype dtype;                     // of `out`
    ProbeKind kind;
    std::uint64_t seed;
    std::int64_t first, count, samples, dimension;
    int threads;
};

}  // namespace sharpcore

// out[i, j] = probe first + i of the sample sample_ids[j].
SHARPCORE_DECLARE_KERNEL(philox_probes, PhiloxArguments)
