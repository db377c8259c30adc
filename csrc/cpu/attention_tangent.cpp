// K tangents of attention. A task owns a tile of query rows and some of the tangents and walks over blocks of keys: the
// probabilities of a block are computed once, then each tangent takes its turn with them while they are in the cache.
#include "sharpcore/attention_tangent.h"

#include "sharpcore/attention_tile.h"
#include "sharpcore/parallel.h"

namespace sharpcore::SHARPCORE_ISA {
namespace {

using Arguments = AttentionTangentArguments;

// Keys of a block: two tiles of so many keys fit into the first-level cache beside the panels of small heads.
constexpr Index kKeyBlock = 64;

// Scratch memory of a thread is at most about this, or what one tangent needs: see scratch_entries. It depends on the
// head size and on nothing else.
constexpr Index kScratchBytes = 384 * 1024;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

// Scratch memory of one task. Panels have kTileRows columns, one a query row.
template <class T>
struct Scene {
    T* query;        // [width]: scale * q
    T* probability;  // [kKeyBlock]
    T* change;       // [kKeyBlock]: G of one tangent
    T* lse;          // [1]
    T* queries;      // per tangent [width]: scale * dq
    T* sums;         // per tangent [1]: rowsum(G)
    T* outputs;      // per tangent [value_width]: P dv + G v
};

template <class T>
constexpr Index fixed_panels(const AttentionPrimal& p) {
    return p.width + 2 * kKeyBlock + 1;
}

constexpr Index panels_per_tangent(const AttentionPrimal& p) { return p.width + 1 + p.value_width; }

template <class T>
Scene<T> carve(void* memory, const AttentionPrimal& p, Index tangents) {
    Scene<T> scene;
    T* next = static_cast<T*>(memory);
    const auto take = [&](Index panels) {
        T* taken = next;
        next += panels * kTileRows<T>;
        return taken;
    };
    scene.query = take(p.width);
    scene.probability = take(kKeyBlock);
    scene.change = take(kKeyBlock);
    scene.lse = take(1);
    scene.queries = take(tangents * p.width);
    scene.sums = take(tangents);
    scene.outputs = take(tangents * p.value_width);
    return scene;
}

template <class T>
struct Work {
    const Arguments& arguments;
    const Scratch& scratch;
    Index tiles, splits;  // of the rows of a head, and of the tangents
};

// tile[key][r] = mask of rows [first_row, first_row + rows) and keys [first_key, first_key + keys)
template <class T>
void fill_mask(T* tile, const AttentionPrimal& p, Index batch, Index head, Index first_row, Index rows,
               Index first_key, Index keys) {
    const T* mask = static_cast<const T*>(p.mask) + batch * p.mask_batch_stride + head * p.mask_head_stride +
                    first_row * p.mask_row_stride + first_key * p.mask_key_stride;
    for (Index key = 0; key < keys; ++key)
        for (Index r = 0; r < kTileRows<T>; ++r)
            tile[key * kTileRows<T> + r] =
                r < rows ? mask[r * p.mask_row_stride + key * p.mask_key_stride] : T(0);
}

// scene.probability = exp(scores - lse); with `masked` it holds the mask before.
template <bool masked, class T>
void fill_probability(const Scene<T>& scene, const Rows<T>& k, Index first_key, Index keys, Index width) {
    in_steps(keys, [&](Index key, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> score;
        score.add_product(scene.query, k.row(first_key + key), k.stride, 1, width);
        for (int h = 0; h < kAcross; ++h) {
            const Vec<T> lse = load(scene.lse + h * kLanes<T>);
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                T* place = scene.probability + (key + m) * kTileRows<T> + h * kLanes<T>;
                Vec<T> exponent = score.at[m][h];
                if constexpr (masked) exponent += load(place);
                store(place, exp_or_zero<T>(exponent - lse));
            }
        }
    });
}

// scene.change = P * scale (dq k^T + q dk^T) of one tangent; its row sums are added to `sums`.
template <bool with_query, bool with_key, class T>
void fill_change(const Scene<T>& scene, const T* query, T* sums, const Rows<T>& k, const Rows<T>& dk, Index first_key,
                 Index keys, Index width) {
    in_steps(keys, [&](Index key, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> change;
        if constexpr (with_query) change.add_product(query, k.row(first_key + key), k.stride, 1, width);
        if constexpr (with_key) change.add_product(scene.query, dk.row(first_key + key), dk.stride, 1, width);
        for (int h = 0; h < kAcross; ++h) {
            Vec<T> sum{};
#pragma GCC unroll 16
            for (int m = 0; m < down; ++m) {
                const Index place = (key + m) * kTileRows<T> + h * kLanes<T>;
                const Vec<T> product = change.at[m][h] * load(scene.probability + place);
                store(scene.change + place, product);
                sum += product;
            }
            store(sums + h * kLanes<T>, load(sums + h * kLanes<T>) + sum);
        }
    });
}

// outputs += P dv + G v over the keys of a block.
template <bool moving, bool with_value, class T>
void add_outputs(const Scene<T>& scene, T* outputs, const Rows<T>& v, const Rows<T>& dv, Index first_key, Index keys,
                 Index value_width) {
    in_steps(value_width, [&](Index j, auto constant) {
        constexpr int down = decltype(constant)::value;
        Accumulators<T, down> output;
        if constexpr (with_value)
            output.add_product(scene.probability, dv.row(first_key) + j, 1, dv.stride, keys);
        if constexpr (moving) output.add_product(scene.change, v.row(first_key) + j, 1, v.stride, keys);
#pragma GCC unroll 16
        for (int m = 0; m < down; ++m) {
            for (int h = 0; h < kAcross; ++h) {
                T* place = outputs + (j + m) * kTileRows<T> + h * kLanes<T>;
                store(place, load(place) + output.at[m][h]);
            }
        }
    });
}

template <bool with_query, bool with_key, bool with_value, class T>
void do_task(const void* job, Index task, int slot) noexcept {
    constexpr bool moving = with_query || with_key;
    const Work<T>& work = *static_cast<const Work<T>*>(job);
    const Arguments& a = work.arguments;
    const AttentionPrimal& p = a.primal;
    const Index split = task % work.splits, tile = task / work.splits % work.tiles;
    const Index part = task / work.splits / work.tiles, batch = part / p.heads, head = part % p.heads;
    const Index first = split * a.count / work.splits, last = (split + 1) * a.count / work.splits;
    const Index first_row = tile * kTileRows<T>;
    const Index rows = p.rows - first_row < kTileRows<T> ? p.rows - first_row : kTileRows<T>;

    const Scene<T> scene = carve<T>(work.scratch.slot(slot), p, last - first);
    const Rows<T> q(p.q, 0, batch, head), k(p.k, 0, batch, head), v(p.v, 0, batch, head), out(p.out, 0, batch, head);
    const T scale = static_cast<T>(p.scale);
    pack_panel(scene.query, q.row(first_row), q.stride, rows, p.width, scale);
    for (Index r = 0; r < kTileRows<T>; ++r) {
        const T* lse = static_cast<const T*>(p.lse) + batch * p.lse_batch_stride + head * p.lse_head_stride;
        const T value = r < rows ? lse[(first_row + r) * p.lse_row_stride] : T(0);
        // A row without any admissible key: its scores are all -inf and so its probabilities zero.
        scene.lse[r] = value == -__builtin_inf() ? T(0) : value;
    }
    for (Index t = 0; t < last - first; ++t) {
        if constexpr (with_query) {
            const Rows<T> dq(a.dq, first + t, batch, head);
            pack_panel(scene.queries + t * p.width * kTileRows<T>, dq.row(first_row), dq.stride, rows, p.width, scale);
        }
        for (Index r = 0; r < kTileRows<T>; ++r) scene.sums[t * kTileRows<T> + r] = 0;
        for (Index i = 0; i < p.value_width * kTileRows<T>; ++i)
            scene.outputs[t * p.value_width * kTileRows<T> + i] = 0;
    }

    for (Index key = 0; key < p.keys; key += kKeyBlock) {
        const Index keys = p.keys - key < kKeyBlock ? p.keys - key : kKeyBlock;
        if (p.mask != nullptr) {
            fill_mask(scene.probability, p, batch, head, first_row, rows, key, keys);
            fill_probability<true>(scene, k, key, keys, p.width);
        } else {
            fill_probability<false>(scene, k, key, keys, p.width);
        }
        for (Index t = 0; t < last - first; ++t) {
            const Rows<T> dk(a.dk, first + t, batch, head), dv(a.dv, first + t, batch, head);
            if constexpr (moving)
                fill_change<with_query, with_key>(scene, scene.queries + t * p.width * kTileRows<T>,
                                                  scene.sums + t * kTileRows<T>, k, dk, key, keys, p.width);
            add_outputs<moving, with_value>(scene, scene.outputs + t * p.value_width * kTileRows<T>, v, dv, key, keys,
                                            p.value_width);
        }
    }

    for (Index t = 0; t < last - first; ++t) {
        const Rows<T> result(a.result, first + t, batch, head);
        const T* sums = scene.sums + t * kTileRows<T>;
        unpack_panel(scene.outputs + t * p.value_width * kTileRows<T>, rows, p.value_width,
                     [&](Index r, Index begin, Vec<T> entries, Index count) {
                         const T* mean = out.row(first_row + r) + begin;
                         T* place = const_cast<T*>(result.row(first_row + r)) + begin;
                         if (count == kLanes<T>) {
                             if constexpr (moving) entries -= sums[r] * load(mean);
                             store(place, entries);
                         } else {
                             if constexpr (moving) entries -= sums[r] * load_partial(mean, count);
                             store_partial(place, entries, count);
                         }
                     });
    }
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

// Every tangent of a row is computed in the same way however the tangents are split over tasks.
template <class T>
void run(const Arguments& a) {
    const AttentionPrimal& p = a.primal;
    const Index panel_bytes = kTileRows<T> * static_cast<Index>(sizeof(T));
    const Index tiles = (p.rows + kTileRows<T> - 1) / kTileRows<T>, tasks = tiles * p.batch * p.heads;
    Index most = kScratchBytes / (panels_per_tangent(p) * panel_bytes);
    if (most < 1) most = 1;
    Index splits = (a.count + most - 1) / most;
    const int threads = a.threads > 1 ? a.threads : 1;
    if (threads > 1 && tasks * splits < kTasksPerThread * threads)
        splits = (kTasksPerThread * threads + tasks - 1) / tasks;
    if (splits > a.count) splits = a.count;
    const Index tangents = (a.count + splits - 1) / splits;
    const Scratch scratch(threads, (fixed_panels<T>(p) + tangents * panels_per_tangent(p)) * panel_bytes);
    const Work<T> work{a, scratch, tiles, splits};
    parallel_for(tasks * splits, threads, choose_task<T>(a), &work);
}

}  // namespace

void attention_tangent(const Arguments& arguments) {
    if (arguments.primal.float64)
        run<double>(arguments);
    else
        run<float>(arguments);
}

}  // namespace sharpcore::SHARPCORE_ISA
