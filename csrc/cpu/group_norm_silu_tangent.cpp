// K tangents or cotangents through GroupNorm and SiLU, two vectors at a time: one sweep takes their means, a second
// one, which finds them in the cache, writes the results. What depends on x alone, scale = act'(u) weight rstd, is
// computed once per (sample, group), by the first sweep that needs it, and kept while the other vectors pass.
#include "sharpcore/group_norm_silu_tangent.h"

#include "sharpcore/group_norm_rows.h"
#include "sharpcore/group_norm_runs.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = GroupNormSiluArguments;

// A task is a block of groups of one sample, for a range of the tiles of K.
struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index groups_per_block, blocks, tiles, splits;  // splits: ranges of the tiles
    bool afar;                                      // whether no cache holds a channels-last block
    bool streaming;                                 // whether results are stored past the cache
    bool fetching;                                  // whether no cache holds what results are written to
};

template <class T>
inline const T* at(const void* pointer, Index offset) {
    return static_cast<const T*>(pointer) + offset;
}

// The range of a task, and where its vectors and results lie.
template <class S>
struct Task {
    using T = Compute<S>;
    const Arguments& a;
    Index sample, first_group, groups, per_group, size, start, first, last;
    bool afar, streaming, fetching;

    Task(const Work& work, Index task)
        : a(work.arguments), afar(work.afar), streaming(work.streaming), fetching(work.fetching) {
        const Index split = task % work.splits, part = task / work.splits;
        sample = part / work.blocks;
        first_group = part % work.blocks * work.groups_per_block;
        groups = a.groups - first_group < work.groups_per_block ? a.groups - first_group : work.groups_per_block;
        per_group = a.channels / a.groups;
        size = per_group * a.positions;
        start = first_group * (a.channels_last ? per_group : size);
        first = split * work.tiles / work.splits * kTile;
        last = (split + 1) * work.tiles / work.splits * kTile;
        if (last > a.count) last = a.count;
    }
    T mean(Index group) const { return *at<T>(a.mean, sample * a.groups + group); }
    T rstd(Index group) const { return *at<T>(a.rstd, sample * a.groups + group); }
    T weight(Index channel) const {
        return a.weight == nullptr ? T(1) : *at<T>(a.weight, sample * a.weight_batch_stride + channel);
    }
    T bias(Index channel) const {
        return a.bias == nullptr ? T(0) : *at<T>(a.bias, sample * a.bias_batch_stride + channel);
    }
    template <bool silu>
    Factors<T> factors(Index group, Index channel) const {
        return Factors<T>::template of<silu>(weight(channel), rstd(group), bias(channel));
    }
    const S* x() const { return at<S>(a.x, sample * a.x_batch_stride + start); }

    // Calls run(constant number of vectors, their addresses, those of their results, mode of the scale) for each tile.
    template <class Run>
    void for_tiles(Run run) const {
        for (Index k = first; k < last; k += kTile) {
            const S* v[kTile];
            S* out[kTile];
            for (Index t = 0; t < kTile; ++t) {
                v[t] = at<S>(a.vectors, (k + t) * a.vector_count_stride + sample * a.vector_batch_stride + start);
                out[t] = static_cast<S*>(a.out) + (k + t) * a.out_count_stride + sample * a.out_batch_stride + start;
            }
            const Scale mode = afar               ? Scale::compute_afar
                               : k > first        ? Scale::read
                               : k + kTile < last ? Scale::keep
                                                  : Scale::compute;
            if (k + kTile <= last)
                run(Size<kTile>{}, v, out, mode);
            else
                run(Size<1>{}, v, out, mode);
        }
    }

    template <int number>
    struct Size {
        static constexpr int value = number;
    };
};

template <bool adjoint, bool silu, class S>
void do_run(const Task<S>& task, Compute<S>* kept) {
    using T = Compute<S>;
    const Arguments& a = task.a;
    const Index group = task.first_group;
    const T rstd = task.rstd(group);
    const S* const x = task.x();
    const auto channel = [&](Index c) {
        return Channel<T>(task.mean(group), task.template factors<silu>(group, group * task.per_group + c));
    };
    task.for_tiles([&](auto constant, const S* const* v, S* const* out, Scale mode) {
        constexpr int tile = decltype(constant)::value;
        Totals<T> totals[tile];
        // Calls part(channel, where it begins, addresses there) for each channel.
        const auto for_channels = [&](auto part) {
            for (Index c = 0; c < task.per_group; ++c) {
                const Index begin = c * a.positions;
                const S* from[tile];
                S* to[tile];
                for (int t = 0; t < tile; ++t) {
                    from[t] = v[t] + begin;
                    to[t] = out[t] + begin;
                }
                part(channel(c), begin, from, to);
            }
        };
        if constexpr (adjoint) {
            with_mode<silu>(mode_of_sums<adjoint>(mode), [&](auto chosen) {
                for_channels([&](const Channel<T>& now, Index begin, const S* const* from, S* const*) {
                    run_sums<adjoint, silu, decltype(chosen)::value, tile>(totals, from, x + begin, kept + begin,
                                                                           a.positions, now);
                });
            });
        } else {
            run_sums<false, false, Scale::compute, tile>(totals, v, x, kept, task.size, channel(0));
        }
        const Means<T> means[kTile] = {totals[0].means(task.size, rstd), totals[tile - 1].means(task.size, rstd)};
        with_mode<silu>(mode_of_write<adjoint>(mode), [&](auto chosen) {
            constexpr Scale how = decltype(chosen)::value;
            for_channels([&](const Channel<T>& now, Index begin, const S* const* from, S* const* to) {
                if (kStreams<S> && task.streaming)
                    run_write<adjoint, silu, how, kStreams<S>, tile>(to, from, x + begin, kept + begin, a.positions,
                                                                     now, means, false);
                else
                    run_write<adjoint, silu, how, false, tile>(to, from, x + begin, kept + begin, a.positions, now,
                                                               means, task.fetching);
            });
        });
    });
}

template <bool adjoint, bool silu, class S>
void do_rows(const Task<S>& task, void* memory) {
    using T = Compute<S>;
    const Arguments& a = task.a;
    const Block<T> block(memory, task.groups * task.per_group, a.positions, a.channels);
    for (Index c = 0; c < block.channels; ++c) {
        const Index group = task.first_group + c / task.per_group;
        block.mean[c] = task.mean(group);
        block.rstd[c] = task.rstd(group);
        const Factors<T> factors = task.template factors<silu>(group, task.start + c);
        block.gain[c] = factors.gain;
        block.rate[c] = factors.rate;
        block.start[c] = factors.start;
    }
    const S* const x = task.x();
    task.for_tiles([&](auto constant, const S* const* v, S* const* out, Scale mode) {
        constexpr int tile = decltype(constant)::value;
        if constexpr (adjoint)
            with_mode<silu>(mode_of_sums<adjoint>(mode),
                            [&](auto chosen) { rows_sums<adjoint, silu, decltype(chosen)::value, tile>(block, v, x); });
        else if (task.afar)
            rows_sums<false, false, Scale::compute_afar, tile>(block, v, x);
        else
            rows_sums<false, false, Scale::compute, tile>(block, v, x);
        for (Index begin = 0; begin < tile * block.channels; begin += task.per_group) {
            double sum = 0, product = 0;
            for (Index c = begin; c < begin + task.per_group; ++c) {
                sum += block.sums[c];
                product += block.products[c];
            }
            const Means<T> means(sum, product, task.size, block.rstd[begin % block.channels]);
            for (Index c = begin; c < begin + task.per_group; ++c) {
                block.offset[c] = means.offset;
                block.slope[c] = means.slope;
            }
        }
        with_mode<silu>(mode_of_write<adjoint>(mode), [&](auto chosen) {
            if (kStreams<S> && task.streaming)
                rows_write<adjoint, silu, decltype(chosen)::value, kStreams<S>, tile>(block, out, v, x);
            else
                rows_write<adjoint, silu, decltype(chosen)::value, false, tile>(block, out, v, x);
        });
    });
}

template <bool adjoint, bool silu, class S>
void do_task(const void* job, Index number, int slot) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const Task<S> task(work, number);
    void* const memory = work.scratch.slot(slot);
    if (work.arguments.channels_last)
        do_rows<adjoint, silu, S>(task, memory);
    else
        do_run<adjoint, silu, S>(task, static_cast<Compute<S>*>(memory));
    if (work.streaming) stream_fence();
}

// What the sweeps over one block should find in a second-level cache.
constexpr Index kCacheBytes = 512 * 1024;

// Part of a row that a channels-last block should hold: less makes memory slow, as it is read ahead line by line.
constexpr Index kBlockBytes = 512;

// Results of more bytes are not in the cache when they are read.
constexpr Index kStreamBytes = 32 * 1024 * 1024;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

constexpr Index kLineBytes = 64;

// How the groups of a channels-last sample are taken together: whole cache lines, as few as fit the cache or else, far
// from it, all that a row holds.
struct Blocking {
    Index groups;
    bool afar;

    Blocking(const Arguments& a, Index element_bytes, bool keeps) {
        const Index group_bytes = a.channels / a.groups * element_bytes;
        Index unit = 1;  // groups that end at a line's end
        while (unit < a.groups && unit * group_bytes % kLineBytes != 0) ++unit;
        const auto rounded = [&](Index number) { return (number + unit - 1) / unit * unit; };
        groups = rounded((kBlockBytes + group_bytes - 1) / group_bytes);
        if (groups > a.groups) groups = a.groups;
        // x, a tile of vectors, and the scale.
        const Index tensors = 1 + (a.count < kTile ? a.count : kTile) + keeps;
        const auto too_large = [&] { return groups * group_bytes * a.positions * tensors > kCacheBytes; };
        // Half of a short row is read ahead as well as a whole one.
        if (groups == a.groups && too_large()) groups = rounded(a.groups / 2);
        afar = too_large();
        if (afar) groups = a.groups;
        const Index wanted = a.threads > 1 ? 2 * a.threads : 1;
        while (groups > unit && a.batch * ((a.groups + groups - 1) / groups) < wanted) {
            const Index half = rounded(groups / 2);
            if (half == groups) break;
            groups = half;
        }
        if (groups > a.groups) groups = a.groups;
    }
};

Index bytes_of_results(const Arguments& a, Index element_bytes) {
    return a.count * a.batch * a.channels * a.positions * element_bytes;
}

bool can_stream(const Arguments& a, Index element_bytes, Index groups_per_block) {
    const auto aligned = [&](Index elements) { return elements * element_bytes % kLineBytes == 0; };
    const Index block = groups_per_block * (a.channels / a.groups);
    return bytes_of_results(a, element_bytes) > kStreamBytes &&
           reinterpret_cast<std::uintptr_t>(a.out) % kLineBytes == 0 && aligned(a.out_count_stride) &&
           aligned(a.out_batch_stride) &&
           (a.channels_last ? aligned(a.channels) && aligned(block) : aligned(a.positions));
}

template <bool adjoint, class S>
void run(const Arguments& a) {
    using T = Compute<S>;
    const Index element_bytes = static_cast<Index>(sizeof(S)), per_group = a.channels / a.groups;
    const bool keeps = a.silu && (adjoint || a.count > kTile);
    const Blocking blocking(a, element_bytes, keeps);
    const bool afar = a.channels_last && blocking.afar;
    const Index groups_per_block = a.channels_last ? blocking.groups : 1;
    const Index blocks = (a.groups + groups_per_block - 1) / groups_per_block;
    const Index tiles = (a.count + kTile - 1) / kTile;
    Index splits = 1;
    if (a.threads > 1) {
        splits = (kTasksPerThread * a.threads + a.batch * blocks - 1) / (a.batch * blocks);
        if (splits > tiles) splits = tiles;
    }
    const int threads = a.threads > 1 ? a.threads : 1;
    const Index kept_positions = keeps && !afar ? a.positions : 0;
    const Index channels = groups_per_block * per_group;
    const Scratch scratch(threads, a.channels_last ? Block<T>::bytes(channels, kept_positions)
                                                   : channels * kept_positions * static_cast<Index>(sizeof(T)));
    const bool streaming = kStreams<S> && can_stream(a, element_bytes, groups_per_block);
    const bool fetching = bytes_of_results(a, element_bytes) > kCacheBytes * threads;
    const Work work{a, scratch, groups_per_block, blocks, tiles, splits, afar, streaming, fetching};
    parallel_for(a.batch * blocks * splits, threads, a.silu ? do_task<adjoint, true, S> : do_task<adjoint, false, S>,
                 &work);
}

template <bool adjoint>
void run_any(const Arguments& a) {
    if (a.dtype == Dtype::float64)
        run<adjoint, double>(a);
    else if (a.dtype == Dtype::float32)
        run<adjoint, float>(a);
    else
        run<adjoint, bfloat16>(a);
}

}  // namespace

void group_norm_silu_tangent(const Arguments& arguments) { run_any<false>(arguments); }

void group_norm_silu_adjoint(const Arguments& arguments) { run_any<true>(arguments); }

}  // namespace sharpcore::SHARPCORE_ISA
