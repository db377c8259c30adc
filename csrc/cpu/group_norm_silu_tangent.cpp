// K tangents or cotangents through GroupNorm and SiLU, two vectors at a time: one sweep takes their means, a second
// one, which finds them in the cache, writes the results. What depends on x alone, scale = act'(u) weight rstd, is
// computed once per (sample, group), by the first sweep that needs it, and kept while the other vectors pass.
#include "sharpcore/group_norm_silu_tangent.h"

#include "sharpcore/parallel.h"
#include "sharpcore/silu.h"
#include "sharpcore/sweep.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = GroupNormSiluArguments;

// Vectors that pass together, and share what is read of x and the scale.
constexpr int kTile = 2;

// Partial sums side by side, and terms that one lane adds up in T before they go into a double: keeps float sums as
// exact as pairwise ones. Neither depends on the tile, so a vector's result does not depend on its neighbours.
constexpr int kStrip = 4;
constexpr Index kTermsPerLane = 32;

// Rows of a channels-last block that are summed, or written, while their channels' constants stay in registers.
constexpr int kSumRows = 8;
constexpr int kWriteRows = 4;
constexpr Index kFlushRows = 16 * kSumRows;

// What a sweep does with the scale: computes it, computes and keeps it, reads what was kept, or computes it while
// memory is waited for, in rows that are fetched ahead as no cache holds their block.
enum class Scale { compute, keep, read, compute_afar };

// How many rows ahead.
constexpr Index kRowsAhead = 8;

// What the sums of a group come to: the mean of v, and that of v xhat times rstd, as x - mean lacks it.
template <class T>
struct Means {
    T offset, slope;

    Means(double sum, double product, Index size, T rstd)
        : offset(static_cast<T>(sum / static_cast<double>(size))),
          slope(static_cast<T>(product / static_cast<double>(size) * rstd * rstd)) {}
};

template <bool adjoint, class T>
inline Vec<T> result_of(Vec<T> v, Vec<T> centred, Vec<T> scale, Vec<T> offset, Vec<T> slope) {
    if constexpr (adjoint) return scale * v - offset - centred * slope;
    return scale * (v - offset - centred * slope);
}

// The scale at one vector of x - mean; gain is weight rstd.
template <bool silu, Scale mode, class T, class Access>
inline Vec<T> scale_at(Access access, T* kept, Vec<T> centred, Vec<T> gain, Vec<T> bias) {
    if constexpr (!silu) return gain;
    if constexpr (mode == Scale::read) return access.read(kept);
    const Vec<T> scale = silu_derivative<T>(gain * centred + bias) * gain;
    if constexpr (mode == Scale::keep) access.write(kept, scale);
    return scale;
}

// Calls sweep(constant of the mode) for a mode that is known when the program runs.
template <Scale mode>
struct Mode {
    static constexpr Scale value = mode;
};

// Whether the results of this storage type may be stored past the cache.
template <class S>
constexpr bool kStreams = false;
template <>
constexpr bool kStreams<float> = kCanStream;

template <bool silu, class Sweep>
inline void with_mode(Scale mode, Sweep sweep) {
    if (mode == Scale::compute_afar)
        sweep(Mode<Scale::compute_afar>{});
    else if (!silu || mode == Scale::compute)
        sweep(Mode<Scale::compute>{});
    else if (mode == Scale::keep)
        sweep(Mode<silu ? Scale::keep : Scale::compute>{});
    else
        sweep(Mode<silu ? Scale::read : Scale::compute>{});
}

// ---- Positions fastest: a group is one run of its channels. ----

// Constants of one channel.
template <class T>
struct Channel {
    Vec<T> mean, gain, bias;
};

template <class T>
struct Totals {
    double sum[kLanes<T>] = {}, product[kLanes<T>] = {};

    Means<T> means(Index size, T rstd) const {
        double all_sum = 0, all_product = 0;
        for (Index lane = 0; lane < kLanes<T>; ++lane) {
            all_sum += sum[lane];
            all_product += product[lane];
        }
        return {all_sum, all_product, size, rstd};
    }
};

// Adds v and v (x - mean), for cotangents scale v and scale v (x - mean), to the totals of each vector of a tile.
template <bool adjoint, bool silu, Scale mode, int tile, class S, class T>
__attribute__((noinline)) void run_sums(Totals<T>* totals, const S* const* vectors, const S* x, T* kept, Index size,
                                        const Channel<T>& channel) {
    Vec<T> sum[tile][kStrip] = {}, product[tile][kStrip] = {};
    const S* v[tile];
    for (int t = 0; t < tile; ++t) v[t] = vectors[t];
    const auto add = [&](int j, auto access) {
        const Vec<T> centred = access.read(x) - channel.mean;
        Vec<T> scale{};
        if constexpr (adjoint) scale = scale_at<silu, mode, T>(access, kept, centred, channel.gain, channel.bias);
#pragma GCC unroll 2
        for (int t = 0; t < tile; ++t) {
            Vec<T> vector = access.read(v[t]);
            if constexpr (adjoint) vector *= scale;
            sum[t][j] += vector;
            product[t][j] += vector * centred;
        }
    };
    const auto flush = [&] {
        for (int t = 0; t < tile; ++t) {
            add_lanes<T>(totals[t].sum, (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]));
            add_lanes<T>(totals[t].product, (product[t][0] + product[t][1]) + (product[t][2] + product[t][3]));
            for (int j = 0; j < kStrip; ++j) sum[t][j] = product[t][j] = Vec<T>{};
        }
    };
    Index i = 0;
    while (i + kStrip * kLanes<T> <= size) {
        for (Index term = 0; term < kTermsPerLane && i + kStrip * kLanes<T> <= size; ++term)
#pragma GCC unroll 4
            for (int j = 0; j < kStrip; ++j, i += kLanes<T>) add(j, WholeVector{i});
        flush();
    }
    for (; i + kLanes<T> <= size; i += kLanes<T>) add(0, WholeVector{i});
    // Zeros in the lanes past the end of v: what x - mean is there does not matter.
    if (i < size) add(1, PartOfVector{i, size - i});
    flush();
}

template <bool adjoint, bool silu, Scale mode, bool streaming, int tile, class S, class T>
__attribute__((noinline)) void run_write(S* const* results, const S* const* vectors, const S* x, T* kept, Index size,
                                         const Channel<T>& channel, const Means<T>* means) {
    Vec<T> offset[tile], slope[tile];
    const S* v[tile];
    S* out[tile];
    for (int t = 0; t < tile; ++t) {
        offset[t] = broadcast(means[t].offset);
        slope[t] = broadcast(means[t].slope);
        v[t] = vectors[t];
        out[t] = results[t];
    }
    sweep_row<T>(size, [&](auto access) {
        const Vec<T> centred = access.read(x) - channel.mean;
        const Vec<T> scale = scale_at<silu, mode, T>(access, kept, centred, channel.gain, channel.bias);
#pragma GCC unroll 2
        for (int t = 0; t < tile; ++t) {
            const Vec<T> result = result_of<adjoint, T>(access.read(v[t]), centred, scale, offset[t], slope[t]);
            if constexpr (streaming)
                stream(out[t] + access.at, result);
            else
                access.write(out[t], result);
        }
    });
}

// ---- Channels fastest: whole groups side by side make a block; its rows, one a position, lie `stride` apart. ----

template <class T>
struct Block {
    Index channels, positions, stride;
    double *sums, *products;       // [kTile, channels]
    T *sum, *product;              // [kTile, channels], on their way into sums and products
    T *mean, *rstd, *gain, *bias;  // [channels]
    T *offset, *slope;             // [kTile, channels]
    T* kept;                       // [positions, channels]

    static Index bytes(Index channels, Index kept_positions) {
        return channels * (2 * kTile * static_cast<Index>(sizeof(double)) +
                           (4 + 4 * kTile + kept_positions) * static_cast<Index>(sizeof(T)));
    }

    Block(void* memory, Index block_channels, Index block_positions, Index row_stride)
        : channels(block_channels), positions(block_positions), stride(row_stride) {
        sums = static_cast<double*>(memory);
        products = sums + kTile * channels;
        sum = reinterpret_cast<T*>(products + kTile * channels);
        product = sum + kTile * channels;
        offset = product + kTile * channels;
        slope = offset + kTile * channels;
        mean = slope + kTile * channels;
        rstd = mean + channels;
        gain = rstd + channels;
        bias = gain + channels;
        kept = bias + channels;
    }
};

template <Scale mode, int tile, class S, class Access>
inline void fetch_ahead(const S* const (&v)[tile], const S* x, Index row, Index stride, Access access) {
    if constexpr (mode == Scale::compute_afar) {
        const Index far = row + kRowsAhead * stride + access.at;
        __builtin_prefetch(x + far);
        for (int t = 0; t < tile; ++t) __builtin_prefetch(v[t] + far);
    }
}

template <bool adjoint, bool silu, Scale mode, int tile, int rows, class S, class T, class Access>
inline void add_rows(const Block<T>& block, const S* const (&v)[tile], const S* x, Index position, Access access) {
    const Vec<T> mean = access.read(block.mean);
    Vec<T> gain{}, bias{}, sum[tile] = {}, product[tile] = {};
    if constexpr (adjoint) {
        gain = access.read(block.gain);
        if constexpr (silu && mode != Scale::read) bias = access.read(block.bias);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const Index row = (position + r) * block.stride;
        fetch_ahead<mode, tile>(v, x, row, block.stride, access);
        const Vec<T> centred = access.read(x + row) - mean;
        Vec<T> scale{};
        if constexpr (adjoint)
            scale = scale_at<silu, mode, T>(access, block.kept + (position + r) * block.channels, centred, gain, bias);
#pragma GCC unroll 2
        for (int t = 0; t < tile; ++t) {
            Vec<T> vector = access.read(v[t] + row);
            if constexpr (adjoint) vector *= scale;
            sum[t] += vector;
            product[t] += vector * centred;
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < tile; ++t) {
        T *const sums = block.sum + t * block.channels, *const products = block.product + t * block.channels;
        access.write(sums, access.read(sums) + sum[t]);
        access.write(products, access.read(products) + product[t]);
    }
}

template <bool adjoint, bool silu, Scale mode, int tile, class S, class T>
__attribute__((noinline)) void rows_sums(const Block<T>& block, const S* const* vectors, const S* x) {
    const S* v[tile];
    for (int t = 0; t < tile; ++t) v[t] = vectors[t];
    for (Index i = 0; i < tile * block.channels; ++i) block.sums[i] = block.products[i] = 0;
    for (Index p = 0; p < block.positions;) {
        const Index end = p + kFlushRows < block.positions ? p + kFlushRows : block.positions;
        for (Index i = 0; i < tile * block.channels; ++i) block.sum[i] = block.product[i] = 0;
        for (; p + kSumRows <= end; p += kSumRows)
            sweep_row<T>(block.channels,
                         [&](auto access) { add_rows<adjoint, silu, mode, tile, kSumRows>(block, v, x, p, access); });
        for (; p < end; ++p)
            sweep_row<T>(block.channels,
                         [&](auto access) { add_rows<adjoint, silu, mode, tile, 1>(block, v, x, p, access); });
        for (Index i = 0; i < tile * block.channels; ++i) {
            block.sums[i] += static_cast<double>(block.sum[i]);
            block.products[i] += static_cast<double>(block.product[i]);
        }
    }
}

template <bool adjoint, bool silu, Scale mode, bool streaming, int tile, int rows, class S, class T, class Access>
inline void write_rows(const Block<T>& block, S* const (&out)[tile], const S* const (&v)[tile], const S* x,
                       Index position, Access access) {
    const Vec<T> mean = access.read(block.mean), gain = access.read(block.gain);
    Vec<T> bias{}, offset[tile], slope[tile];
    if constexpr (silu && mode != Scale::read) bias = access.read(block.bias);
    for (int t = 0; t < tile; ++t) {
        offset[t] = access.read(block.offset + t * block.channels);
        slope[t] = access.read(block.slope + t * block.channels);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const Index row = (position + r) * block.stride;
        fetch_ahead<mode, tile>(v, x, row, block.stride, access);
        const Vec<T> centred = access.read(x + row) - mean;
        const Vec<T> scale =
            scale_at<silu, mode, T>(access, block.kept + (position + r) * block.channels, centred, gain, bias);
#pragma GCC unroll 2
        for (int t = 0; t < tile; ++t) {
            const Vec<T> result = result_of<adjoint, T>(access.read(v[t] + row), centred, scale, offset[t], slope[t]);
            if constexpr (streaming)
                stream(out[t] + row + access.at, result);
            else
                access.write(out[t] + row, result);
        }
    }
}

template <bool adjoint, bool silu, Scale mode, bool streaming, int tile, class S, class T>
__attribute__((noinline)) void rows_write(const Block<T>& block, S* const* results, const S* const* vectors,
                                          const S* x) {
    const S* v[tile];
    S* out[tile];
    for (int t = 0; t < tile; ++t) {
        v[t] = vectors[t];
        out[t] = results[t];
    }
    Index p = 0;
    for (; p + kWriteRows <= block.positions; p += kWriteRows)
        sweep_row<T>(block.channels, [&](auto access) {
            write_rows<adjoint, silu, mode, streaming, tile, kWriteRows>(block, out, v, x, p, access);
        });
    for (; p < block.positions; ++p)
        sweep_row<T>(block.channels, [&](auto access) {
            write_rows<adjoint, silu, mode, streaming, tile, 1>(block, out, v, x, p, access);
        });
}

// ---- Tasks: one is a block of groups of one sample, for a range of the tiles of K. ----

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index groups_per_block, blocks, tiles, splits;  // splits: ranges of the tiles
    bool afar;                                      // whether no cache holds a channels-last block
    bool streaming;                                 // whether results are stored past the cache
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
    bool afar, streaming;

    Task(const Work& work, Index task) : a(work.arguments), afar(work.afar), streaming(work.streaming) {
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

// Cotangents need the scale in the first sweep, which keeps it for the second one.
template <bool adjoint>
inline Scale mode_of_sums(Scale mode) {
    return adjoint && mode == Scale::compute ? Scale::keep : mode;
}

template <bool adjoint>
inline Scale mode_of_write(Scale mode) {
    return adjoint && mode != Scale::compute_afar ? Scale::read : mode;
}

template <bool adjoint, bool silu, class S>
void do_run(const Task<S>& task, Compute<S>* kept) {
    using T = Compute<S>;
    const Arguments& a = task.a;
    const Index group = task.first_group;
    const T rstd = task.rstd(group);
    const S* const x = task.x();
    const auto channel = [&](Index c) {
        c += group * task.per_group;
        return Channel<T>{broadcast(task.mean(group)), broadcast(task.weight(c) * rstd), broadcast(task.bias(c))};
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
                                                                     now, means);
                else
                    run_write<adjoint, silu, how, false, tile>(to, from, x + begin, kept + begin, a.positions, now,
                                                               means);
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
        block.gain[c] = task.weight(task.start + c) * block.rstd[c];
        block.bias[c] = task.bias(task.start + c);
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

    Blocking(const Arguments& a, Index element_bytes) {
        const Index group_bytes = a.channels / a.groups * element_bytes;
        Index unit = 1;  // groups that end at a line's end
        while (unit < a.groups && unit * group_bytes % kLineBytes != 0) ++unit;
        const auto rounded = [&](Index number) { return (number + unit - 1) / unit * unit; };
        groups = rounded((kBlockBytes + group_bytes - 1) / group_bytes);
        if (groups > a.groups) groups = a.groups;
        // x, the scale and a tile of vectors.
        afar = groups * group_bytes * a.positions * (2 + (a.count < kTile ? a.count : kTile)) > kCacheBytes;
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

bool can_stream(const Arguments& a, Index element_bytes, Index groups_per_block) {
    const auto aligned = [&](Index elements) { return elements * element_bytes % kLineBytes == 0; };
    const Index block = groups_per_block * (a.channels / a.groups);
    return a.count * a.batch * a.channels * a.positions * element_bytes > kStreamBytes &&
           reinterpret_cast<std::uintptr_t>(a.out) % kLineBytes == 0 && aligned(a.out_count_stride) &&
           aligned(a.out_batch_stride) &&
           (a.channels_last ? aligned(a.channels) && aligned(block) : aligned(a.positions));
}

template <bool adjoint, class S>
void run(const Arguments& a) {
    using T = Compute<S>;
    const Index element_bytes = static_cast<Index>(sizeof(S)), per_group = a.channels / a.groups;
    const Blocking blocking(a, element_bytes);
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
    const Index kept_positions = a.silu && !afar && (adjoint || a.count > kTile) ? a.positions : 0;
    const Index channels = groups_per_block * per_group;
    const Scratch scratch(threads, a.channels_last ? Block<T>::bytes(channels, kept_positions)
                                                   : channels * kept_positions * static_cast<Index>(sizeof(T)));
    const bool streaming = kStreams<S> && can_stream(a, element_bytes, groups_per_block);
    const Work work{a, scratch, groups_per_block, blocks, tiles, splits, afar, streaming};
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
