// Walks along a row of numbers of any storage type, a vector at a time; for kernel sources only.
#pragma once

#include <cstdint>

#include "sharpcore/dtype.h"
#include "sharpcore/simd.h"

namespace sharpcore::SHARPCORE_ISA {

// Calls piece(read, write) for the vectors of a row: read(from) gives those of a row that starts at `from`, write(to,
// vector) puts them into one that starts at `to`. The last vector is read and written in part where it must be.
template <class Storage, class Piece>
inline void for_vectors(std::int64_t columns, Piece piece) {
    using T = Compute<Storage>;
    std::int64_t i = 0;
    for (; i + kLanes<T> <= columns; i += kLanes<T>)
        piece([i](const Storage* from) { return load(from + i); },
              [i](Storage* to, Vec<T> vector) { store(to + i, vector); });
    if (const std::int64_t rest = columns - i; rest > 0)
        piece([=](const Storage* from) { return load_partial(from + i, rest); },
              [=](Storage* to, Vec<T> vector) { store_partial(to + i, vector, rest); });
}

// Calls work(one of the storage type), for code that is chosen by a type.
template <class Work>
inline void with_storage(Dtype dtype, Work work) {
    if (dtype == Dtype::float64)
        work(double{});
    else if (dtype == Dtype::float32)
        work(float{});
    else
        work(bfloat16{});
}

}  // namespace sharpcore::SHARPCORE_ISA
