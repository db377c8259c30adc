// K tangents of attention. A task owns tiles of query rows and some of the tangents and walks over blocks of keys: the
// probabilities of a block are computed once, then each tangent takes its turn with them while they are in the cache.
#include "sharpcore/attention_tangent.h"

#include "sharpcore/attention_tile.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionTangentArguments;

// Scratch memory of one tile. Panels have kTileRows columns, one a query row.
template <class T>
struct Scene {
    T* query;        // [width]: scale * q
    T* lse;          // [1]
    T* probability;  // [kBlock]: P of a block of keys
    T* queries;      // per tangent [width]: scale * dq
    T* sums;         // per tangent [1]: rowsum(G)
    T* outputs;      // per tangent [value_width]: P dv + G v
    Index first_row, rows;

    T* queries_of(Index tangent, Index width) const { return queries + tangent * width * kTileRows<T>; }
    T* sums_of(Index tangent) const { return sums + tangent * kTileRows<T>; }
    T* outputs_of(Index tangent, Index value_width) const { return outputs + tangent * value_width * kTileRows<T>; }
};

constexpr Index panels_per_tile(const AttentionPrimal& p, Index tangents) {
    return p.width + 1 + kBlock + tangents * (p.width + 1 + p.value_width);
}

template <class T>
Scene<T> carve(T* memory, const AttentionPrimal& p, Index tangents) {
    Scene<T> scene;
    const auto take = [&](Index panels) {
        T* taken = memory;
        memory += panels * kTileRows<T>;
        return taken;
    };
    scene.query = take(p.width);
    scene.lse = take(1);
    scene.probability = take(kBlock);
    scene.queries = take(tangents * p.width);
    scene.sums = take(tangents);
    scene.outputs = take(tangents * p.value_width);
    return scene;
}

struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Shares shares;
    bool heads_first;  // whether a task is followed by one of the next head or of the next rows
};

// change = P * scale (dq k^T + q dk^T) of one tangent; its row sums are added to `sums`.
template <bool with_query, bool with_key, class T>
void fill_change(T* change, const Scene<T>& scene, Index tangent, const Rows<T>& k, const Rows<T>& dk, Index first_key,
                 Index keys, Index width) {
    const T* query = scene.queries_of(tangent, width);
    T* sums = scene.sums_of(tangent);
    in_steps(keys, [&](Index key, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> score;
        if constexpr (with_query) score.add_product(query, k.row(first_key + key), k.stride, 1, width);
        if constexpr (with_key) score.add_product(scene.query, dk.row(first_key + key), dk.stride, 1, width);
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> sum{};
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                const Index place = (key + m) * kTileRows<T> + h * kLanes<T>;
                const Vec<T> product = score.at[m][h] * load(scene.probability + place);
                store(change + place, product);
                sum += product;
            }
            store(sums + h * kLanes<T>, load(sums + h * kLanes<T>) + sum);
        }
    });
}

// What one task works on: some rows and some tangents of one head.
template <class T>
struct Part {
    const Arguments& arguments;
    Index batch, head, first_tangent;

    Rows<T> primal(const AttentionOperand& operand) const { return Rows<T>(operand, 0, batch, head); }
    Rows<T> tangent(const AttentionOperand& operand, Index index) const {
        return Rows<T>(operand, first_tangent + index, batch, head);
    }
};

template <class T>
void pack_primal(const Scene<T>& scene, const Part<T>& part) {
    const AttentionPrimal& p = part.arguments.primal;
    const Rows<T> q = part.primal(p.q);
    const T* lse = static_cast<const T*>(p.lse) + part.batch * p.lse_batch_stride + part.head * p.lse_head_stride;
    pack_panel(scene.query, q.row(scene.first_row), q.stride, scene.rows, p.width, static_cast<T>(p.scale));
    for (Index r = 0; r < kTileRows<T>; ++r)
        scene.lse[r] = r < scene.rows ? shift_of(lse[(scene.first_row + r) * p.lse_row_stride]) : T(0);
}

template <bool with_query, class T>
void pack_tangent(const Scene<T>& scene, const Part<T>& part, Index tangent) {
    const AttentionPrimal& p = part.arguments.primal;
    if constexpr (with_query) {
        const Rows<T> dq = part.tangent(part.arguments.dq, tangent);
        pack_panel(scene.queries_of(tangent, p.width), dq.row(scene.first_row), dq.stride, scene.rows, p.width,
                   static_cast<T>(p.scale));
    }
    T *sums = scene.sums_of(tangent), *outputs = scene.outputs_of(tangent, p.value_width);
    for (Index i = 0; i < kTileRows<T>; ++i) sums[i] = 0;
    for (Index i = 0; i < p.value_width * kTileRows<T>; ++i) outputs[i] = 0;
}

// result = outputs - rowsum(G) out
template <bool moving, class T>
void write_result(const Scene<T>& scene, const Part<T>& part, Index tangent) {
    const AttentionPrimal& p = part.arguments.primal;
    const Rows<T> out = part.primal(p.out), result = part.tangent(part.arguments.result, tangent);
    const T* sums = scene.sums_of(tangent);
    unpack_panel(scene.outputs_of(tangent, p.value_width), scene.rows, p.value_width,
                 [&](Index r, Index begin, Vec<T> entries, Index count) {
                     const T* mean = out.row(scene.first_row + r) + begin;
                     T* place = const_cast<T*>(result.row(scene.first_row + r)) + begin;
                     if (count == kLanes<T>) {
                         if constexpr (moving) entries -= sums[r] * load(mean);
                         store(place, entries);
                     } else {
                         if constexpr (moving) entries -= sums[r] * load_partial(mean, count);
                         store_partial(place, entries, count);
                     }
                 });
}

template <bool with_query, bool with_key, bool with_value, class T>
void do_task(const void* job, Index task, int slot) noexcept {
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
    const Part<T> part{a, batch, head, first};

    T* const change = static_cast<T*>(work.scratch.slot(slot));
    Scene<T> scenes[kTiles];
    Index tiles = 0;
    for (Index row = group * shares.tiles * kTileRows<T>; tiles < shares.tiles && row < p.rows; row += kTileRows<T>) {
        T* memory = change + (kBlock + tiles * panels_per_tile(p, tangents)) * kTileRows<T>;
        scenes[tiles] = carve<T>(memory, p, tangents);
        scenes[tiles].first_row = row;
        scenes[tiles].rows = p.rows - row < kTileRows<T> ? p.rows - row : kTileRows<T>;
        pack_primal(scenes[tiles++], part);
    }

    const Rows<T> k = part.primal(p.k), v = part.primal(p.v);
    // Runs once where there are no keys at all: the result is zero then.
    Index key = 0;
    do {
        const Index keys = p.keys - key < kBlock ? p.keys - key : kBlock;
        for (Index i = 0; i < tiles; ++i) {
            const Scene<T>& scene = scenes[i];
            if (p.mask != nullptr) {
                const T* mask = static_cast<const T*>(p.mask) + batch * p.mask_batch_stride + head * p.mask_head_stride;
                fill_mask(scene.probability, mask + scene.first_row * p.mask_row_stride + key * p.mask_key_stride,
                          p.mask_row_stride, scene.rows, p.mask_key_stride, keys);
                fill_probability<true, true>(scene.probability, scene.query, scene.lse, k, key, keys, p.width);
            } else {
                fill_probability<false, true>(scene.probability, scene.query, scene.lse, k, key, keys, p.width);
            }
        }
        const bool last = key + keys == p.keys;
        for (Index t = 0; t < tangents; ++t) {
            const Rows<T> dk = part.tangent(a.dk, t), dv = part.tangent(a.dv, t);
            for (Index i = 0; i < tiles; ++i) {
                const Scene<T>& scene = scenes[i];
                if (key == 0) pack_tangent<with_query>(scene, part, t);
                if constexpr (moving) fill_change<with_query, with_key>(change, scene, t, k, dk, key, keys, p.width);
                add_products<with_value, moving>(scene.outputs_of(t, p.value_width), scene.probability, dv, change, v,
                                                 key, keys, p.value_width);
                if (last) write_result<moving>(scene, part, t);
            }
        }
        key += keys;
    } while (key < p.keys);
}

template <class T>
TaskFunction choose_task(const Arguments& a) {
    if (a.dq.data != nullptr) {
        if (a.dk.data != nullptr)
            return a.dv.data != nullptr ? do_task<true, true, true, T> : do_task<true, true, false, T>;
        return a.dv.data != nullptr ? do_task<true, false, true, T> : do_task<true, false, false, T>;
    }
    if (a.dk.data != nullptr)
        return a.dv.data != nullptr ? do_task<false, true, true, T> : do_task<false, true, false, T>;
    return do_task<false, false, true, T>;
}

// Every tangent of a row is computed in the same way however rows and tangents are shared out among tasks.
template <class T>
void run(const Arguments& a) {
    const AttentionPrimal& p = a.primal;
    const auto bytes = [&](Index tiles, Index tangents) {
        return (kBlock + tiles * panels_per_tile(p, tangents)) * kTileRows<T> * static_cast<Index>(sizeof(T));
    };
    const int threads = a.threads > 1 ? a.threads : 1;
    const Index tiles = (p.rows + kTileRows<T> - 1) / kTileRows<T>;
    const Shares shares = share_out(p.batch * p.heads, tiles, a.count, threads, bytes);
    const Scratch scratch(threads, bytes(shares.tiles, shares.tangents));
    // With few keys most of the time goes into reading and writing rows; those of all heads may share cache lines and
    // pages. With many keys those of one head are better kept in the cache.
    const Work work{a, scratch, shares, p.rows > p.keys};
    parallel_for(shares.tasks(), threads, choose_task<T>(a), &work);
}

}  // namespace

void attention_tangent(const Arguments& arguments) {
    if (arguments.primal.float64)
        run<double>(arguments);
    else
        run<float>(arguments);
}

}  // namespace sharpcore::SHARPCORE_ISA
