// K tangents of attention. A task owns tiles of query rows and some of the tangents and walks over blocks of keys: the
// probabilities of a block are computed once, then each tangent takes its turn with them while they are in the cache.
#include "sharpcore/attention_tangent.h"

#include "sharpcore/attention_shares.h"
#include "sharpcore/attention_tile.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionTangentArguments;

// Scratch memory of one tile. Panels have kTileRows columns, one a query row.
template <class N>
struct Scene {
    using T = typename N::T;
    using Term = typename N::Term;

    Term* query;          // [terms of width]: q as it is multiplied with k
    T* lse;               // [1]
    T* probability;       // [kBlock]: P of a block of keys; paired: scale * P
    Term* probabilities;  // [terms of kBlock]: P as it is multiplied with dv
    Term* queries;        // per tangent [terms of width]: dq
    T* sums;              // per tangent [1]: rowsum(G)
    T* outputs;           // per tangent [value_width]: P dv + G v
    Index first_row, rows;

    Term* queries_of(Index tangent, Index width) const {
        return queries + tangent * terms_of<Term>(width) * kTileRows<T>;
    }
    T* sums_of(Index tangent) const { return sums + tangent * kTileRows<T>; }
    T* outputs_of(Index tangent, Index value_width) const { return outputs + tangent * value_width * kTileRows<T>; }
};

template <class Term>
constexpr Index panels_per_tile(const AttentionPrimal& p, Index tangents) {
    const Index width = terms_of<Term>(p.width), pairs = kPaired<Term> ? terms_of<Term>(kBlock) : 0;
    return (1 + tangents) * width + 1 + kBlock + pairs + tangents * (1 + p.value_width);
}

template <class N>
Scene<N> carve(typename N::T* memory, const AttentionPrimal& p, Index tangents) {
    using T = typename N::T;
    using Term = typename N::Term;
    const Index width = terms_of<Term>(p.width);
    const auto take = [&](Index panels) {
        T* taken = memory;
        memory += panels * kTileRows<T>;
        return taken;
    };
    const auto take_terms = [&](Index panels) { return reinterpret_cast<Term*>(take(panels)); };
    Scene<N> scene;
    scene.query = take_terms(width);
    scene.lse = take(1);
    scene.probability = take(kBlock);
    scene.probabilities =
        kPaired<Term> ? take_terms(terms_of<Term>(kBlock)) : reinterpret_cast<Term*>(scene.probability);
    scene.queries = take_terms(tangents * width);
    scene.sums = take(tangents);
    scene.outputs = take(tangents * p.value_width);
    return scene;
}

// Operands of one block of keys as they are multiplied.
template <class Term>
struct Keys {
    Rows<Term> k, v;
    Index first, count;
};

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Shares shares;
    bool heads_first;  // whether a task is followed by one of the next head or of the next rows
};

// P of a block; with `values` also as terms of the product with dv.
template <bool masked, bool values, class N>
void fill_probabilities(const Scene<N>& scene, const Keys<typename N::Term>& keys, const AttentionPrimal& p) {
    using T = typename N::T;
    using Term = typename N::Term;
    const Scaling<Term> scaling(p.scale, masked);
    const T scale = static_cast<T>(p.scale);
    for_probabilities<masked, true>(scene.probability, scene.query, scaling, scene.lse, keys.k, keys.count,
                                    terms_of<Term>(p.width), [&](Index i, int h, const auto& x) {
                                        constexpr int together = sizeof(x) / sizeof(x[0]);
#pragma GCC unroll 16
                                        for (int n = 0; n < together; ++n)
                                            store(scene.probability + (i + n) * kTileRows<T> + h * kLanes<T>,
                                                  kPaired<Term> ? scale * x[n] : x[n]);
                                        if constexpr (kPaired<Term> && values)
                                            store_terms(scene.probabilities + i / 2 * kTileRows<T> + h * kLanes<T>, x);
                                    });
}

// change = P * scale (dq k^T + q dk^T) of one tangent; its row sums are added to `sums`.
template <bool with_query, bool with_key, class N>
void fill_change(typename N::Term* change, const Scene<N>& scene, Index tangent, const Keys<typename N::Term>& keys,
                 const Rows<typename N::Term>& dk, Index width) {
    using T = typename N::T;
    using Term = typename N::Term;
    const Term* query = scene.queries_of(tangent, width);
    T* sums = scene.sums_of(tangent);
    const Index terms = terms_of<Term>(width);
    in_steps(keys.count, [&](Index key, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> score;
        if constexpr (with_query) score.add_product(query, keys.k.row(key), keys.k.stride, 1, terms);
        if constexpr (with_key) score.add_product(scene.query, dk.row(key), dk.stride, 1, terms);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> sum{};
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m)
                score.at[m][h] *= load(scene.probability + (key + m) * kTileRows<T> + h * kLanes<T>);
            if constexpr (!kPaired<Term>) {
#pragma GCC unroll 16
                for (int m = 0; m < down; ++m) {
                    store(change + (key + m) * kTileRows<T> + h * kLanes<T>, score.at[m][h]);
                    sum += score.at[m][h];
                }
            }
#if defined(__AVX512BF16__)
            if constexpr (kPaired<Term>) {
                // The sum of what the product sees: a part that all values share cancels in the result.
                constexpr std::uint32_t ones = 0x3f803f80u;
                const Vec<float> one = reinterpret_cast<Vec<float>>(VectorOf<float>::Bits{} + ones);
#pragma GCC unroll 16
                for (int m = 0; m < down; m += 2) {
                    const Vec<float> pair = paired(score.at[m][h], m + 1 < down ? score.at[m + 1][h] : Vec<float>{});
                    store(change + (key + m) / 2 * kTileRows<T> + h * kLanes<T>, pair);
                    sum = add_pairs(sum, pair, one);
                }
            }
#endif
            store(sums + h * kLanes<T>, load(sums + h * kLanes<T>) + sum);
        }
    });
}

// What one task works on: some rows and some tangents of one head.
template <class Storage>
struct Part {
    const Arguments& arguments;
    Index batch, head, first_tangent;

    Rows<Storage> primal(const AttentionOperand& operand) const { return {operand, 0, batch, head}; }
    Rows<Storage> tangent(const AttentionOperand& operand, Index index) const {
        return {operand, first_tangent + index, batch, head};
    }
};

template <class N>
void pack_primal(const Scene<N>& scene, const Part<typename N::Storage>& part) {
    using T = typename N::T;
    const AttentionPrimal& p = part.arguments.primal;
    const auto q = part.primal(p.q);
    const T* lse = static_cast<const T*>(p.lse) + part.batch * p.lse_batch_stride + part.head * p.lse_head_stride;
    const Scaling<typename N::Term> scaling(p.scale, p.mask.data != nullptr);
    pack_panel(scene.query, q.row(scene.first_row), q.stride, scene.rows, p.width, scaling.panel);
    for (Index r = 0; r < kTileRows<T>; ++r)
        scene.lse[r] = r < scene.rows ? scaling.shift_of(lse[(scene.first_row + r) * p.lse_row_stride]) : T(0);
}

template <bool with_query, class N>
void pack_tangent(const Scene<N>& scene, const Part<typename N::Storage>& part, Index tangent) {
    using T = typename N::T;
    const AttentionPrimal& p = part.arguments.primal;
    if constexpr (with_query) {
        const auto dq = part.tangent(part.arguments.dq, tangent);
        pack_panel(scene.queries_of(tangent, p.width), dq.row(scene.first_row), dq.stride, scene.rows, p.width,
                   static_cast<T>(p.scale));
    }
    T *sums = scene.sums_of(tangent), *outputs = scene.outputs_of(tangent, p.value_width);
    for (Index i = 0; i < kTileRows<T>; ++i) sums[i] = 0;
    for (Index i = 0; i < p.value_width * kTileRows<T>; ++i) outputs[i] = 0;
}

// result = outputs - rowsum(G) out
template <bool moving, class N>
void write_result(const Scene<N>& scene, const Part<typename N::Storage>& part, Index tangent) {
    using T = typename N::T;
    using Storage = typename N::Storage;
    const AttentionPrimal& p = part.arguments.primal;
    const auto out = part.primal(p.out), result = part.tangent(part.arguments.result, tangent);
    const T* sums = scene.sums_of(tangent);
    unpack_panel(scene.outputs_of(tangent, p.value_width), scene.rows, p.value_width,
                 [&](Index r, Index begin, Vec<T> entries, Index count) {
                     const Storage* mean = out.row(scene.first_row + r) + begin;
                     Storage* place = const_cast<Storage*>(result.row(scene.first_row + r)) + begin;
                     if (count == kLanes<T>) {
                         if constexpr (moving) entries -= sums[r] * load(mean);
                         store(place, entries);
                     } else {
                         if constexpr (moving) entries -= sums[r] * load_first(mean, count);
                         store_first(place, entries, count);
                     }
                 });
}

// Terms of scratch memory that a task needs for operands of a block: k, v and one tangent's dk, dv.
template <class N>
constexpr Index terms_of_blocks(const AttentionPrimal& p) {
    using Term = typename N::Term;
    using Storage = typename N::Storage;
    return 2 *
           (terms_in_memory<Term, Storage>(kBlock, p.width) + terms_in_memory<Term, Storage>(kBlock, p.value_width));
}

template <class N>
constexpr Index bytes_of_task(const AttentionPrimal& p, Index tiles, Index tangents) {
    using T = typename N::T;
    using Term = typename N::Term;
    const Index panels = terms_of<Term>(kBlock) + tiles * panels_per_tile<Term>(p, tangents);
    return (panels * kTileRows<T> + terms_of_blocks<N>(p)) * static_cast<Index>(sizeof(T));
}

template <bool with_query, bool with_key, bool with_value, class N>
void do_task(const void* job, Index task, int slot) noexcept {
    using T = typename N::T;
    using Term = typename N::Term;
    using Storage = typename N::Storage;
    constexpr bool moving = with_query || with_key;
    const Work& work = *static_cast<const Work*>(job);
    const Arguments& a = work.arguments;
    const AttentionPrimal& p = a.primal;
    const Shares& shares = work.shares;
    const Index per_head = shares.groups * shares.splits;
    const Index which = work.heads_first ? task % shares.heads : task / per_head;
    const Index rest = work.heads_first ? task / shares.heads : task % per_head;
    const Index batch = which / p.heads, head = which % p.heads;
    const Index split = rest % shares.splits, group = rest / shares.splits;
    const Index first = split * a.count / shares.splits, tangents = (split + 1) * a.count / shares.splits - first;
    const Part<Storage> part{a, batch, head, first};

    T* memory = static_cast<T*>(work.scratch.slot(slot));
    Term* const change = reinterpret_cast<Term*>(memory);
    memory += terms_of<Term>(kBlock) * kTileRows<T>;
    Scene<N> scenes[kTiles];
    Index tiles = 0;
    for (Index row = group * shares.tiles * kTileRows<T>; tiles < shares.tiles && row < p.rows; row += kTileRows<T>) {
        scenes[tiles] = carve<N>(memory, p, tangents);
        memory += panels_per_tile<Term>(p, tangents) * kTileRows<T>;
        scenes[tiles].first_row = row;
        scenes[tiles].rows = p.rows - row < kTileRows<T> ? p.rows - row : kTileRows<T>;
        pack_primal(scenes[tiles++], part);
    }
    Term* const k_terms = reinterpret_cast<Term*>(memory);
    Term* const dk_terms = k_terms + terms_in_memory<Term, Storage>(kBlock, p.width);
    Term* const v_terms = dk_terms + terms_in_memory<Term, Storage>(kBlock, p.width);
    Term* const dv_terms = v_terms + terms_in_memory<Term, Storage>(kBlock, p.value_width);

    const Rows<Storage> k = part.primal(p.k), v = part.primal(p.v);
    const Index mask_start = batch * p.mask.batch_stride + head * p.mask.head_stride;
    // Runs once where there are no keys at all: the result is zero then.
    Index key = 0;
    do {
        const Index count = p.keys - key < kBlock ? p.keys - key : kBlock;
        const Keys<Term> keys{along_rows(k_terms, k.from(key), count, p.width),
                              down_rows(v_terms, v.from(key), count, p.value_width), key, count};
        for (Index i = 0; i < tiles; ++i) {
            const Scene<N>& scene = scenes[i];
            if (p.mask.data != nullptr) {
                fill_mask(scene.probability, p.mask,
                          mask_start + scene.first_row * p.mask.row_stride + key * p.mask.key_stride, p.mask.row_stride,
                          scene.rows, p.mask.key_stride, count);
                fill_probabilities<true, with_value>(scene, keys, p);
            } else {
                fill_probabilities<false, with_value>(scene, keys, p);
            }
        }
        const bool last = key + count == p.keys;
        for (Index t = 0; t < tangents; ++t) {
            Rows<Term> dk = keys.k, dv = keys.v;
            if constexpr (with_key) dk = along_rows(dk_terms, part.tangent(a.dk, t).from(key), count, p.width);
            if constexpr (with_value) dv = down_rows(dv_terms, part.tangent(a.dv, t).from(key), count, p.value_width);
            for (Index i = 0; i < tiles; ++i) {
                const Scene<N>& scene = scenes[i];
                if (key == 0) pack_tangent<with_query>(scene, part, t);
                // The next tile's vectors and this one's result come in while products are computed.
                const bool more = i + 1 < tiles || t + 1 < tangents;
                if (with_query && key == 0 && more) {
                    const Scene<N>& next = scenes[i + 1 < tiles ? i + 1 : 0];
                    const Rows<Storage> dq = part.tangent(a.dq, i + 1 < tiles ? t : t + 1);
                    prefetch_rows<false>(dq.row(next.first_row), dq.stride, next.rows, p.width);
                }
                if (last) {
                    const Rows<Storage> result = part.tangent(a.result, t);
                    prefetch_rows<true>(result.row(scene.first_row), result.stride, scene.rows, p.value_width);
                }
                if constexpr (moving) fill_change<with_query, with_key>(change, scene, t, keys, dk, p.width);
                add_products<with_value, moving>(scene.outputs_of(t, p.value_width), scene.probabilities, dv, change,
                                                 keys.v, terms_of<Term>(count), p.value_width);
                if (last) write_result<moving>(scene, part, t);
            }
        }
        key += count;
    } while (key < p.keys);
}

template <class N>
TaskFunction choose_task(const Arguments& a) {
    if (a.dq.data != nullptr) {
        if (a.dk.data != nullptr)
            return a.dv.data != nullptr ? do_task<true, true, true, N> : do_task<true, true, false, N>;
        return a.dv.data != nullptr ? do_task<true, false, true, N> : do_task<true, false, false, N>;
    }
    if (a.dk.data != nullptr)
        return a.dv.data != nullptr ? do_task<false, true, true, N> : do_task<false, true, false, N>;
    return do_task<false, false, true, N>;
}

// Every tangent of a row is computed in the same way however rows and tangents are shared out among tasks.
template <class Storage>
void run(const Arguments& a) {
    using N = Numbers<Storage>;
    const AttentionPrimal& p = a.primal;
    const auto bytes = [&](Index tiles, Index tangents) { return bytes_of_task<N>(p, tiles, tangents); };
    const int threads = a.threads > 1 ? a.threads : 1;
    const Index tiles = (p.rows + kTileRows<typename N::T> - 1) / kTileRows<typename N::T>;
    const Shares shares = share_out(p.batch * p.heads, tiles, a.count, threads, bytes);
    const Scratch scratch(threads, bytes(shares.tiles, shares.tangents));
    // With few keys most of the time goes into reading and writing rows; those of all heads may share cache lines and
    // pages. With many keys those of one head are better kept in the cache.
    const Work work{a, scratch, shares, p.rows > p.keys};
    parallel_for(shares.tasks(), threads, choose_task<N>(a), &work);
}

}  // namespace

void attention_tangent(const Arguments& arguments) {
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
