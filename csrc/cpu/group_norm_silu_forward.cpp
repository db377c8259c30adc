// GroupNorm and SiLU of a block of groups that stays in the cache: one sweep for the means, one for the variances about
// them, one that writes the result.
#include "sharpcore/group_norm_silu_forward.h"

#include "sharpcore/parallel.h"
#include "sharpcore/silu.h"
#include "sharpcore/sweep.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = GroupNormSiluForwardArguments;

// Partial sums side by side, and terms that one lane adds up in T before they go into a double.
constexpr int kStrip = 4;
constexpr Index kTermsPerLane = 32;

// Rows of a channels-last block that are summed, or written, while their channels' constants stay in registers.
constexpr int kSumRows = 8;
constexpr int kWriteRows = 4;
constexpr Index kFlushRows = 16 * kSumRows;

template <bool silu, class T>
inline Vec<T> activated(Vec<T> u) {
    if constexpr (silu) return u * sigmoid_at<T>(kExponentRate<T> * u);
    return u;
}

// 1 / sqrt(x) of a positive number: correctly rounded operations, unlike what <cmath> may inline for another CPU.
inline double reciprocal_root(double x) { return 1 / __builtin_sqrt(x); }

// The term that a sweep adds up: x, or its squared distance from the mean.
template <bool squared, class T>
inline Vec<T> term_of(Vec<T> x, Vec<T> mean) {
    if constexpr (!squared) return x;
    const Vec<T> centred = x - mean;
    return centred * centred;
}

// ---- Positions fastest: a group is one run of its channels. ----

template <bool squared, class S, class T = Compute<S>>
double run_sum(const S* x, Index size, T mean) {
    const Vec<T> m = broadcast(mean);
    double lanes[kLanes<T>] = {};
    Vec<T> sum[kStrip] = {};
    const auto flush = [&] {
        add_lanes<T>(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
        for (int j = 0; j < kStrip; ++j) sum[j] = Vec<T>{};
    };
    Index i = 0;
    while (i + kStrip * kLanes<T> <= size) {
        for (Index term = 0; term < kTermsPerLane && i + kStrip * kLanes<T> <= size; ++term)
#pragma GCC unroll 4
            for (int j = 0; j < kStrip; ++j, i += kLanes<T>) sum[j] += term_of<squared, T>(load(x + i), m);
        flush();
    }
    for (; i + kLanes<T> <= size; i += kLanes<T>) sum[0] += term_of<squared, T>(load(x + i), m);
    flush();
    double total = 0;
    for (Index lane = 0; lane < kLanes<T>; ++lane) total += lanes[lane];
    for (; i < size; ++i) {
        const Vec<T> one = term_of<squared, T>(load_partial(x + i, 1), m);
        total += static_cast<double>(one[0]);
    }
    return total;
}

template <bool silu, class S, class T = Compute<S>>
void run_write(S* out, const S* x, Index size, T mean, T gain, T bias) {
    const Vec<T> m = broadcast(mean), g = broadcast(gain), b = broadcast(bias);
    sweep_row<T>(size, [&](auto access) { access.write(out, activated<silu, T>((access.read(x) - m) * g + b)); });
}

// ---- Channels fastest: whole groups side by side make a block; its rows, one a position, lie `stride` apart. ----

template <class T>
struct Block {
    Index channels, positions, stride;
    double* sums;           // [channels]
    T* sum;                 // [channels], on their way into sums
    T *mean, *gain, *bias;  // [channels]

    static Index bytes(Index channels) {
        return channels * (static_cast<Index>(sizeof(double)) + 4 * static_cast<Index>(sizeof(T)));
    }

    Block(void* memory, Index block_channels, Index block_positions, Index row_stride)
        : channels(block_channels), positions(block_positions), stride(row_stride) {
        sums = static_cast<double*>(memory);
        sum = reinterpret_cast<T*>(sums + channels);
        mean = sum + channels;
        gain = mean + channels;
        bias = gain + channels;
    }
};

template <bool squared, int rows, class S, class T, class Access>
inline void add_rows(const Block<T>& block, const S* x, Access access) {
    const Vec<T> mean = access.read(block.mean);
    Vec<T> sum{};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum += term_of<squared, T>(access.read(x + r * block.stride), mean);
    access.write(block.sum, access.read(block.sum) + sum);
}

template <bool squared, class S, class T>
void rows_sums(const Block<T>& block, const S* x) {
    for (Index c = 0; c < block.channels; ++c) block.sums[c] = 0;
    for (Index p = 0; p < block.positions;) {
        const Index end = p + kFlushRows < block.positions ? p + kFlushRows : block.positions;
        for (Index c = 0; c < block.channels; ++c) block.sum[c] = 0;
        for (; p + kSumRows <= end; p += kSumRows)
            sweep_row<T>(block.channels,
                         [&](auto access) { add_rows<squared, kSumRows>(block, x + p * block.stride, access); });
        for (; p < end; ++p)
            sweep_row<T>(block.channels,
                         [&](auto access) { add_rows<squared, 1>(block, x + p * block.stride, access); });
        for (Index c = 0; c < block.channels; ++c) block.sums[c] += static_cast<double>(block.sum[c]);
    }
}

template <bool silu, int rows, class S, class T, class Access>
inline void write_rows(const Block<T>& block, S* out, const S* x, Access access) {
    const Vec<T> mean = access.read(block.mean), gain = access.read(block.gain), bias = access.read(block.bias);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
        access.write(out + r * block.stride,
                     activated<silu, T>((access.read(x + r * block.stride) - mean) * gain + bias));
}

template <bool silu, class S, class T>
void rows_write(const Block<T>& block, S* out, const S* x) {
    Index p = 0;
    for (; p + kWriteRows <= block.positions; p += kWriteRows)
        sweep_row<T>(block.channels, [&](auto access) {
            write_rows<silu, kWriteRows>(block, out + p * block.stride, x + p * block.stride, access);
        });
    for (; p < block.positions; ++p)
        sweep_row<T>(block.channels, [&](auto access) {
            write_rows<silu, 1>(block, out + p * block.stride, x + p * block.stride, access);
        });
}

// ---- Tasks: one is a block of groups of one sample. ----

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index groups_per_block, blocks;
};

template <bool silu, class S>
struct Task {
    using T = Compute<S>;
    const Arguments& a;
    Index sample, first_group, groups, per_group, size, start;

    Task(const Work& work, Index task) : a(work.arguments) {
        sample = task / work.blocks;
        first_group = task % work.blocks * work.groups_per_block;
        groups = a.groups - first_group < work.groups_per_block ? a.groups - first_group : work.groups_per_block;
        per_group = a.channels / a.groups;
        size = per_group * a.positions;
        start = first_group * (a.channels_last ? per_group : size);
    }
    T weight(Index channel) const {
        return a.weight == nullptr ? T(1) : static_cast<const T*>(a.weight)[sample * a.weight_batch_stride + channel];
    }
    T bias(Index channel) const {
        return a.bias == nullptr ? T(0) : static_cast<const T*>(a.bias)[sample * a.bias_batch_stride + channel];
    }
    const S* x() const { return static_cast<const S*>(a.x) + sample * a.x_batch_stride + start; }
    S* out() const { return static_cast<S*>(a.out) + sample * a.out_batch_stride + start; }

    // Stores the statistics of a group and gives its reciprocal deviation.
    T keep(Index group, T mean, double squares) const {
        const T rstd = static_cast<T>(reciprocal_root(squares / static_cast<double>(size) + a.eps));
        static_cast<T*>(a.mean)[sample * a.groups + group] = mean;
        static_cast<T*>(a.rstd)[sample * a.groups + group] = rstd;
        return rstd;
    }

    void do_run() const {
        const S* const from = x();
        const T mean = static_cast<T>(run_sum<false>(from, size, T(0)) / static_cast<double>(size));
        const T rstd = keep(first_group, mean, run_sum<true>(from, size, mean));
        for (Index c = 0; c < per_group; ++c) {
            const Index channel = first_group * per_group + c, begin = c * a.positions;
            run_write<silu>(out() + begin, from + begin, a.positions, mean, weight(channel) * rstd, bias(channel));
        }
    }

    // Adds up what the channels of a group have in sums.
    double group_sum(const Block<T>& block, Index g) const {
        double sum = 0;
        for (Index c = g * per_group; c < (g + 1) * per_group; ++c) sum += block.sums[c];
        return sum;
    }

    void do_rows(void* memory) const {
        const Block<T> block(memory, groups * per_group, a.positions, a.channels);
        const S* const from = x();
        for (Index c = 0; c < block.channels; ++c) block.mean[c] = 0;
        rows_sums<false>(block, from);
        for (Index g = 0; g < groups; ++g) {
            const T mean = static_cast<T>(group_sum(block, g) / static_cast<double>(size));
            for (Index c = g * per_group; c < (g + 1) * per_group; ++c) block.mean[c] = mean;
        }
        rows_sums<true>(block, from);
        for (Index g = 0; g < groups; ++g) {
            const T rstd = keep(first_group + g, block.mean[g * per_group], group_sum(block, g));
            for (Index c = g * per_group; c < (g + 1) * per_group; ++c) {
                block.gain[c] = weight(start + c) * rstd;
                block.bias[c] = bias(start + c);
            }
        }
        rows_write<silu>(block, out(), from);
    }
};

template <bool silu, class S>
void do_task(const void* job, Index number, int slot) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const Task<silu, S> task(work, number);
    if (work.arguments.channels_last)
        task.do_rows(work.scratch.slot(slot));
    else
        task.do_run();
}

// What the sweeps over one block should find in a second-level cache, and the part of a row that a channels-last block
// should hold at least.
constexpr Index kCacheBytes = 512 * 1024;
constexpr Index kBlockBytes = 256;
constexpr Index kLineBytes = 64;

// Groups of a channels-last block: whole cache lines, as few as fit the cache or else all that a row holds.
Index choose_groups(const Arguments& a, Index element_bytes) {
    const Index group_bytes = a.channels / a.groups * element_bytes;
    Index unit = 1;  // groups that end at a line's end
    while (unit < a.groups && unit * group_bytes % kLineBytes != 0) ++unit;
    Index groups = (kBlockBytes + group_bytes - 1) / group_bytes;
    groups = (groups + unit - 1) / unit * unit;
    if (groups * group_bytes * a.positions > kCacheBytes) groups = a.groups;
    const Index wanted = a.threads > 1 ? 2 * a.threads : 1;
    while (groups > unit && a.batch * ((a.groups + groups - 1) / groups) < wanted) {
        const Index half = (groups / 2 + unit - 1) / unit * unit;
        if (half == groups) break;
        groups = half;
    }
    return groups < a.groups ? groups : a.groups;
}

template <class S>
void run(const Arguments& a) {
    const Index groups_per_block = a.channels_last ? choose_groups(a, static_cast<Index>(sizeof(S))) : 1;
    const Index blocks = (a.groups + groups_per_block - 1) / groups_per_block;
    const int threads = a.threads > 1 ? a.threads : 1;
    const Scratch scratch(
        threads, a.channels_last ? Block<Compute<S>>::bytes(groups_per_block * (a.channels / a.groups)) : Index{0});
    const Work work{a, scratch, groups_per_block, blocks};
    parallel_for(a.batch * blocks, threads, a.silu ? do_task<true, S> : do_task<false, S>, &work);
}

}  // namespace

void group_norm_silu_forward(const Arguments& a) {
    if (a.dtype == Dtype::float64)
        run<double>(a);
    else if (a.dtype == Dtype::float32)
        run<float>(a);
    else
        run<bfloat16>(a);
}

}  // namespace sharpcore::SHARPCORE_ISA
