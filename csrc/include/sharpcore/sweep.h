// Sweeps over rows of numbers in whole vectors, the last one in part; stores past the cache. For kernel sources only.
#pragma once

#include "sharpcore/simd.h"

namespace sharpcore::SHARPCORE_ISA {

// A vector at `at` in whatever row it is read from or written to.
struct WholeVector {
    std::int64_t at;

    template <class S>
    auto read(const S* row) const {
        return load(row + at);
    }
    template <class S, class V>
    void write(S* row, V vector) const {
        store(row + at, vector);
    }
};

// Out of line, as they are rare and long.
template <class S>
__attribute__((noinline)) Vec<Compute<S>> read_part(const S* from, std::int64_t count) {
    return load_partial(from, count);
}

template <class S>
__attribute__((noinline)) void write_part(S* to, Vec<Compute<S>> vector, std::int64_t count) {
    store_partial(to, vector, count);
}

// The first `count` entries of a vector; the others are read as zero and not written.
struct PartOfVector {
    std::int64_t at, count;

    template <class S>
    auto read(const S* row) const {
        return read_part(row + at, count);
    }
    template <class S, class V>
    void write(S* row, V vector) const {
        write_part(row + at, vector, count);
    }
};

// Calls piece(WholeVector or PartOfVector) until all of `size` numbers that are computed with in T are covered.
template <class T, class Piece>
inline void sweep_row(std::int64_t size, Piece piece) {
    std::int64_t i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>) piece(WholeVector{i});
    if (i < size) piece(PartOfVector{i, size - i});
}

#if defined(__x86_64__) || defined(__amd64__)
constexpr bool kCanStream = true;

// Stores that leave nothing in the cache; `to` is aligned to kVectorBytes. stream_fence() goes before other threads
// may read what was stored.
inline void stream(float* to, Vec<float> vector) {
#if defined(__AVX512F__)
    __builtin_ia32_movntps512(to, vector);
#elif defined(__AVX2__)
    __builtin_ia32_movntps256(to, vector);
#else
    __builtin_ia32_movntps(to, vector);
#endif
}

inline void stream_fence() { __builtin_ia32_sfence(); }
#else
constexpr bool kCanStream = false;

inline void stream(float* to, Vec<float> vector) { store(to, vector); }
inline void stream_fence() {}
#endif

// Adds the lanes of `partial` to those of `totals`, exactly where T is float.
template <class T>
inline void add_lanes(double* totals, Vec<T> partial) {
    typedef double Doubles __attribute__((vector_size(kLanes<T> * sizeof(double))));
    Doubles sum;
    std::memcpy(&sum, totals, sizeof(sum));
    sum += __builtin_convertvector(partial, Doubles);
    std::memcpy(totals, &sum, sizeof(sum));
}

}  // namespace sharpcore::SHARPCORE_ISA
