// K cotangents of attention's output pulled back to its operands, by two kinds of tasks.
//
// Along rows: a task owns tiles of query rows and walks over the keys, as attention_tangent does; it gives grad_q.
// Along keys: a task owns tiles of keys and walks over the query rows; it gives grad_k and grad_v. Where heads are many
// enough to occupy the threads, it owns all keys of a head and gives grad_q as well, from the transposed tiles of dS:
// that saves two of seven products and one exponential. The choice depends on shapes alone, so results do not depend
// on the number of threads.
#include "sharpcore/attention_adjoint.h"

#include "sharpcore/attention_pullback.h"
#include "sharpcore/attention_shares.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionAdjointArguments;

// Scratch memory of a thread is bounded by kScratchBytes; grad_q of a head that is gathered along keys comes on top,
// [cotangents, rows, width], in at most so many bytes or for one cotangent at a time.
constexpr Index kGatheredBytes = 4 * 1024 * 1024;

// Batch entries times heads from which on grad_q is gathered along keys.
constexpr Index kHeadsForOnePass = 8;

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Shares shares;
    bool gather;  // along keys: whether grad_q is gathered

    template <class N>
    Part<N> part(Index head, Index split) const {
        const Index first = split * arguments.count / shares.splits;
        const Index last = (split + 1) * arguments.count / shares.splits;
        return {arguments, head / arguments.primal.heads, head % arguments.primal.heads, first, last - first};
    }
    // Tiles of a group, of `all` tiles of a head.
    Index tiles(Index group, Index all) const {
        const Index left = all - group * shares.tiles;
        return left < shares.tiles ? left : shares.tiles;
    }
};

// ---- Along rows ----

template <class Term>
constexpr Index panels_along_rows(const AttentionPrimal& p, Index cotangents) {
    const Index width = terms_of<Term>(p.width), value_width = terms_of<Term>(p.value_width);
    return kBlock + width + 1 + cotangents * (value_width + 1 + p.width);
}

// Bytes of scratch memory of a task: dS of a block, k and v of a block, and its tiles.
template <class N>
constexpr Index bytes_along_rows(const AttentionPrimal& p, Index tiles, Index cotangents) {
    using T = typename N::T;
    using Term = typename N::Term;
    using Storage = typename N::Storage;
    const Index panels = terms_of<Term>(kBlock) + tiles * panels_along_rows<Term>(p, cotangents);
    const Index terms =
        2 * terms_in_memory<Term, Storage>(kBlock, p.width) + terms_in_memory<Term, Storage>(kBlock, p.value_width);
    return (panels * kTileRows<T> + terms) * static_cast<Index>(sizeof(T));
}

template <class N>
struct RowTile {
    using T = typename N::T;
    using Term = typename N::Term;

    T *probability, *lse;      // [kBlock], [1]
    Term *query, *cotangents;  // [terms of width], per cotangent: [terms of value_width]
    T *along, *grad_q;         // per cotangent: [1]: rowsum(g * out), [width]
    Index first_row, rows;

    RowTile() = default;
    RowTile(T* memory, const AttentionPrimal& p, Index count, Index first)
        : probability(memory),
          lse(probability + kBlock * kTileRows<T>),
          query(reinterpret_cast<Term*>(lse + kTileRows<T>)),
          cotangents(query + terms_of<Term>(p.width) * kTileRows<T>),
          along(reinterpret_cast<T*>(cotangents + count * terms_of<Term>(p.value_width) * kTileRows<T>)),
          grad_q(along + count * kTileRows<T>),
          first_row(first),
          rows(p.rows - first < kTileRows<T> ? p.rows - first : kTileRows<T>) {}

    const Term* cotangent(Index index, Index value_width) const {
        return cotangents + index * terms_of<Term>(value_width) * kTileRows<T>;
    }
};

template <class N>
void pack(const RowTile<N>& tile, const Part<N>& part) {
    using T = typename N::T;
    const Arguments& a = part.arguments;
    const AttentionPrimal& p = a.primal;
    const auto q = part.primal(p.q), out = part.primal(p.out);
    const auto scaling = part.scaling();
    pack_panel(tile.query, q.row(tile.first_row), q.stride, tile.rows, p.width, scaling.panel);
    clear(tile.lse, 1);
    for (Index r = 0; r < tile.rows; ++r) tile.lse[r] = scaling.shift_of(part.lse(tile.first_row + r));
    clear(tile.along, part.cotangents * (1 + p.width));
    for (Index t = 0; t < part.cotangents; ++t) {
        const auto g = part.vectors(a.cotangent, t);
        pack_panel(const_cast<typename N::Term*>(tile.cotangent(t, p.value_width)), g.row(tile.first_row), g.stride,
                   tile.rows, p.value_width, T(1));
        row_products(tile.along + t * kTileRows<T>, g, out, tile.first_row, tile.rows, p.value_width);
    }
}

template <class N>
void do_rows(const Part<N>& part, Index first_tile, Index tiles, typename N::T* memory) {
    using T = typename N::T;
    using Term = typename N::Term;
    using Storage = typename N::Storage;
    const Arguments& a = part.arguments;
    const AttentionPrimal& p = a.primal;
    Term* const change = reinterpret_cast<Term*>(memory);
    Term* const k_terms = change + terms_of<Term>(kBlock) * kTileRows<T>;
    Term* const down_terms = k_terms + terms_in_memory<Term, Storage>(kBlock, p.width);
    Term* const v_terms = down_terms + terms_in_memory<Term, Storage>(kBlock, p.width);
    memory = reinterpret_cast<T*>(v_terms + terms_in_memory<Term, Storage>(kBlock, p.value_width));
    RowTile<N> own[kTiles];
    for (Index i = 0; i < tiles; ++i) {
        own[i] = RowTile<N>(memory, p, part.cotangents, (first_tile + i) * kTileRows<T>);
        memory += panels_along_rows<Term>(p, part.cotangents) * kTileRows<T>;
        pack(own[i], part);
    }
    const Rows<Storage> k = part.primal(p.k), v = part.primal(p.v);
    for (Index key = 0; key < p.keys; key += kBlock) {
        const Index keys = p.keys - key < kBlock ? p.keys - key : kBlock;
        const Rows<Term> k_along = along_rows(k_terms, k.from(key), keys, p.width);
        const Rows<Term> k_down = down_rows(down_terms, k.from(key), keys, p.width);
        const Rows<Term> v_along = along_rows(v_terms, v.from(key), keys, p.value_width);
        for (Index i = 0; i < tiles; ++i) {
            const RowTile<N>& tile = own[i];
            fill_probabilities<true>(tile.probability, static_cast<Term*>(nullptr), tile.query, part,
                                     part.mask(tile.first_row, key), p.mask.row_stride, tile.rows, p.mask.key_stride,
                                     tile.lse, k_along, keys);
            for (Index t = 0; t < part.cotangents; ++t) {
                fill_change<true, false>(change, tile.probability, tile.probability, tile.cotangent(t, p.value_width),
                                         tile.along + t * kTileRows<T>, v_along, keys, terms_of<Term>(p.value_width));
                add_product(tile.grad_q + t * p.width * kTileRows<T>, change, k_down, terms_of<Term>(keys), p.width);
            }
        }
    }
    for (Index t = 0; t < part.cotangents; ++t)
        for (Index i = 0; i < tiles; ++i)
            write_panel(part.vectors(a.grad_q, t), own[i].grad_q + t * p.width * kTileRows<T>, own[i].first_row,
                        own[i].rows, p.width, static_cast<T>(p.scale));
}

// ---- Along keys ----

template <class N>
constexpr Index panels_along_keys(const AttentionPrimal& p, Index cotangents) {
    using Term = typename N::Term;
    return kBlock + (kPaired<Term> ? terms_of<Term>(kBlock) : 0) + terms_of<Term>(p.width) +
           terms_of<Term>(p.value_width) + cotangents * (p.width + p.value_width) +
           terms_in_memory<Term, typename N::Storage>(kTileRows<typename N::T>, p.width) / kTileRows<typename N::T>;
}

template <class N>
struct KeyTile {
    using T = typename N::T;
    using Term = typename N::Term;

    T* probability;                     // [kBlock]
    Term *probabilities, *key, *value;  // [terms of kBlock]: P again; [terms of width], [terms of value_width]
    T *grad_k, *grad_v;                 // per cotangent: [width], [value_width]
    Term* down_terms;
    Rows<Term> down;  // the keys as terms of products down the keys
    Index first_key, keys;

    KeyTile() = default;
    KeyTile(T* memory, const AttentionPrimal& p, Index count, Index first)
        : probability(memory),
          probabilities(reinterpret_cast<Term*>(kPaired<Term> ? memory + kBlock * kTileRows<T> : memory)),
          key(probabilities + terms_of<Term>(kBlock) * kTileRows<T>),
          value(key + terms_of<Term>(p.width) * kTileRows<T>),
          grad_k(reinterpret_cast<T*>(value + terms_of<Term>(p.value_width) * kTileRows<T>)),
          grad_v(grad_k + count * p.width * kTileRows<T>),
          down_terms(reinterpret_cast<Term*>(grad_v + count * p.value_width * kTileRows<T>)),
          first_key(first),
          keys(p.keys - first < kTileRows<T> ? p.keys - first : kTileRows<T>) {}
};

// Scratch memory that the tiles of a task share: dS of a block, as terms and transposed, and for the rows of a block
// the log-sum-exp, each cotangent's rowsum(g * out), and operands as terms along and down the rows.
template <class N>
struct Shared {
    using T = typename N::T;
    using Term = typename N::Term;

    T *kept, *transposed;             // [kBlock], [kTileRows]
    Term *change, *transposed_terms;  // [terms of kBlock], [terms of kTileRows]: the same memory unless paired
    T *lse, *along;                   // kBlock numbers, and so many for each cotangent
    Term *q_along, *q_down, *g_along, *g_down;

    static constexpr Index panels =
        kBlock + kTileRows<T> + (kPaired<Term> ? terms_of<Term>(kBlock) + terms_of<Term>(kTileRows<T>) : 0);
    static constexpr Index terms(Index width) { return terms_in_memory<Term, typename N::Storage>(kBlock, width); }
    static constexpr Index entries(const AttentionPrimal& p, Index cotangents) {
        return panels * kTileRows<T> + (1 + cotangents) * kBlock + 2 * (terms(p.width) + terms(p.value_width));
    }
    Shared(T* memory, const AttentionPrimal& p, Index cotangents)
        : kept(memory),
          transposed(kept + kBlock * kTileRows<T>),
          change(reinterpret_cast<Term*>(kPaired<Term> ? transposed + kTileRows<T> * kTileRows<T> : kept)),
          transposed_terms(kPaired<Term> ? change + terms_of<Term>(kBlock) * kTileRows<T>
                                         : reinterpret_cast<Term*>(transposed)),
          lse(memory + panels * kTileRows<T>),
          along(lse + kBlock),
          q_along(reinterpret_cast<Term*>(along + cotangents * kBlock)),
          q_down(q_along + terms(p.width)),
          g_along(q_down + terms(p.width)),
          g_down(g_along + terms(p.value_width)) {}
};

// grad_q += dS k for the keys of a tile; `gathered` holds a panel[width] for each tile of rows.
template <class N>
void add_grad_q(typename N::T* gathered, const Shared<N>& shared, const KeyTile<N>& tile, Index first_row, Index rows,
                Index width) {
    using T = typename N::T;
    using Term = typename N::Term;
    for (Index r = 0; r < rows; r += kTileRows<T>) {
        for (Index i = rows; i < r + kTileRows<T>; ++i) clear(shared.kept + i * kTileRows<T>, 1);
        transpose_tile(shared.transposed, shared.kept + r * kTileRows<T>);
        if constexpr (kPaired<Term>) {
            for (Index i = 0; i < tile.keys; i += 2) {
                for (int h = 0; h < kAcross; ++h) {
                    const T* from = shared.transposed + i * kTileRows<T> + h * kLanes<T>;
                    const Vec<T> both[2] = {load(from), i + 1 < tile.keys ? load(from + kTileRows<T>) : Vec<T>{}};
                    store_terms(shared.transposed_terms + i / 2 * kTileRows<T> + h * kLanes<T>, both);
                }
            }
        }
        add_product(gathered + (first_row + r) * width, shared.transposed_terms, tile.down, terms_of<Term>(tile.keys),
                    width);
    }
}

template <class N>
void do_keys(const Part<N>& part, Index first_tile, Index tiles, typename N::T* memory, typename N::T* gathered) {
    using T = typename N::T;
    using Term = typename N::Term;
    using Storage = typename N::Storage;
    const Arguments& a = part.arguments;
    const AttentionPrimal& p = a.primal;
    const bool with_k = a.grad_k.data != nullptr, with_v = a.grad_v.data != nullptr;
    const Index gathered_panels = tiles_of<T>(p.rows) * p.width;
    const Rows<Storage> q = part.primal(p.q), k = part.primal(p.k), v = part.primal(p.v), out = part.primal(p.out);
    const auto scaling = part.scaling();
    const Shared<N> shared(memory, p, part.cotangents);
    memory += Shared<N>::entries(p, part.cotangents);
    KeyTile<N> own[kTiles];
    for (Index i = 0; i < tiles; ++i) {
        KeyTile<N>& tile = own[i] = KeyTile<N>(memory, p, part.cotangents, (first_tile + i) * kTileRows<T>);
        memory += panels_along_keys<N>(p, part.cotangents) * kTileRows<T>;
        pack_panel(tile.key, k.row(tile.first_key), k.stride, tile.keys, p.width, scaling.panel);
        pack_panel(tile.value, v.row(tile.first_key), v.stride, tile.keys, p.value_width, T(1));
        clear(tile.grad_k, part.cotangents * (p.width + p.value_width));
        tile.down = down_rows(tile.down_terms, k.from(tile.first_key), tile.keys, p.width);
    }
    for (Index row = 0; row < p.rows; row += kBlock) {
        const Index rows = p.rows - row < kBlock ? p.rows - row : kBlock, terms = terms_of<Term>(rows);
        const Rows<Term> q_along = along_rows(shared.q_along, q.from(row), rows, p.width);
        const Rows<Term> q_down = down_rows(shared.q_down, q.from(row), rows, p.width);
        for (Index r = 0; r < rows; ++r) shared.lse[r] = scaling.shift_of(part.lse(row + r));
        for (Index t = 0; t < part.cotangents; ++t)
            row_products(shared.along + t * kBlock, part.vectors(a.cotangent, t), out, row, rows, p.value_width);
        for (Index i = 0; i < tiles; ++i)
            fill_probabilities<false>(own[i].probability, with_v ? own[i].probabilities : nullptr, own[i].key, part,
                                      part.mask(row, own[i].first_key), p.mask.key_stride, own[i].keys,
                                      p.mask.row_stride, shared.lse, q_along, rows);
        for (Index t = 0; t < part.cotangents; ++t) {
            const Rows<Storage> g = part.vectors(a.cotangent, t).from(row);
            const Rows<Term> g_along = along_rows(shared.g_along, g, rows, p.value_width);
            const Rows<Term> g_down = down_rows(shared.g_down, g, rows, p.value_width);
            for (Index i = 0; i < tiles; ++i) {
                const KeyTile<N>& tile = own[i];
                if (with_v)
                    add_product(tile.grad_v + t * p.value_width * kTileRows<T>, tile.probabilities, g_down, terms,
                                p.value_width);
                if (!with_k && gathered == nullptr) continue;
                fill_change<false, true>(shared.change, shared.kept, tile.probability, tile.value,
                                         shared.along + t * kBlock, g_along, rows, terms_of<Term>(p.value_width));
                if (with_k)
                    add_product(tile.grad_k + t * p.width * kTileRows<T>, shared.change, q_down, terms, p.width);
                if (gathered != nullptr)
                    add_grad_q(gathered + t * gathered_panels * kTileRows<T>, shared, tile, row, rows, p.width);
            }
        }
    }
    for (Index t = 0; t < part.cotangents; ++t) {
        for (Index i = 0; i < tiles; ++i) {
            const KeyTile<N>& tile = own[i];
            if (with_k)
                write_panel(part.vectors(a.grad_k, t), tile.grad_k + t * p.width * kTileRows<T>, tile.first_key,
                            tile.keys, p.width, static_cast<T>(p.scale));
            if (with_v)
                write_panel(part.vectors(a.grad_v, t), tile.grad_v + t * p.value_width * kTileRows<T>, tile.first_key,
                            tile.keys, p.value_width, T(1));
        }
    }
}

// ---- Tasks ----

template <class N>
void rows_task(const void* job, Index task, int slot) noexcept {
    using T = typename N::T;
    const Work& work = *static_cast<const Work*>(job);
    const Shares& shares = work.shares;
    const Index split = task % shares.splits, group = task / shares.splits % shares.groups;
    do_rows(work.part<N>(task / shares.splits / shares.groups, split), group * shares.tiles,
            work.tiles(group, tiles_of<T>(work.arguments.primal.rows)), static_cast<T*>(work.scratch.slot(slot)));
}

template <class N>
void keys_task(const void* job, Index task, int slot) noexcept {
    using T = typename N::T;
    const Work& work = *static_cast<const Work*>(job);
    const AttentionPrimal& p = work.arguments.primal;
    const Shares& shares = work.shares;
    const Index split = task % shares.splits, all = tiles_of<T>(p.keys);
    T* memory = static_cast<T*>(work.scratch.slot(slot));
    if (!work.gather) {
        const Index group = task / shares.splits % shares.groups;
        do_keys(work.part<N>(task / shares.splits / shares.groups, split), group * shares.tiles, work.tiles(group, all),
                memory, static_cast<T*>(nullptr));
        return;
    }
    const Part<N> part = work.part<N>(task / shares.splits, split);
    const Index panels = tiles_of<T>(p.rows) * p.width;
    T* const gathered = memory;
    memory += part.cotangents * panels * kTileRows<T>;
    clear(gathered, part.cotangents * panels);
    for (Index group = 0; group < shares.groups; ++group)
        do_keys(part, group * shares.tiles, work.tiles(group, all), memory, gathered);
    for (Index t = 0; t < part.cotangents; ++t) {
        const auto grad_q = part.vectors(work.arguments.grad_q, t);
        for (Index row = 0; row < p.rows; row += kTileRows<T>) {
            const Index rows = p.rows - row < kTileRows<T> ? p.rows - row : kTileRows<T>;
            write_panel(grad_q, gathered + t * panels * kTileRows<T> + row * p.width, row, rows, p.width,
                        static_cast<T>(p.scale));
        }
    }
}

template <class Storage>
void run(const Arguments& a) {
    using N = Numbers<Storage>;
    using T = typename N::T;
    const AttentionPrimal& p = a.primal;
    const Index heads = p.batch * p.heads;
    const int threads = a.threads > 1 ? a.threads : 1;
    constexpr Index panel = kTileRows<T> * static_cast<Index>(sizeof(T));
    const bool along_keys = a.grad_k.data != nullptr || a.grad_v.data != nullptr;
    const bool gather = along_keys && a.grad_q.data != nullptr && heads >= kHeadsForOnePass;
    if (along_keys) {
        const auto bytes = [&](Index tiles, Index cotangents) {
            return Shared<N>::entries(p, cotangents) * static_cast<Index>(sizeof(T)) +
                   tiles * panels_along_keys<N>(p, cotangents) * panel;
        };
        const Index gathered = gather ? tiles_of<T>(p.rows) * p.width * panel : 0;
        const Index most = gathered * a.count > kGatheredBytes ? kGatheredBytes / gathered : a.count;
        const Index splits = most > 1 ? (a.count + most - 1) / most : a.count;
        const Shares shares = share_out(heads, tiles_of<T>(p.keys), a.count, threads, bytes, gather, splits);
        const Scratch scratch(threads, bytes(shares.tiles, shares.tangents) + shares.tangents * gathered);
        const Work work{a, scratch, shares, gather};
        parallel_for(shares.tasks(), threads, keys_task<N>, &work);
    }
    if (a.grad_q.data != nullptr && !gather) {
        const auto bytes = [&](Index tiles, Index cotangents) { return bytes_along_rows<N>(p, tiles, cotangents); };
        const Shares shares = share_out(heads, tiles_of<T>(p.rows), a.count, threads, bytes);
        const Scratch scratch(threads, bytes(shares.tiles, shares.tangents));
        const Work work{a, scratch, shares, false};
        parallel_for(shares.tasks(), threads, rows_task<N>, &work);
    }
}

}  // namespace

void attention_adjoint(const Arguments& arguments) {
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
