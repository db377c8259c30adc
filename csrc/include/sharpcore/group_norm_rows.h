// The two sweeps of GroupNorm's derivative where channels are fastest in memory: whole groups side by side make a
// block; its rows, one a position, lie `stride` apart. For the source of that derivative only.
#pragma once

#include "sharpcore/group_norm_scale.h"

namespace sharpcore::SHARPCORE_ISA {

// Rows that are summed, or written, while their channels' constants stay in registers, and rows that are added up in T.
constexpr int kSumRows = 8;
constexpr int kWriteRows = 4;
constexpr Index kFlushRows = 16 * kSumRows;

// How many rows ahead a block that no cache holds is asked for, and the lines that its results go to.
constexpr Index kRowsAhead = 8;
constexpr Index kWriteRowsAhead = 4;

template <class T>
struct Block {
    Index channels, positions, stride;
    double *sums, *products;  // [kTile, channels]
    T *sum, *product;         // [kTile, channels], on their way into sums and products
    T *mean, *rstd;           // [channels]
    T *gain, *rate, *start;   // [channels]
    T *offset, *slope;        // [kTile, channels]
    T* kept;                  // [positions, channels]

    static Index bytes(Index channels, Index kept_positions) {
        return channels * (2 * kTile * static_cast<Index>(sizeof(double)) +
                           (5 + 4 * kTile + kept_positions) * static_cast<Index>(sizeof(T)));
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
        rate = gain + channels;
        start = rate + channels;
        kept = start + channels;
    }
};

// Asks for what is read in a while; into the second-level cache, as the first one does not hold so many rows.
template <Scale mode, int tile, class S, class Access>
inline void fetch_ahead(const S* const (&v)[tile], const S* x, Index row, Index stride, Access access) {
    if constexpr (mode == Scale::compute_afar) {
        const Index far = row + kRowsAhead * stride + access.at;
        __builtin_prefetch(x + far, 0, 2);
        for (int t = 0; t < tile; ++t) __builtin_prefetch(v[t] + far, 0, 2);
    }
}

template <bool adjoint, bool silu, Scale mode, int tile, int rows, class S, class T, class Access>
inline void add_rows(const Block<T>& block, const S* const (&v)[tile], const S* x, Index position, Access access) {
    const Vec<T> mean = access.read(block.mean);
    Vec<T> gain{}, rate{}, start{}, sum[tile] = {}, product[tile] = {};
    if constexpr (adjoint) {
        gain = access.read(block.gain);
        if constexpr (silu && mode != Scale::read) {
            rate = access.read(block.rate);
            start = access.read(block.start);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const Index row = (position + r) * block.stride;
        fetch_ahead<mode, tile>(v, x, row, block.stride, access);
        const Vec<T> centred = access.read(x + row) - mean;
        Vec<T> scale{};
        if constexpr (adjoint)
            scale = scale_at<silu, mode, T>(access, block.kept + (position + r) * block.channels, centred, gain, rate,
                                            start);
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
    Vec<T> rate{}, start{}, offset[tile], slope[tile];
    if constexpr (silu && mode != Scale::read) {
        rate = access.read(block.rate);
        start = access.read(block.start);
    }
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
            scale_at<silu, mode, T>(access, block.kept + (position + r) * block.channels, centred, gain, rate, start);
#pragma GCC unroll 2
        for (int t = 0; t < tile; ++t) {
            const Vec<T> result = result_of<adjoint, T>(access.read(v[t] + row), centred, scale, offset[t], slope[t]);
            if constexpr (streaming) {
                stream(out[t] + row + access.at, result);
            } else {
                if constexpr (mode == Scale::compute_afar)
                    __builtin_prefetch(out[t] + row + kWriteRowsAhead * block.stride + access.at, 1, 2);
                access.write(out[t] + row, result);
            }
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
    // Results that have to come into the cache first do so best in the order in which they lie.
    constexpr int together = mode == Scale::compute_afar && !streaming ? 1 : kWriteRows;
    Index p = 0;
    for (; p + together <= block.positions; p += together)
        sweep_row<T>(block.channels, [&](auto access) {
            write_rows<adjoint, silu, mode, streaming, tile, together>(block, out, v, x, p, access);
        });
    for (; p < block.positions; ++p)
        sweep_row<T>(block.channels, [&](auto access) {
            write_rows<adjoint, silu, mode, streaming, tile, 1>(block, out, v, x, p, access);
        });
}

}  // namespace sharpcore::SHARPCORE_ISA
