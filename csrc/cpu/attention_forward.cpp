// Attention by tiles of query rows that walk over blocks of keys, with a running maximum of each row (online softmax).
#include "sharpcore/attention_forward.h"

#include "sharpcore/attention_shares.h"
#include "sharpcore/attention_tile.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionForwardArguments;

template <class Term>
constexpr Index panels_per_tile(const AttentionPrimal& p) {
    return terms_of<Term>(p.width) + 2 + p.value_width;
}

// Scratch memory of one tile. Panels have kTileRows columns, one a query row.
template <class N>
struct RowTile {
    using T = typename N::T;
    using Term = typename N::Term;

    Term* query;                 // [terms of width]: q as it is multiplied with k
    T *largest, *sum, *outputs;  // [1], [1]: of exp(score - largest), [value_width]
    Index first_row, rows;

    RowTile() = default;
    RowTile(T* memory, const AttentionPrimal& p, Index first)
        : query(reinterpret_cast<Term*>(memory)),
          largest(memory + terms_of<Term>(p.width) * kTileRows<T>),
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

// scores[i] = panel^T rows[i], added to what is there where `masked`; `largest` = max(largest, scores).
template <bool masked, class Term, class T>
void fill_scores(T* scores, const Term* panel, const Scaling<Term>& scaling, T* largest, const Rows<Term>& rows,
                 Index count, Index terms) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> score;
        score.add_product(panel, rows.row(i), rows.stride, 1, terms);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> most = load(largest + h * kLanes<T>);
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                T* place = scores + (i + m) * kTileRows<T> + h * kLanes<T>;
                if constexpr (kPaired<Term>) score.at[m][h] *= scaling.score;
                if constexpr (masked) score.at[m][h] += load(place);
                store(place, score.at[m][h]);
                most = score.at[m][h] > most ? score.at[m][h] : most;
            }
            store(largest + h * kLanes<T>, most);
        }
    });
}

// weights = exp(score - largest), probabilities up to a factor; `sum` grows by them.
template <bool masked, class Term, class T>
void fill_weights(Term* weights, const T* scores, const T* shift, T* sum, Index count) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        constexpr int together = down < 4 ? down : 4;
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> total{};
#pragma GCC unroll 16
            for (int m = 0; m < down; m += together) {
                const Index lanes = h * kLanes<T>;
                Vec<T> x[together];
#pragma GCC unroll 16
                for (int n = 0; n < together; ++n) {
                    x[n] = load(scores + (i + m + n) * kTileRows<T> + lanes) - load(shift + lanes);
                }
                power_or_zero<PowerOf<Term>, kNatural<Term, masked>, T>(x);
#pragma GCC unroll 16
                for (int n = 0; n < together; ++n) total += x[n];
                store_terms(weights + terms_of<Term>(i + m) * kTileRows<T> + lanes, x);
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
        power_or_zero<PowerConstants<T>, true, T>(inverse);
        y += x * inverse[0] - T(1);
    }
    return y;
}

template <class N>
void start(const RowTile<N>& tile, const AttentionPrimal& p, const Rows<typename N::Storage>& q,
           const Scaling<typename N::Term>& scaling) {
    using T = typename N::T;
    pack_panel(tile.query, q.row(tile.first_row), q.stride, tile.rows, p.width, scaling.panel);
    for (Index i = 0; i < kTileRows<T>; ++i) tile.largest[i] = -static_cast<T>(__builtin_inf());
    for (Index i = 0; i < (1 + p.value_width) * kTileRows<T>; ++i) tile.sum[i] = 0;
}

// Scores of one block of keys, their weights, and the outputs so far brought to the new maximum. `mask` is the entry of
// the mask that belongs to the first row and key.
template <bool masked, class N>
void add_block(typename N::T* scores, typename N::Term* weights, const RowTile<N>& tile, const AttentionPrimal& p,
               const Scaling<typename N::Term>& scaling, Index mask, const Rows<typename N::Term>& k,
               const Rows<typename N::Term>& v, Index keys) {
    using T = typename N::T;
    using Term = typename N::Term;
    T before[kTileRows<T>], shift[kTileRows<T>];
    for (Index i = 0; i < kTileRows<T>; ++i) before[i] = tile.largest[i];
    if constexpr (masked) fill_mask(scores, p.mask, mask, p.mask.row_stride, tile.rows, p.mask.key_stride, keys);
    fill_scores<masked>(scores, tile.query, scaling, tile.largest, k, keys, terms_of<Term>(p.width));
    for (Index i = 0; i < kTileRows<T>; ++i)
        shift[i] = tile.largest[i] == -static_cast<T>(__builtin_inf()) ? T(0) : tile.largest[i];
    Vec<T> factor[kAcross];
#pragma GCC unroll 4
    for (int h = 0; h < kAcross; ++h) {
        factor[h] = load(before + h * kLanes<T>) - load(shift + h * kLanes<T>);
    }
    power_or_zero<PowerConstants<T>, kNatural<Term, masked>, T>(factor);
    for (Index j = 0; j < 1 + p.value_width; ++j) {
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            T* place = tile.sum + j * kTileRows<T> + h * kLanes<T>;
            store(place, factor[h] * load(place));
        }
    }
    fill_weights<masked>(weights, scores, shift, tile.sum, keys);
    add_product(tile.outputs, weights, v, terms_of<Term>(keys), p.value_width);
}

template <class N>
void finish(const RowTile<N>& tile, const AttentionPrimal& p, const Rows<typename N::Storage>& out,
            typename N::T* lse) {
    using T = typename N::T;
    const T unit = static_cast<T>(kNatural<typename N::Term, false> || p.mask.data != nullptr ? 1.0 : kLn2);
    T factor[kTileRows<T>], logs[kTileRows<T>];
    for (Index i = 0; i < kTileRows<T>; i += kLanes<T>) store(logs + i, log<T>(load(tile.sum + i)));
    for (Index i = 0; i < tile.rows; ++i) {
        const bool none = tile.sum[i] == 0;
        factor[i] = none ? T(0) : T(1) / tile.sum[i];
        lse[i * p.lse_row_stride] = none ? -static_cast<T>(__builtin_inf()) : tile.largest[i] * unit + logs[i];
    }
    unpack_panel(tile.outputs, tile.rows, p.value_width, [&](Index r, Index begin, Vec<T> entries, Index count) {
        auto* place = const_cast<typename N::Storage*>(out.row(tile.first_row + r)) + begin;
        if (count == kLanes<T>)
            store(place, factor[r] * entries);
        else
            store_first(place, factor[r] * entries, count);
    });
}

template <class N>
constexpr Index bytes_of_task(const AttentionPrimal& p, Index tiles) {
    using T = typename N::T;
    using Term = typename N::Term;
    using Storage = typename N::Storage;
    const Index panels = kBlock + terms_of<Term>(kBlock) + tiles * panels_per_tile<Term>(p);
    const Index terms =
        terms_in_memory<Term, Storage>(kBlock, p.width) + terms_in_memory<Term, Storage>(kBlock, p.value_width);
    return (panels * kTileRows<T> + terms) * static_cast<Index>(sizeof(T));
}

template <class N>
void do_task(const void* job, Index task, int slot) noexcept {
    using T = typename N::T;
    using Term = typename N::Term;
    using Storage = typename N::Storage;
    const Work& work = *static_cast<const Work*>(job);
    const AttentionPrimal& p = work.arguments.primal;
    const Shares& shares = work.shares;
    const Index which = task % shares.heads, group = task / shares.heads;
    const Index batch = which / p.heads, head = which % p.heads;
    const Rows<Storage> q(p.q, 0, batch, head), k(p.k, 0, batch, head), v(p.v, 0, batch, head),
        out(p.out, 0, batch, head);
    T* const lse = const_cast<T*>(static_cast<const T*>(p.lse)) + batch * p.lse_batch_stride + head * p.lse_head_stride;
    const Index mask_start = batch * p.mask.batch_stride + head * p.mask.head_stride;
    const bool masked = p.mask.data != nullptr;
    const Scaling<Term> scaling(p.scale, masked);

    T* memory = static_cast<T*>(work.scratch.slot(slot));
    T* const scores = memory;
    memory += kBlock * kTileRows<T>;
    Term* const weights = reinterpret_cast<Term*>(memory);
    memory += terms_of<Term>(kBlock) * kTileRows<T>;
    Term* const k_terms = reinterpret_cast<Term*>(memory);
    Term* const v_terms = k_terms + terms_in_memory<Term, Storage>(kBlock, p.width);
    memory += terms_in_memory<Term, Storage>(kBlock, p.width) + terms_in_memory<Term, Storage>(kBlock, p.value_width);
    RowTile<N> own[kTiles];
    Index tiles = 0;
    for (Index row = group * shares.tiles * kTileRows<T>; tiles < shares.tiles && row < p.rows; row += kTileRows<T>) {
        own[tiles] = RowTile<N>(memory, p, row);
        memory += panels_per_tile<Term>(p) * kTileRows<T>;
        start(own[tiles++], p, q, scaling);
    }
    for (Index key = 0; key < p.keys; key += kBlock) {
        const Index keys = p.keys - key < kBlock ? p.keys - key : kBlock;
        const Rows<Term> k_rows = along_rows(k_terms, k.from(key), keys, p.width);
        const Rows<Term> v_rows = down_rows(v_terms, v.from(key), keys, p.value_width);
        for (Index i = 0; i < tiles; ++i) {
            const Index mask = mask_start + own[i].first_row * p.mask.row_stride + key * p.mask.key_stride;
            if (masked)
                add_block<true>(scores, weights, own[i], p, scaling, mask, k_rows, v_rows, keys);
            else
                add_block<false>(scores, weights, own[i], p, scaling, mask, k_rows, v_rows, keys);
        }
    }
    for (Index i = 0; i < tiles; ++i) finish(own[i], p, out, lse + own[i].first_row * p.lse_row_stride);
}

template <class Storage>
void run(const Arguments& a) {
    using N = Numbers<Storage>;
    const AttentionPrimal& p = a.primal;
    const auto bytes = [&](Index tiles, Index) { return bytes_of_task<N>(p, tiles); };
    const int threads = a.threads > 1 ? a.threads : 1;
    const Index tiles = (p.rows + kTileRows<typename N::T> - 1) / kTileRows<typename N::T>;
    const Shares shares = share_out(p.batch * p.heads, tiles, 1, threads, bytes);
    const Scratch scratch(threads, bytes(shares.tiles, 1));
    const Work work{a, scratch, shares};
    parallel_for(shares.tasks(), threads, do_task<N>, &work);
}

}  // namespace

void attention_forward(const Arguments& arguments) {
    switch (arguments.primal.dtype) {
        case Dtype::float32:
            return run<float>(arguments);
        case Dtype::float64:
            return run<double>(arguments);
        case Dtype::bfloat16:
            return run<bfloat16>(arguments);
    }
}

}  // namespace sharpcore::SHARPCORE_ISA
