// Faults that a sanitizer must report, each through the library's own code: a race between two tasks of the pool, a
// kernel whose output is one element short, an index that overflows in a kernel.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "sharpcore/geglu_tangent.h"
#include "sharpcore/parallel.h"

namespace {

using Index = std::int64_t;

constexpr Index kCount = 3, kRows = 5, kColumns = 7;

struct Counter {
    std::atomic<int> arrived{0};
    Index unprotected = 0;
};

void race() {
    Counter counter;
    sharpcore::parallel_for(
        2, 2,
        [](const void* job, Index, int) noexcept {
            Counter& shared = *static_cast<Counter*>(const_cast<void*>(job));
            // Relaxed, so that it orders nothing: it only keeps one thread from taking both tasks.
            shared.arrived.fetch_add(1, std::memory_order_relaxed);
            while (shared.arrived.load(std::memory_order_relaxed) < 2) {
            }
            ++shared.unprotected;
        },
        &counter);
    std::printf("counted to %lld\n", static_cast<long long>(counter.unprotected));
}

void geglu(Index missing_outputs, Index vector_count_stride) {
    const std::vector<float> factors(kRows * 2 * kColumns, 1.0f), vectors(kCount * kRows * 2 * kColumns, 1.0f);
    std::vector<float> out(kCount * kRows * kColumns - missing_outputs);
    sharpcore::GegluArguments arguments{};
    arguments.out = out.data();
    arguments.vectors = vectors.data();
    arguments.factors = factors.data();
    arguments.count = kCount;
    arguments.rows = kRows;
    arguments.columns = kColumns;
    arguments.out_count_stride = kRows * kColumns;
    arguments.vector_count_stride = vector_count_stride;
    arguments.threads = 1;
    SHARPCORE_CALL_KERNEL(geglu_tangent, arguments);
    std::printf("wrote %f\n", static_cast<double>(out.back()));
}

}  // namespace

int main(int count, char** arguments) {
    const std::string fault = count == 2 ? arguments[1] : "";
    if (fault == "race")
        race();
    else if (fault == "overflow")
        geglu(1, kRows * 2 * kColumns);
    else if (fault == "signed")
        geglu(0, Index{1} << 62);  // times the size of a float it is no distance at all; twice it is too large
    else
        return std::fprintf(stderr, "expected race, overflow or signed\n"), 2;
    return 0;
}
