// K cotangents of attention's output pulled back to its operands, by two kinds of tasks.
//
// Along rows: a task owns tiles of query rows and walks over the keys, as attention_tangent does; it gives grad_q.
// Along keys: a task owns tiles of keys and walks over the query rows; it gives grad_k and grad_v. Where heads are many
// enough to occupy the threads, it owns all keys of a head and gives grad_q as well, from the transposed tiles of dS:
// that saves two of seven products and one exponential. The choice depends on shapes alone, so results do not depend
// on the number of threads.
#include "sharpcore/attention_adjoint.h"

#include "sharpcore/attention_tile.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionAdjointArguments;

// Scratch memory of a thread is bounded by kScratchBytes; grad_q of a head that is gathered along keys comes on top,
// [cotangents, rows, width], in at most so many bytes or for one cotangent at a time.
constexpr Index kGatheredBytes = 4 * 1024 * 1024;

// Batch entries times heads from which on grad_q is gathered along keys.
constexpr Index kHeadsForOnePass = 8;

// A [size, E] operand has so many tiles.
template <class T>
constexpr Index tiles_of(Index size) {
    return (size + kTileRows<T> - 1) / kTileRows<T>;
}

// The part of the arguments that belongs to one batch entry, one head and some cotangents.
template <class T>
struct Part {
    const Arguments& arguments;
    Index batch, head, first_cotangent, cotangents;

    Rows<T> primal(const AttentionOperand& operand) const { return Rows<T>(operand, 0, batch, head); }
    Rows<T> vectors(const AttentionOperand& operand, Index index) const {
        return Rows<T>(operand, first_cotangent + index, batch, head);
    }
    const T* lse(Index row) const {
        const AttentionPrimal& p = arguments.primal;
        return static_cast<const T*>(p.lse) + batch * p.lse_batch_stride + head * p.lse_head_stride +
               row * p.lse_row_stride;
    }
    const T* mask(Index row, Index key) const {
        const AttentionPrimal& p = arguments.primal;
        return static_cast<const T*>(p.mask) + batch * p.mask_batch_stride + head * p.mask_head_stride +
               row * p.mask_row_stride + key * p.mask_key_stride;
    }
};

// sums[r] = sum over j of a[first + r][j] b[first + r][j] for r < count
template <class T>
void row_products(T* sums, const Rows<T>& a, const Rows<T>& b, Index first, Index count, Index width) {
    constexpr Index lanes = kLanes<T>;
    for (Index start = 0; start < count; start += lanes) {
        Vec<T> square[lanes] = {};
        for (Index r = 0; r < lanes && start + r < count; ++r) {
            const T *left = a.row(first + start + r), *right = b.row(first + start + r);
            Index j = 0;
            for (; j + lanes <= width; j += lanes) square[r] += load(left + j) * load(right + j);
            if (j < width) square[r] += load_partial(left + j, width - j) * load_partial(right + j, width - j);
        }
        transpose<T>(square);
        Vec<T> sum = square[0];
        for (Index i = 1; i < lanes; ++i) sum += square[i];
        if (start + lanes <= count)
            store(sums + start, sum);
        else
            store_partial(sums + start, sum, count - start);
    }
}

// tile[i] = P[i] * (panel^T rows[first + i] - shift), the shift belonging to the lanes or to the rows.
template <bool shift_of_lanes, class T>
void fill_change(T* tile, const T* probability, const T* panel, const T* shift, const Rows<T>& rows, Index first,
                 Index count, Index width) {
    in_steps(count, [&](Index i, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> product;
        product.add_product(panel, rows.row(first + i), rows.stride, 1, width);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                const Index place = (i + m) * kTileRows<T> + h * kLanes<T>;
                if constexpr (shift_of_lanes)
                    product.at[m][h] -= load(shift + h * kLanes<T>);
                else
                    product.at[m][h] -= shift[i + m];
                store(tile + place, load(probability + place) * product.at[m][h]);
            }
        }
    });
}

// to[lane][i] = from[i][lane] for i < kTileRows.
template <class T>
void transpose_tile(T* to, const T* from) {
    constexpr Index lanes = kLanes<T>;
    for (Index down = 0; down < kTileRows<T>; down += lanes) {
        for (Index across = 0; across < kTileRows<T>; across += lanes) {
            Vec<T> square[lanes];
            for (Index i = 0; i < lanes; ++i) square[i] = load(from + (down + i) * kTileRows<T> + across);
            transpose<T>(square);
            for (Index i = 0; i < lanes; ++i) store(to + (across + i) * kTileRows<T> + down, square[i]);
        }
    }
}

// rows[first + r] = factor * column r of the panel, for r < count
template <class T>
void write_panel(const Rows<T>& rows, const T* panel, Index first, Index count, Index width, T factor) {
    unpack_panel(panel, count, width, [&](Index r, Index begin, Vec<T> entries, Index how_many) {
        T* place = const_cast<T*>(rows.row(first + r)) + begin;
        if (how_many == kLanes<T>)
            store(place, factor * entries);
        else
            store_partial(place, factor * entries, how_many);
    });
}

template <class T>
void clear(T* panels, Index count) {
    for (Index i = 0; i < count * kTileRows<T>; ++i) panels[i] = 0;
}

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Shares shares;
    bool gather;  // along keys: whether grad_q is gathered

    template <class T>
    Part<T> part(Index head, Index split) const {
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

constexpr Index panels_along_rows(const AttentionPrimal& p, Index cotangents) {
    return kBlock + p.width + 1 + cotangents * (p.value_width + 1 + p.width);
}

template <class T>
struct RowTile {
    T *probability, *query, *lse;    // [kBlock], [width]: scale * q, [1]
    T *cotangents, *along, *grad_q;  // per cotangent: [value_width], [1]: rowsum(g * out), [width]
    Index first_row, rows;

    RowTile() = default;
    RowTile(T* memory, const AttentionPrimal& p, Index count, Index first)
        : probability(memory),
          query(probability + kBlock * kTileRows<T>),
          lse(query + p.width * kTileRows<T>),
          cotangents(lse + kTileRows<T>),
          along(cotangents + count * p.value_width * kTileRows<T>),
          grad_q(along + count * kTileRows<T>),
          first_row(first),
          rows(p.rows - first < kTileRows<T> ? p.rows - first : kTileRows<T>) {}
};

template <class T>
void pack(const RowTile<T>& tile, const Part<T>& part) {
    const Arguments& a = part.arguments;
    const AttentionPrimal& p = a.primal;
    const Rows<T> q = part.primal(p.q), out = part.primal(p.out);
    pack_panel(tile.query, q.row(tile.first_row), q.stride, tile.rows, p.width, static_cast<T>(p.scale));
    clear(tile.lse, 1);
    for (Index r = 0; r < tile.rows; ++r) tile.lse[r] = shift_of(*part.lse(tile.first_row + r));
    clear(tile.along, part.cotangents * (1 + p.width));
    for (Index t = 0; t < part.cotangents; ++t) {
        const Rows<T> g = part.vectors(a.cotangent, t);
        pack_panel(tile.cotangents + t * p.value_width * kTileRows<T>, g.row(tile.first_row), g.stride, tile.rows,
                   p.value_width, T(1));
        row_products(tile.along + t * kTileRows<T>, g, out, tile.first_row, tile.rows, p.value_width);
    }
}

template <class T>
void do_rows(const Part<T>& part, Index first_tile, Index tiles, T* memory) {
    const Arguments& a = part.arguments;
    const AttentionPrimal& p = a.primal;
    T* const change = memory;
    memory += kBlock * kTileRows<T>;
    RowTile<T> own[kTiles];
    for (Index i = 0; i < tiles; ++i) {
        own[i] = RowTile<T>(memory, p, part.cotangents, (first_tile + i) * kTileRows<T>);
        memory += panels_along_rows(p, part.cotangents) * kTileRows<T>;
        pack(own[i], part);
    }
    const Rows<T> k = part.primal(p.k), v = part.primal(p.v);
    for (Index key = 0; key < p.keys; key += kBlock) {
        const Index keys = p.keys - key < kBlock ? p.keys - key : kBlock;
        for (Index i = 0; i < tiles; ++i) {
            const RowTile<T>& tile = own[i];
            if (p.mask != nullptr) {
                fill_mask(tile.probability, part.mask(tile.first_row, key), p.mask_row_stride, tile.rows,
                          p.mask_key_stride, keys);
                fill_probability<true, true>(tile.probability, tile.query, tile.lse, k, key, keys, p.width);
            } else {
                fill_probability<false, true>(tile.probability, tile.query, tile.lse, k, key, keys, p.width);
            }
            for (Index t = 0; t < part.cotangents; ++t) {
                fill_change<true>(change, tile.probability, tile.cotangents + t * p.value_width * kTileRows<T>,
                                  tile.along + t * kTileRows<T>, v, key, keys, p.value_width);
                add_product(tile.grad_q + t * p.width * kTileRows<T>, change, k, key, keys, p.width);
            }
        }
    }
    for (Index t = 0; t < part.cotangents; ++t)
        for (Index i = 0; i < tiles; ++i)
            write_panel(part.vectors(a.grad_q, t), own[i].grad_q + t * p.width * kTileRows<T>, own[i].first_row,
                        own[i].rows, p.width, static_cast<T>(p.scale));
}

// ---- Along keys ----

constexpr Index panels_along_keys(const AttentionPrimal& p, Index cotangents) {
    return kBlock + (1 + cotangents) * (p.width + p.value_width);
}

template <class T>
struct KeyTile {
    T *probability, *key, *value;  // [kBlock], [width]: scale * k, [value_width]
    T *grad_k, *grad_v;            // per cotangent: [width], [value_width]
    Index first_key, keys;

    KeyTile() = default;
    KeyTile(T* memory, const AttentionPrimal& p, Index count, Index first)
        : probability(memory),
          key(probability + kBlock * kTileRows<T>),
          value(key + p.width * kTileRows<T>),
          grad_k(value + p.value_width * kTileRows<T>),
          grad_v(grad_k + count * p.width * kTileRows<T>),
          first_key(first),
          keys(p.keys - first < kTileRows<T> ? p.keys - first : kTileRows<T>) {}
};

// Scratch memory that the tiles of a task share: dS of a block and its transpose, and for the rows of a block the
// log-sum-exp and each cotangent's rowsum(g * out).
template <class T>
struct Shared {
    T *change, *transposed, *lse, *along;

    static constexpr Index entries(Index cotangents) { return 2 * kBlock * kTileRows<T> + (1 + cotangents) * kBlock; }
    explicit Shared(T* memory)
        : change(memory),
          transposed(change + kBlock * kTileRows<T>),
          lse(transposed + kBlock * kTileRows<T>),
          along(lse + kBlock) {}
};

// grad_q += dS k for the keys of a tile; `gathered` holds a panel[width] for each tile of rows.
template <class T>
void add_grad_q(T* gathered, const Shared<T>& shared, const KeyTile<T>& tile, const Rows<T>& k, Index first_row,
                Index rows, Index width) {
    for (Index r = 0; r < rows; r += kTileRows<T>) {
        for (Index i = rows; i < r + kTileRows<T>; ++i) clear(shared.change + i * kTileRows<T>, 1);
        transpose_tile(shared.transposed, shared.change + r * kTileRows<T>);
        add_product(gathered + (first_row + r) * width, shared.transposed, k, tile.first_key, tile.keys, width);
    }
}

template <class T>
void do_keys(const Part<T>& part, Index first_tile, Index tiles, T* memory, T* gathered) {
    const Arguments& a = part.arguments;
    const AttentionPrimal& p = a.primal;
    const bool with_k = a.grad_k.data != nullptr, with_v = a.grad_v.data != nullptr;
    const Index gathered_panels = tiles_of<T>(p.rows) * p.width;
    const Rows<T> q = part.primal(p.q), k = part.primal(p.k), v = part.primal(p.v), out = part.primal(p.out);
    const T scale = static_cast<T>(p.scale);
    const Shared<T> shared(memory);
    memory += Shared<T>::entries(part.cotangents);
    KeyTile<T> own[kTiles];
    for (Index i = 0; i < tiles; ++i) {
        const KeyTile<T>& tile = own[i] = KeyTile<T>(memory, p, part.cotangents, (first_tile + i) * kTileRows<T>);
        memory += panels_along_keys(p, part.cotangents) * kTileRows<T>;
        pack_panel(tile.key, k.row(tile.first_key), k.stride, tile.keys, p.width, scale);
        pack_panel(tile.value, v.row(tile.first_key), v.stride, tile.keys, p.value_width, T(1));
        clear(tile.grad_k, part.cotangents * (p.width + p.value_width));
    }
    for (Index row = 0; row < p.rows; row += kBlock) {
        const Index rows = p.rows - row < kBlock ? p.rows - row : kBlock;
        for (Index r = 0; r < rows; ++r) shared.lse[r] = shift_of(*part.lse(row + r));
        for (Index t = 0; t < part.cotangents; ++t)
            row_products(shared.along + t * kBlock, part.vectors(a.cotangent, t), out, row, rows, p.value_width);
        for (Index i = 0; i < tiles; ++i) {
            const KeyTile<T>& tile = own[i];
            if (p.mask != nullptr) {
                fill_mask(tile.probability, part.mask(row, tile.first_key), p.mask_key_stride, tile.keys,
                          p.mask_row_stride, rows);
                fill_probability<true, false>(tile.probability, tile.key, shared.lse, q, row, rows, p.width);
            } else {
                fill_probability<false, false>(tile.probability, tile.key, shared.lse, q, row, rows, p.width);
            }
        }
        for (Index t = 0; t < part.cotangents; ++t) {
            const Rows<T> g = part.vectors(a.cotangent, t);
            for (Index i = 0; i < tiles; ++i) {
                const KeyTile<T>& tile = own[i];
                if (with_v)
                    add_product(tile.grad_v + t * p.value_width * kTileRows<T>, tile.probability, g, row, rows,
                                p.value_width);
                if (!with_k && gathered == nullptr) continue;
                fill_change<false>(shared.change, tile.probability, tile.value, shared.along + t * kBlock, g, row, rows,
                                   p.value_width);
                if (with_k) add_product(tile.grad_k + t * p.width * kTileRows<T>, shared.change, q, row, rows, p.width);
                if (gathered != nullptr)
                    add_grad_q(gathered + t * gathered_panels * kTileRows<T>, shared, tile, k, row, rows, p.width);
            }
        }
    }
    for (Index t = 0; t < part.cotangents; ++t) {
        for (Index i = 0; i < tiles; ++i) {
            const KeyTile<T>& tile = own[i];
            if (with_k)
                write_panel(part.vectors(a.grad_k, t), tile.grad_k + t * p.width * kTileRows<T>, tile.first_key,
                            tile.keys, p.width, scale);
            if (with_v)
                write_panel(part.vectors(a.grad_v, t), tile.grad_v + t * p.value_width * kTileRows<T>, tile.first_key,
                            tile.keys, p.value_width, T(1));
        }
    }
}

// ---- Tasks ----

template <class T>
void rows_task(const void* job, Index task, int slot) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const Shares& shares = work.shares;
    const Index split = task % shares.splits, group = task / shares.splits % shares.groups;
    do_rows(work.part<T>(task / shares.splits / shares.groups, split), group * shares.tiles,
            work.tiles(group, tiles_of<T>(work.arguments.primal.rows)), static_cast<T*>(work.scratch.slot(slot)));
}

template <class T>
void keys_task(const void* job, Index task, int slot) noexcept {
    const Work& work = *static_cast<const Work*>(job);
    const AttentionPrimal& p = work.arguments.primal;
    const Shares& shares = work.shares;
    const Index split = task % shares.splits, all = tiles_of<T>(p.keys);
    T* memory = static_cast<T*>(work.scratch.slot(slot));
    if (!work.gather) {
        const Index group = task / shares.splits % shares.groups;
        do_keys(work.part<T>(task / shares.splits / shares.groups, split), group * shares.tiles, work.tiles(group, all),
                memory, static_cast<T*>(nullptr));
        return;
    }
    const Part<T> part = work.part<T>(task / shares.splits, split);
    const Index panels = tiles_of<T>(p.rows) * p.width;
    T* const gathered = memory;
    memory += part.cotangents * panels * kTileRows<T>;
    clear(gathered, part.cotangents * panels);
    for (Index group = 0; group < shares.groups; ++group)
        do_keys(part, group * shares.tiles, work.tiles(group, all), memory, gathered);
    for (Index t = 0; t < part.cotangents; ++t) {
        const Rows<T> grad_q = part.vectors(work.arguments.grad_q, t);
        for (Index row = 0; row < p.rows; row += kTileRows<T>) {
            const Index rows = p.rows - row < kTileRows<T> ? p.rows - row : kTileRows<T>;
            write_panel(grad_q, gathered + t * panels * kTileRows<T> + row * p.width, row, rows, p.width,
                        static_cast<T>(p.scale));
        }
    }
}

template <class T>
void run(const Arguments& a) {
    const AttentionPrimal& p = a.primal;
    const Index heads = p.batch * p.heads;
    const int threads = a.threads > 1 ? a.threads : 1;
    constexpr Index panel = kTileRows<T> * static_cast<Index>(sizeof(T));
    const bool along_keys = a.grad_k.data != nullptr || a.grad_v.data != nullptr;
    const bool gather = along_keys && a.grad_q.data != nullptr && heads >= kHeadsForOnePass;
    if (along_keys) {
        const auto bytes = [&](Index tiles, Index cotangents) {
            return Shared<T>::entries(cotangents) * static_cast<Index>(sizeof(T)) +
                   tiles * panels_along_keys(p, cotangents) * panel;
        };
        const Index gathered = gather ? tiles_of<T>(p.rows) * p.width * panel : 0;
        const Index most = gathered * a.count > kGatheredBytes ? kGatheredBytes / gathered : a.count;
        const Index splits = most > 1 ? (a.count + most - 1) / most : a.count;
        const Shares shares = share_out(heads, tiles_of<T>(p.keys), a.count, threads, bytes, gather, splits);
        const Scratch scratch(threads, bytes(shares.tiles, shares.tangents) + shares.tangents * gathered);
        const Work work{a, scratch, shares, gather};
        parallel_for(shares.tasks(), threads, keys_task<T>, &work);
    }
    if (a.grad_q.data != nullptr && !gather) {
        const auto bytes = [&](Index tiles, Index cotangents) {
            return (kBlock + tiles * panels_along_rows(p, cotangents)) * panel;
        };
        const Shares shares = share_out(heads, tiles_of<T>(p.rows), a.count, threads, bytes);
        const Scratch scratch(threads, bytes(shares.tiles, shares.tangents));
        const Work work{a, scratch, shares, false};
        parallel_for(shares.tasks(), threads, rows_task<T>, &work);
    }
}

}  // namespace

void attention_adjoint(const Arguments& arguments) {
    if (arguments.primal.float64)
        run<double>(arguments);
    else
        run<float>(arguments);
}

}  // namespace sharpcore::SHARPCORE_ISA
