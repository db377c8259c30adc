// K tangents or cotangents through GroupNorm and SiLU. What depends on x alone, scale = act'(u) weight rstd, is
// computed once per (sample, group) and stays in the cache while all K vectors pass: one sweep takes the two means of a
// vector, a second one, which finds the vector in the cache, writes the result.
#include "sharpcore/group_norm_silu_tangent.h"

#include "sharpcore/parallel.h"
#include "sharpcore/simd.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Index = std::int64_t;
using Arguments = GroupNormSiluArguments;

// Terms that one lane adds up in T before they go into a double: keeps float sums as exact as pairwise ones.
constexpr Index kTermsPerLane = 32;

// Width in vectors of a register-blocked strip of channels.
constexpr int kStrip = 4;

template <class T>
struct Sums {
    double vector;   // of v
    double product;  // of v (x - mean)
};

// act'(u) = sigmoid(u) (1 + u sigmoid(-u)); exp(-u) / (1 + exp(-u)) is sigmoid(-u) without cancellation.
template <class T>
inline Vec<T> silu_derivative(Vec<T> u) {
    u = clamp<T>(u, -ExpConstants<T>::limit, ExpConstants<T>::limit);
    const Vec<T> e = exp<T>(-u);
    const Vec<T> sigmoid = T(1) / (T(1) + e);
    return sigmoid * (T(1) + u * (e * sigmoid));
}

template <bool silu, class T>
inline Vec<T> scale_of(Vec<T> x, Vec<T> mean, Vec<T> rstd, Vec<T> weight, Vec<T> bias) {
    if constexpr (silu) return silu_derivative<T>(weight * ((x - mean) * rstd) + bias) * (weight * rstd);
    return weight * rstd;
}

template <class T>
inline void add_lanes(double* totals, Vec<T>& partial) {
    for (Index lane = 0; lane < kLanes<T>; ++lane) totals[lane] += static_cast<double>(partial[lane]);
    partial = Vec<T>{};
}

// ---- Positions fastest: a group is one run of `size` elements. ----

template <bool silu, class T>
void fill_scale(T* scale, const T* x, Index size, T mean, T rstd, T weight, T bias) {
    const Vec<T> m = broadcast(mean), r = broadcast(rstd), w = broadcast(weight), b = broadcast(bias);
    if (size < kLanes<T>) {
        store_partial(scale, scale_of<silu, T>(load_partial(x, size), m, r, w, b), size);
        return;
    }
    for (Index i = 0; i + kLanes<T> <= size; i += kLanes<T>)
        store(scale + i, scale_of<silu, T>(load(x + i), m, r, w, b));
    const Index last = size - kLanes<T>;
    store(scale + last, scale_of<silu, T>(load(x + last), m, r, w, b));
}

template <bool adjoint, class T>
Sums<T> run_sums(const T* v, const T* x, const T* scale, Index size, T mean) {
    const Vec<T> m = broadcast(mean);
    Vec<T> sum[kStrip] = {}, product[kStrip] = {};
    double sum_lanes[kLanes<T>] = {}, product_lanes[kLanes<T>] = {};
    const auto add = [&](int j, Vec<T> vector, Vec<T> input, Vec<T> factor) {
        if constexpr (adjoint) vector *= factor;
        sum[j] += vector;
        product[j] += vector * (input - m);
    };
    const auto flush = [&] {
        for (int j = 0; j < kStrip; ++j) {
            add_lanes<T>(sum_lanes, sum[j]);
            add_lanes<T>(product_lanes, product[j]);
        }
    };
    Index i = 0;
    while (i + kStrip * kLanes<T> <= size) {
        for (Index term = 0; term < kTermsPerLane && i + kStrip * kLanes<T> <= size; ++term) {
#pragma GCC unroll 4
            for (int j = 0; j < kStrip; ++j, i += kLanes<T>)
                add(j, load(v + i), load(x + i), adjoint ? load(scale + i) : Vec<T>{});
        }
        flush();
    }
    for (; i + kLanes<T> <= size; i += kLanes<T>)
        add(0, load(v + i), load(x + i), adjoint ? load(scale + i) : Vec<T>{});
    if (const Index rest = size - i; rest > 0)
        add(0, load_partial(v + i, rest), load_partial(x + i, rest),
            adjoint ? load_partial(scale + i, rest) : Vec<T>{});
    flush();
    Sums<T> total{0, 0};
    for (Index lane = 0; lane < kLanes<T>; ++lane) {
        total.vector += sum_lanes[lane];
        total.product += product_lanes[lane];
    }
    return total;
}

template <bool adjoint, class T>
inline Vec<T> result_of(Vec<T> v, Vec<T> x, Vec<T> scale, Vec<T> mean, Vec<T> offset, Vec<T> slope) {
    if constexpr (adjoint) return scale * v - offset - (x - mean) * slope;
    return scale * (v - offset - (x - mean) * slope);
}

template <bool adjoint, class T>
void run_write(T* out, const T* v, const T* x, const T* scale, Index size, T mean, T offset, T slope) {
    const Vec<T> m = broadcast(mean), o = broadcast(offset), s = broadcast(slope);
    Index i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>)
        store(out + i, result_of<adjoint, T>(load(v + i), load(x + i), load(scale + i), m, o, s));
    if (const Index rest = size - i; rest > 0)
        store_partial(out + i,
                      result_of<adjoint, T>(load_partial(v + i, rest), load_partial(x + i, rest),
                                            load_partial(scale + i, rest), m, o, s),
                      rest);
}

// ---- Channels fastest: whole groups side by side make a block; its rows, one a position, lie `stride` apart. ----

template <class T>
struct Block {
    Index channels, positions;
    T* scale;                                         // [positions, channels]
    T *mean, *rstd, *weight, *bias, *offset, *slope;  // [channels]
    double *sum, *product;                            // [channels]
};

template <int number>
struct Constant {
    static constexpr int value = number;
};

// Calls strip(first channel, number of vectors) until every channel of a row is covered. A strip that would run over
// the end of the row moves its last vector back and does some channels twice. A row narrower than one vector is a
// strip of 0 vectors: one that is loaded and stored in part.
template <class T, class Strip>
inline void for_strips(Index channels, Strip strip) {
    if (channels < kLanes<T>) return strip(0, Constant<0>{});
    for (Index c = 0; c < channels; c += kStrip * kLanes<T>) {
        switch ((channels - c + kLanes<T> - 1) / kLanes<T>) {
            case 1:
                strip(c, Constant<1>{});
                break;
            case 2:
                strip(c, Constant<2>{});
                break;
            case 3:
                strip(c, Constant<3>{});
                break;
            default:
                strip(c, Constant<kStrip>{});
        }
    }
}

// The vectors of one strip: where each begins, and how to read and write them.
template <class T, int vectors>
struct StripAccess {
    static constexpr int width = vectors == 0 ? 1 : vectors;
    Index begin[width];
    Index channels;

    StripAccess(Index first, Index row_channels) : channels(row_channels) {
        const Index limit = vectors == 0 ? 0 : row_channels - kLanes<T>;
        for (int j = 0; j < width; ++j) {
            const Index wish = first + j * kLanes<T>;
            begin[j] = wish < limit ? wish : limit;
        }
    }
    Vec<T> read(const T* row, int j) const {
        if constexpr (vectors == 0) return load_partial(row, channels);
        return load(row + begin[j]);
    }
    void write(T* row, int j, Vec<T> value) const {
        if constexpr (vectors == 0) return store_partial(row, value, channels);
        store(row + begin[j], value);
    }
    void read_all(const T* row, Vec<T> (&into)[width]) const {
        for (int j = 0; j < width; ++j) into[j] = read(row, j);
    }
};

template <bool silu, class T>
void rows_fill_scale(const Block<T>& block, const T* x, Index stride) {
    for_strips<T>(block.channels, [&](Index first, auto constant) {
        const StripAccess<T, decltype(constant)::value> strip(first, block.channels);
        constexpr int width = decltype(strip)::width;
        Vec<T> mean[width], rstd[width], weight[width], bias[width];
        strip.read_all(block.mean, mean);
        strip.read_all(block.rstd, rstd);
        strip.read_all(block.weight, weight);
        strip.read_all(block.bias, bias);
        for (Index p = 0; p < block.positions; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < width; ++j)
                strip.write(block.scale + p * block.channels, j,
                            scale_of<silu, T>(strip.read(x + p * stride, j), mean[j], rstd[j], weight[j], bias[j]));
    });
}

template <bool adjoint, class T>
void rows_sums(const Block<T>& block, const T* v, const T* x, Index stride) {
    for_strips<T>(block.channels, [&](Index first, auto constant) {
        const StripAccess<T, decltype(constant)::value> strip(first, block.channels);
        constexpr int width = decltype(strip)::width;
        Vec<T> mean[width], sum[width] = {}, product[width] = {};
        double sum_lanes[width][kLanes<T>] = {}, product_lanes[width][kLanes<T>] = {};
        strip.read_all(block.mean, mean);
        for (Index p = 0; p < block.positions;) {
            const Index end = p + kTermsPerLane < block.positions ? p + kTermsPerLane : block.positions;
            for (; p < end; ++p) {
#pragma GCC unroll 4
                for (int j = 0; j < width; ++j) {
                    Vec<T> vector = strip.read(v + p * stride, j);
                    if constexpr (adjoint) vector *= strip.read(block.scale + p * block.channels, j);
                    sum[j] += vector;
                    product[j] += vector * (strip.read(x + p * stride, j) - mean[j]);
                }
            }
            for (int j = 0; j < width; ++j) {
                add_lanes<T>(sum_lanes[j], sum[j]);
                add_lanes<T>(product_lanes[j], product[j]);
            }
        }
        for (int j = 0; j < width; ++j) {
            for (Index lane = 0; lane < kLanes<T> && strip.begin[j] + lane < block.channels; ++lane) {
                block.sum[strip.begin[j] + lane] = sum_lanes[j][lane];
                block.product[strip.begin[j] + lane] = product_lanes[j][lane];
            }
        }
    });
}

template <bool adjoint, class T>
void rows_write(const Block<T>& block, T* out, const T* v, const T* x, Index stride) {
    for_strips<T>(block.channels, [&](Index first, auto constant) {
        const StripAccess<T, decltype(constant)::value> strip(first, block.channels);
        constexpr int width = decltype(strip)::width;
        Vec<T> mean[width], offset[width], slope[width];
        strip.read_all(block.mean, mean);
        strip.read_all(block.offset, offset);
        strip.read_all(block.slope, slope);
        for (Index p = 0; p < block.positions; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < width; ++j)
                strip.write(out + p * stride, j,
                            result_of<adjoint, T>(strip.read(v + p * stride, j), strip.read(x + p * stride, j),
                                                  strip.read(block.scale + p * block.channels, j), mean[j], offset[j],
                                                  slope[j]));
    });
}

// ---- Tasks: one is a block of groups of one sample, for a range of the K vectors. ----

template <class T>
struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index groups_per_block, blocks, splits;  // splits: ranges of K

    const T* at(const void* pointer, Index offset) const { return static_cast<const T*>(pointer) + offset; }
};

// offset and slope of a group from its sums: means of v and of v xhat, the latter times rstd as x - mean lacks it.
template <class T>
inline void coefficients(Sums<T> sums, Index size, T rstd, T& offset, T& slope) {
    const double count = static_cast<double>(size);
    offset = static_cast<T>(sums.vector / count);
    slope = static_cast<T>(sums.product / count * rstd * rstd);
}

template <bool adjoint, bool silu, class T>
void do_run(const Work<T>& work, Index sample, Index group, Index first, Index last, T* scale) {
    const Arguments& a = work.arguments;
    const Index per_group = a.channels / a.groups, size = per_group * a.positions;
    const Index start = group * size;
    const T mean = *work.at(a.mean, sample * a.groups + group), rstd = *work.at(a.rstd, sample * a.groups + group);
    const T* x = work.at(a.x, sample * a.x_batch_stride + start);
    for (Index c = 0; c < per_group; ++c) {
        const Index channel = group * per_group + c;
        fill_scale<silu, T>(scale + c * a.positions, x + c * a.positions, a.positions, mean, rstd,
                            a.weight == nullptr ? T(1) : *work.at(a.weight, channel),
                            a.bias == nullptr ? T(0) : *work.at(a.bias, channel));
    }
    for (Index k = first; k < last; ++k) {
        const T* v = work.at(a.vectors, k * a.vector_count_stride + sample * a.vector_batch_stride + start);
        T* out = static_cast<T*>(a.out) + k * a.out_count_stride + sample * a.out_batch_stride + start;
        T offset, slope;
        coefficients(run_sums<adjoint, T>(v, x, scale, size, mean), size, rstd, offset, slope);
        run_write<adjoint, T>(out, v, x, scale, size, mean, offset, slope);
    }
}

template <class T>
Block<T> carve_block(void* memory, Index channels, Index positions) {
    Block<T> block;
    block.channels = channels;
    block.positions = positions;
    block.sum = static_cast<double*>(memory);
    block.product = block.sum + channels;
    block.mean = reinterpret_cast<T*>(block.product + channels);
    block.rstd = block.mean + channels;
    block.weight = block.rstd + channels;
    block.bias = block.weight + channels;
    block.offset = block.bias + channels;
    block.slope = block.offset + channels;
    block.scale = block.slope + channels;
    return block;
}

template <class T>
Index block_bytes(Index channels, Index positions) {
    return channels * (2 * sizeof(double) + 6 * sizeof(T)) + channels * positions * sizeof(T);
}

template <bool adjoint, bool silu, class T>
void do_rows(const Work<T>& work, Index sample, Index first_group, Index first, Index last, void* memory) {
    const Arguments& a = work.arguments;
    const Index per_group = a.channels / a.groups, size = per_group * a.positions;
    const Index left = a.groups - first_group;
    const Index groups = left < work.groups_per_block ? left : work.groups_per_block;
    const Index start = first_group * per_group;
    const Block<T> block = carve_block<T>(memory, groups * per_group, a.positions);
    for (Index c = 0; c < block.channels; ++c) {
        const Index statistic = sample * a.groups + first_group + c / per_group;
        block.mean[c] = *work.at(a.mean, statistic);
        block.rstd[c] = *work.at(a.rstd, statistic);
        block.weight[c] = a.weight == nullptr ? T(1) : *work.at(a.weight, start + c);
        block.bias[c] = a.bias == nullptr ? T(0) : *work.at(a.bias, start + c);
    }
    const T* x = work.at(a.x, sample * a.x_batch_stride + start);
    rows_fill_scale<silu, T>(block, x, a.channels);
    for (Index k = first; k < last; ++k) {
        const T* v = work.at(a.vectors, k * a.vector_count_stride + sample * a.vector_batch_stride + start);
        T* out = static_cast<T*>(a.out) + k * a.out_count_stride + sample * a.out_batch_stride + start;
        rows_sums<adjoint, T>(block, v, x, a.channels);
        for (Index g = 0; g < groups; ++g) {
            Sums<T> sums{0, 0};
            for (Index c = g * per_group; c < (g + 1) * per_group; ++c) {
                sums.vector += block.sum[c];
                sums.product += block.product[c];
            }
            for (Index c = g * per_group; c < (g + 1) * per_group; ++c)
                coefficients(sums, size, block.rstd[c], block.offset[c], block.slope[c]);
        }
        rows_write<adjoint, T>(block, out, v, x, a.channels);
    }
}

template <bool adjoint, bool silu, class T>
void do_task(const void* job, Index task, int slot) noexcept {
    const Work<T>& work = *static_cast<const Work<T>*>(job);
    const Arguments& a = work.arguments;
    const Index split = task % work.splits, part = task / work.splits;
    const Index sample = part / work.blocks, group = part % work.blocks * work.groups_per_block;
    const Index first = split * a.count / work.splits, last = (split + 1) * a.count / work.splits;
    void* memory = work.scratch.slot(slot);
    if (a.channels_last)
        do_rows<adjoint, silu, T>(work, sample, group, first, last, memory);
    else
        do_run<adjoint, silu, T>(work, sample, group, first, last, static_cast<T*>(memory));
}

// Channels of a channels-last block: at least this many bytes of each row, so that whole cache lines are used.
constexpr Index kBlockBytes = 256;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

template <bool adjoint, class T>
void run(const Arguments& a) {
    const Index per_group = a.channels / a.groups, group_bytes = per_group * static_cast<Index>(sizeof(T));
    Index groups_per_block = a.channels_last ? (kBlockBytes + group_bytes - 1) / group_bytes : 1;
    if (groups_per_block > a.groups) groups_per_block = a.groups;
    const Index blocks = (a.groups + groups_per_block - 1) / groups_per_block;
    Index splits = 1;
    if (a.threads > 1) {
        splits = (kTasksPerThread * a.threads + a.batch * blocks - 1) / (a.batch * blocks);
        if (splits > a.count) splits = a.count;
    }
    const int threads = a.threads > 1 ? a.threads : 1;
    const Scratch scratch(threads, block_bytes<T>(groups_per_block * per_group, a.positions));
    const Work<T> work{a, scratch, groups_per_block, blocks, splits};
    parallel_for(a.batch * blocks * splits, threads, a.silu ? do_task<adjoint, true, T> : do_task<adjoint, false, T>,
                 &work);
}

template <bool adjoint>
void run_any(const Arguments& a) {
    if (a.float64)
        run<adjoint, double>(a);
    else
        run<adjoint, float>(a);
}

}  // namespace

void group_norm_silu_tangent(const Arguments& arguments) { run_any<false>(arguments); }

void group_norm_silu_adjoint(const Arguments& arguments) { run_any<true>(arguments); }

}  // namespace sharpcore::SHARPCORE_ISA
