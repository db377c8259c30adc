// Nearest-neighbour upsampling and its transpose. Blocks of two by two, those of every UNet, are doubled and halved in
// registers; with channels fastest a pixel is a row of its own and nothing has to be moved within vectors.
#include "sharpcore/upsample_nearest_tangent.h"

#include <cstring>

#include "sharpcore/for_vectors.h"
#include "sharpcore/parallel.h"
#include "sharpcore/transpose.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = UpsampleNearestArguments;

template <class T>
inline T widen(T value) {
    return value;
}

inline float widen(bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

template <class T>
inline void narrow(T* to, T value) {
    *to = value;
}

inline void narrow(bfloat16* to, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits = value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    to->bits = static_cast<std::uint16_t>(bits >> 16);
}

template <class Storage>
void repeat_across(Storage* out, const Storage* in, Index width, Index across) {
    using T = Compute<Storage>;
    Index i = 0;
    if (across == 2) {
        for (; i + kLanes<T> <= width; i += kLanes<T>) {
            const Vec<T> vector = load(in + i);
            store(out + 2 * i, interleave<false, T>(vector, vector));
            store(out + 2 * i + kLanes<T>, interleave<true, T>(vector, vector));
        }
    }
    for (; i < width; ++i)
        for (Index s = 0; s < across; ++s) out[i * across + s] = in[i];
}

template <class Storage>
void sum_blocks(Storage* out, const Storage* in, Index width, Index down, Index across) {
    using T = Compute<Storage>;
    const Index line = width * across;
    Index i = 0;
    if (across == 2) {
        for (; i + kLanes<T> <= width; i += kLanes<T>) {
            Vec<T> low{}, high{};
            for (Index r = 0; r < down; ++r) {
                low += load(in + r * line + 2 * i);
                high += load(in + r * line + 2 * i + kLanes<T>);
            }
            store(out + i, every_other<false, T>(low, high) + every_other<true, T>(low, high));
        }
    }
    for (; i < width; ++i) {
        T sum = 0;
        for (Index s = 0; s < across; ++s)
            for (Index r = 0; r < down; ++r) sum += widen(in[r * line + i * across + s]);
        narrow(out + i, sum);
    }
}

struct Work {
    const Arguments& arguments;
    Index lines;  // a task's: a line has a small image's pixels side by side, in one channel or in all
    Index tasks;  // of a sample
};

// Calls line(pointer into out, pointer into the vectors) for those of a task.
template <bool adjoint, class Storage, class Line>
inline void for_lines(const Work& work, Index task, Line line) {
    const Arguments& a = work.arguments;
    const Index sample = task / work.tasks, k = sample / a.batch, n = sample % a.batch;
    const Index lines = a.channels_last ? a.height : a.channels * a.height;
    const Index small = a.channels_last ? a.width * a.channels : a.width, large = small * a.down * a.across;
    const Index first = task % work.tasks * work.lines;
    const Index end = first + work.lines < lines ? first + work.lines : lines;
    Storage* const out = static_cast<Storage*>(a.out) + k * a.out_count_stride + n * a.out_batch_stride;
    const Storage* const in =
        static_cast<const Storage*>(a.vectors) + k * a.vector_count_stride + n * a.vector_batch_stride;
    for (Index i = first; i < end; ++i) line(out + i * (adjoint ? small : large), in + i * (adjoint ? large : small));
}

template <class Storage>
void tangent_task(const void* job, Index task, int) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const Arguments& a = work.arguments;
    const Index line = a.width * a.across * (a.channels_last ? a.channels : 1);
    const std::size_t pixel = static_cast<std::size_t>(a.channels) * sizeof(Storage);
    for_lines<false, Storage>(work, task, [&](Storage* out, const Storage* in) {
        if (a.channels_last) {
            for (Index w = 0; w < a.width; ++w)
                for (Index s = 0; s < a.across; ++s)
                    std::memcpy(out + (w * a.across + s) * a.channels, in + w * a.channels, pixel);
        } else {
            repeat_across(out, in, a.width, a.across);
        }
        for (Index r = 1; r < a.down; ++r)
            std::memcpy(out + r * line, out, static_cast<std::size_t>(line) * sizeof(Storage));
    });
}

template <class Storage>
void adjoint_task(const void* job, Index task, int) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const Arguments& a = work.arguments;
    const Index line = a.width * a.across * a.channels;
    for_lines<true, Storage>(work, task, [&](Storage* out, const Storage* in) {
        if (!a.channels_last) return sum_blocks(out, in, a.width, a.down, a.across);
        for (Index w = 0; w < a.width; ++w) {
            const Storage* const block = in + w * a.across * a.channels;
            for_vectors<Storage>(a.channels, [&, to = out + w * a.channels](auto read, auto write) {
                Vec<Compute<Storage>> sum{};
                for (Index s = 0; s < a.across; ++s)
                    for (Index r = 0; r < a.down; ++r) sum += read(block + r * line + s * a.channels);
                write(to, sum);
            });
        }
    });
}

// Elements of the large image in a task, about.
constexpr Index kTaskElements = 1 << 15;

template <class Task>
void run(const Arguments& a, Task task) {
    const Index lines = a.channels_last ? a.height : a.channels * a.height;
    const Index large = a.width * a.down * a.across * (a.channels_last ? a.channels : 1);
    Index taken = kTaskElements / large;
    if (taken < 1) taken = 1;
    if (taken > lines) taken = lines;
    const Work work{a, taken, (lines + taken - 1) / taken};
    parallel_for(a.count * a.batch * work.tasks, a.threads, task, &work);
}

}  // namespace

void upsample_nearest_tangent(const Arguments& a) {
    with_storage(a.dtype, [&](auto one) { run(a, tangent_task<decltype(one)>); });
}

void upsample_nearest_adjoint(const Arguments& a) {
    with_storage(a.dtype, [&](auto one) { run(a, adjoint_task<decltype(one)>); });
}

}  // namespace sharpcore::SHARPCORE_ISA
