// K tangents of attention. A task owns a tile of query rows and some of the tangents and walks over blocks of keys: the
// probabilities of a block are computed once, then each tangent takes its turn with them while they are in the cache.
#include "sharpcore/attention_tangent.h"

#include "sharpcore/attention_tile.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionTangentArguments;

// Keys of a block: a tile of so many keys fits into the first-level cache beside the panels of small heads.
constexpr Index kKeyBlock = 64;

// Most tiles of query rows of one task; they share what a block of keys costs to bring into the cache.
constexpr Index kTiles = 8;

// Scratch memory of a thread is at most about this, or what one tile and one tangent need: so it depends on the head
// size and on nothing else.
constexpr Index kScratchBytes = 512 * 1024;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

// Scratch memory of one tile. Panels have kTileRows columns, one a query row.
template <class T>
struct Scene {
    T* query;        // [width]: scale * q
    T* lse;          // [1]
    T* probability;  // [kKeyBlock]: P of a block of keys
    T* queries;      // per tangent [width]: scale * dq
    T* sums;         // per tangent [1]: rowsum(G)
    T* outputs;      // per tangent [value_width]: P dv + G v
    Index first_row, rows;

    T* queries_of(Index tangent, Index width) const { return queries + tangent * width * kTileRows<T>; }
    T* sums_of(Index tangent) const { return sums + tangent * kTileRows<T>; }
    T* outputs_of(Index tangent, Index value_width) const { return outputs + tangent * value_width * kTileRows<T>; }
};

constexpr Index panels_per_tile(const AttentionPrimal& p, Index tangents) {
    return p.width + 1 + kKeyBlock + tangents * (p.width + 1 + p.value_width);
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
    scene.probability = take(kKeyBlock);
    scene.queries = take(tangents * p.width);
    scene.sums = take(tangents);
    scene.outputs = take(tangents * p.value_width);
    return scene;
}

template <class T>
struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index tiles, groups, splits;  // tiles of a task; groups of the rows of a head; splits of the tangents
    bool heads_first;             // whether a task is followed by one of the next head or of the next rows
};

// tile[key][r] = mask of the rows of a tile and keys [first_key, first_key + keys)
template <class T>
void fill_mask(const Scene<T>& scene, const AttentionPrimal& p, Index batch, Index head, Index first_key, Index keys) {
    const T* mask = static_cast<const T*>(p.mask) + batch * p.mask_batch_stride + head * p.mask_head_stride +
                    scene.first_row * p.mask_row_stride + first_key * p.mask_key_stride;
    for (Index key = 0; key < keys; ++key)
        for (Index r = 0; r < kTileRows<T>; ++r)
            scene.probability[key * kTileRows<T> + r] =
                r < scene.rows ? mask[r * p.mask_row_stride + key * p.mask_key_stride] : T(0);
}

// scene.probability = exp(scores - lse); with `masked` it holds the mask before.
template <bool masked, class T>
void fill_probability(const Scene<T>& scene, const Rows<T>& k, Index first_key, Index keys, Index width) {
    in_steps(keys, [&](Index key, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> score;
        score.add_product(scene.query, k.row(first_key + key), k.stride, 1, width);
        constexpr int together = down < 4 ? down : 4;
#pragma GCC unroll 4
        for (int h = 0; h < kAcross; ++h) {
            const Vec<T> lse = load(scene.lse + h * kLanes<T>);
#pragma GCC unroll 16
            for (int m = 0; m < down; m += together) {
                T* place = scene.probability + (key + m) * kTileRows<T> + h * kLanes<T>;
                Vec<T> x[together];
#pragma GCC unroll 16
                for (int i = 0; i < together; ++i) {
                    x[i] = score.at[m + i][h];
                    if constexpr (masked) x[i] += load(place + i * kTileRows<T>);
                    x[i] -= lse;
                }
                exp_or_zero<T>(x);
#pragma GCC unroll 16
                for (int i = 0; i < together; ++i) store(place + i * kTileRows<T>, x[i]);
            }
        }
    });
}

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

// outputs += P dv + G v over the keys of a block.
template <bool moving, bool with_value, class T>
void add_outputs(const T* change, const Scene<T>& scene, Index tangent, const Rows<T>& v, const Rows<T>& dv,
                 Index first_key, Index keys, Index value_width) {
    T* outputs = scene.outputs_of(tangent, value_width);
    in_steps(value_width, [&](Index j, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> output;
        if constexpr (with_value) output.add_product(scene.probability, dv.row(first_key) + j, 1, dv.stride, keys);
        if constexpr (moving) output.add_product(change, v.row(first_key) + j, 1, v.stride, keys);
#pragma GCC unroll 16
        for (int m = 0; m < down; ++m) {
#pragma GCC unroll 4
            for (int h = 0; h < kAcross; ++h) {
                T* place = outputs + (j + m) * kTileRows<T> + h * kLanes<T>;
                store(place, load(place) + output.at[m][h]);
            }
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
    for (Index r = 0; r < kTileRows<T>; ++r) {
        const T value = r < scene.rows ? lse[(scene.first_row + r) * p.lse_row_stride] : T(0);
        // A row without any admissible key: its scores are all -inf and so its probabilities zero.
        scene.lse[r] = value == -__builtin_inf() ? T(0) : value;
    }
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
    const Work<T>& work = *static_cast<const Work<T>*>(job);
    const Arguments& a = work.arguments;
    const AttentionPrimal& p = a.primal;
    const Index heads = p.batch * p.heads, rest = work.heads_first ? task / heads : task % (work.groups * work.splits);
    const Index which = work.heads_first ? task % heads : task / (work.groups * work.splits);
    const Index batch = which / p.heads, head = which % p.heads;
    const Index split = rest % work.splits, group = rest / work.splits;
    const Index first = split * a.count / work.splits, tangents = (split + 1) * a.count / work.splits - first;
    const Part<T> part{a, batch, head, first};

    T* const change = static_cast<T*>(work.scratch.slot(slot));
    Scene<T> scenes[kTiles];
    Index tiles = 0;
    for (Index row = group * work.tiles * kTileRows<T>; tiles < work.tiles && row < p.rows; row += kTileRows<T>) {
        T* memory = change + (kKeyBlock + tiles * panels_per_tile(p, tangents)) * kTileRows<T>;
        scenes[tiles] = carve<T>(memory, p, tangents);
        scenes[tiles].first_row = row;
        scenes[tiles].rows = p.rows - row < kTileRows<T> ? p.rows - row : kTileRows<T>;
        pack_primal(scenes[tiles++], part);
    }

    const Rows<T> k = part.primal(p.k), v = part.primal(p.v);
    // Runs once where there are no keys at all: the result is zero then.
    Index key = 0;
    do {
        const Index keys = p.keys - key < kKeyBlock ? p.keys - key : kKeyBlock;
        for (Index i = 0; i < tiles; ++i) {
            if (p.mask != nullptr) {
                fill_mask(scenes[i], p, batch, head, key, keys);
                fill_probability<true>(scenes[i], k, key, keys, p.width);
            } else {
                fill_probability<false>(scenes[i], k, key, keys, p.width);
            }
        }
        const bool last = key + keys == p.keys;
        for (Index t = 0; t < tangents; ++t) {
            const Rows<T> dk = part.tangent(a.dk, t), dv = part.tangent(a.dv, t);
            for (Index i = 0; i < tiles; ++i) {
                if (key == 0) pack_tangent<with_query>(scenes[i], part, t);
                if constexpr (moving)
                    fill_change<with_query, with_key>(change, scenes[i], t, k, dk, key, keys, p.width);
                add_outputs<moving, with_value>(change, scenes[i], t, v, dv, key, keys, p.value_width);
                if (last) write_result<moving>(scenes[i], part, t);
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
    constexpr Index panel = kTileRows<T> * static_cast<Index>(sizeof(T));
    const auto bytes = [&](Index tiles, Index tangents) {
        return (kKeyBlock + tiles * panels_per_tile(p, tangents)) * panel;
    };
    Index splits = 1, tiles = 1;
    while (splits < a.count && bytes(1, (a.count + splits - 1) / splits) > kScratchBytes) ++splits;
    while (tiles < kTiles && bytes(tiles + 1, (a.count + splits - 1) / splits) <= kScratchBytes) ++tiles;
    const int threads = a.threads > 1 ? a.threads : 1;
    const Index all = (p.rows + kTileRows<T> - 1) / kTileRows<T>;
    const auto groups = [&] { return (all + tiles - 1) / tiles; };
    const auto tasks = [&] { return p.batch * p.heads * groups() * splits; };
    if (threads > 1) {
        while (tiles > 1 && tasks() < kTasksPerThread * threads) --tiles;
        while (splits < a.count && tasks() < kTasksPerThread * threads) ++splits;
    }
    tiles = (all + groups() - 1) / groups();
    const Scratch scratch(threads, bytes(tiles, (a.count + splits - 1) / splits));
    // With few keys most of the time goes into reading and writing rows; those of all heads may share cache lines and
    // pages. With many keys those of one head are better kept in the cache.
    const Work<T> work{a, scratch, tiles, groups(), splits, p.rows > p.keys};
    parallel_for(tasks(), threads, choose_task<T>(a), &work);
}

}  // namespace

void attention_tangent(const Arguments& arguments) {
    if (arguments.primal.float64)
        run<double>(arguments);
    else
        run<float>(arguments);
}

}  // namespace sharpcore::SHARPCORE_ISA
