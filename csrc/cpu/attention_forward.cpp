// Attention by tiles of query rows that walk over blocks of keys, with a running maximum of each row (online softmax).
#include "sharpcore/attention_forward.h"

#include "sharpcore/attention_tile.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionForwardArguments;

constexpr Index panels_per_tile(const AttentionPrimal& p) { return p.width + 2 + p.value_width; }

// Scratch memory of one tile. Panels have kTileRows columns, one a query row.
template <class T>
struct RowTile {
    T *query, *largest, *sum, *outputs;  // [width]: scale * q, [1], [1]: of exp(score - largest), [value_width]
    Index first_row, rows;

    RowTile() = default;
    RowTile(T* memory, const AttentionPrimal& p, Index first)
        : query(memory),
          largest(query + p.width * kTileRows<T>),
          sum(largest + kTileRows<T>),
          outputs(sum + kTileRows<T>),
          first_row(first),
          rows(p.rows - first < kTileRows<T> ? p.rows - first : kTileRows<T>) {}
};

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Shares shares;
};

// scores[i] = panel^T rows[first + i], added to what is there where `masked`; `largest` = max(largest, scores).
template <bool masked, class T>
void fill_scores(T* scores, const T* panel, T* largest, const Rows<T>& rows, Index first, Index count, Index width) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> score;
        score.add_product(panel, rows.row(first + i), rows.stride, 1, width);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> most = load(largest + h * kLanes<T>);
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                T* place = scores + (i + m) * kTileRows<T> + h * kLanes<T>;
                if constexpr (masked) score.at[m][h] += load(place);
                store(place, score.at[m][h]);
                most = score.at[m][h] > most ? score.at[m][h] : most;
            }
            store(largest + h * kLanes<T>, most);
        }
    });
}

// Scores become probabilities up to a factor, exp(score - largest); `sum` grows by them.
template <class T>
void fill_weights(T* scores, const T* shift, T* sum, Index count) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        constexpr int together = down < 4 ? down : 4;
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> total{};
#pragma GCC unroll 16
            for (int m = 0; m < down; m += together) {
                T* place = scores + (i + m) * kTileRows<T> + h * kLanes<T>;
                Vec<T> x[together];
#pragma GCC unroll 16
                for (int n = 0; n < together; ++n) x[n] = load(place + n * kTileRows<T>) - load(shift + h * kLanes<T>);
                exp_or_zero<T>(x);
#pragma GCC unroll 16
                for (int n = 0; n < together; ++n) {
                    store(place + n * kTileRows<T>, x[n]);
                    total += x[n];
                }
            }
            store(sum + h * kLanes<T>, load(sum + h * kLanes<T>) + total);
        }
    });
}

// log(x) for x >= 1, by Newton's method on exp from the linear interpolation between powers of two; each step squares
// an error that begins below 0.06.
template <class T>
Vec<T> log(Vec<T> x) {
    using C = ExpConstants<T>;
    constexpr T ln2_per_bit = static_cast<T>(0.6931471805599453 / (std::int64_t{1} << C::mantissa));
    typename VectorOf<T>::Bits bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits -= C::one;
    Vec<T> y{};
    for (Index lane = 0; lane < kLanes<T>; ++lane) y[lane] = static_cast<T>(bits[lane]) * ln2_per_bit;
    for (int step = 0; step < (sizeof(T) == 4 ? 3 : 4); ++step) {
        Vec<T> inverse[1] = {-y};
        exp_or_zero<T>(inverse);
        y += x * inverse[0] - T(1);
    }
    return y;
}

template <class T>
void start(const RowTile<T>& tile, const AttentionPrimal& p, const Rows<T>& q) {
    pack_panel(tile.query, q.row(tile.first_row), q.stride, tile.rows, p.width, static_cast<T>(p.scale));
    for (Index i = 0; i < kTileRows<T>; ++i) tile.largest[i] = -static_cast<T>(__builtin_inf());
    for (Index i = 0; i < (1 + p.value_width) * kTileRows<T>; ++i) tile.sum[i] = 0;
}

// Scores of one block of keys, their weights, and the outputs so far brought to the new maximum.
template <class T>
void add_block(T* scores, const RowTile<T>& tile, const AttentionPrimal& p, const T* mask, const Rows<T>& k,
               const Rows<T>& v, Index key, Index keys) {
    T before[kTileRows<T>], shift[kTileRows<T>];
    for (Index i = 0; i < kTileRows<T>; ++i) before[i] = tile.largest[i];
    if (mask != nullptr) {
        fill_mask(scores, mask + tile.first_row * p.mask_row_stride + key * p.mask_key_stride, p.mask_row_stride,
                  tile.rows, p.mask_key_stride, keys);
        fill_scores<true>(scores, tile.query, tile.largest, k, key, keys, p.width);
    } else {
        fill_scores<false>(scores, tile.query, tile.largest, k, key, keys, p.width);
    }
    for (Index i = 0; i < kTileRows<T>; ++i) shift[i] = shift_of(tile.largest[i]);
    Vec<T> factor[kAcross];
#pragma GCC unroll 4
    for (int h = 0; h < kAcross; ++h) factor[h] = load(before + h * kLanes<T>) - load(shift + h * kLanes<T>);
    exp_or_zero<T>(factor);
    for (Index j = 0; j < 1 + p.value_width; ++j) {
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            T* place = tile.sum + j * kTileRows<T> + h * kLanes<T>;
            store(place, factor[h] * load(place));
        }
    }
    fill_weights(scores, shift, tile.sum, keys);
    add_product(tile.outputs, scores, v, key, keys, p.value_width);
}

template <class T>
void finish(const RowTile<T>& tile, const AttentionPrimal& p, const Rows<T>& out, T* lse) {
    T factor[kTileRows<T>], logs[kTileRows<T>];
    for (Index i = 0; i < kTileRows<T>; i += kLanes<T>) store(logs + i, log<T>(load(tile.sum + i)));
    for (Index i = 0; i < tile.rows; ++i) {
        const bool none = tile.sum[i] == 0;
        factor[i] = none ? T(0) : T(1) / tile.sum[i];
        lse[i * p.lse_row_stride] = none ? -static_cast<T>(__builtin_inf()) : tile.largest[i] + logs[i];
    }
    unpack_panel(tile.outputs, tile.rows, p.value_width, [&](Index r, Index begin, Vec<T> entries, Index count) {
        T* place = const_cast<T*>(out.row(tile.first_row + r)) + begin;
        if (count == kLanes<T>)
            store(place, factor[r] * entries);
        else
            store_partial(place, factor[r] * entries, count);
    });
}

template <class T>
void do_task(const void* job, Index task, int slot) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const AttentionPrimal& p = work.arguments.primal;
    const Shares& shares = work.shares;
    const Index which = task % shares.heads, group = task / shares.heads;
    const Index batch = which / p.heads, head = which % p.heads;
    const Rows<T> q(p.q, 0, batch, head), k(p.k, 0, batch, head), v(p.v, 0, batch, head), out(p.out, 0, batch, head);
    T* const lse = const_cast<T*>(static_cast<const T*>(p.lse)) + batch * p.lse_batch_stride + head * p.lse_head_stride;
    const T* mask = static_cast<const T*>(p.mask);
    if (mask != nullptr) mask += batch * p.mask_batch_stride + head * p.mask_head_stride;

    T* const scores = static_cast<T*>(work.scratch.slot(slot));
    RowTile<T> own[kTiles];
    Index tiles = 0;
    for (Index row = group * shares.tiles * kTileRows<T>; tiles < shares.tiles && row < p.rows; row += kTileRows<T>) {
        own[tiles] = RowTile<T>(scores + (kBlock + tiles * panels_per_tile(p)) * kTileRows<T>, p, row);
        start(own[tiles++], p, q);
    }
    for (Index key = 0; key < p.keys; key += kBlock) {
        const Index keys = p.keys - key < kBlock ? p.keys - key : kBlock;
        for (Index i = 0; i < tiles; ++i) add_block(scores, own[i], p, mask, k, v, key, keys);
    }
    for (Index i = 0; i < tiles; ++i) finish(own[i], p, out, lse + own[i].first_row * p.lse_row_stride);
}

template <class T>
void run(const Arguments& a) {
    const AttentionPrimal& p = a.primal;
    const auto bytes = [&](Index tiles, Index) {
        return (kBlock + tiles * panels_per_tile(p)) * kTileRows<T> * static_cast<Index>(sizeof(T));
    };
    const int threads = a.threads > 1 ? a.threads : 1;
    const Index tiles = (p.rows + kTileRows<T> - 1) / kTileRows<T>;
    const Shares shares = share_out(p.batch * p.heads, tiles, 1, threads, bytes);
    const Scratch scratch(threads, bytes(shares.tiles, 1));
    const Work work{a, scratch, shares};
    parallel_for(shares.tasks(), threads, do_task<T>, &work);
}

}  // namespace

void attention_forward(const Arguments& arguments) {
    if (arguments.primal.float64)
        run<double>(arguments);
    else
        run<float>(arguments);
}

}  // namespace sharpcore::SHARPCORE_ISA
