// Every kernel on odd sizes, called by several threads at once with several workers each: the bits must be those of a
// single thread, and no element of a poisoned output may be left. Inputs and outputs lie in blocks of their exact size.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "sharpcore/attention_adjoint.h"
#include "sharpcore/attention_forward.h"
#include "sharpcore/attention_tangent.h"
#include "sharpcore/dtype.h"
#include "sharpcore/geglu_tangent.h"
#include "sharpcore/group_norm_silu_forward.h"
#include "sharpcore/group_norm_silu_tangent.h"
#include "sharpcore/grow_basis.h"
#include "sharpcore/isa.h"
#include "sharpcore/layer_norm_tangent.h"
#include "sharpcore/philox.h"
#include "sharpcore/residual_add.h"
#include "sharpcore/upsample_nearest_tangent.h"

namespace {

using sharpcore::AttentionOperand;
using sharpcore::Dtype;
using sharpcore::MaskDtype;
using Index = std::int64_t;

constexpr Index kCounts[] = {1, 3};

// One call of a kernel: what it is, and how to run it on some threads.
struct Case {
    std::string name;
    std::function<std::vector<char>(int threads)> run;  // returns the bytes of the outputs
};

template <class T>
using Tensor = std::shared_ptr<std::vector<T>>;

// A number as it lies in memory, and what the statistics beside it are.
struct Half {
    std::uint16_t bits;
};

template <class T>
struct Number {
    using Statistic = T;
    static constexpr Dtype dtype = sizeof(T) == sizeof(double) ? Dtype::float64 : Dtype::float32;
    static T from(double value) { return static_cast<T>(value); }
    static bool is_finite(T value) { return std::isfinite(value); }
};

template <>
struct Number<Half> {
    using Statistic = float;
    static constexpr Dtype dtype = Dtype::bfloat16;
    static Half from(double value) {
        const auto single = static_cast<float>(value);
        std::uint32_t bits;
        std::memcpy(&bits, &single, sizeof(bits));
        return {static_cast<std::uint16_t>(bits >> 16)};
    }
    static bool is_finite(Half value) { return (value.bits & 0x7f80u) != 0x7f80u; }
};

template <class T>
using Statistic = typename Number<T>::Statistic;

template <class T>
Tensor<T> normal(Index size) {
    static std::mt19937 generator(0);
    std::normal_distribution<double> distribution;
    auto tensor = std::make_shared<std::vector<T>>(size);
    for (T& entry : *tensor) entry = Number<T>::from(distribution(generator));
    return tensor;
}

// An output filled with NaN, whose bytes are kept once they are all finite.
template <class T>
class Output {
public:
    explicit Output(Index size) : entries_(size, Number<T>::from(std::nan(""))) {}
    T* data() { return entries_.data(); }
    void append_to(std::vector<char>& bytes) const {
        for (T entry : entries_) CHECK(Number<T>::is_finite(entry));
        const char* begin = reinterpret_cast<const char*>(entries_.data());
        bytes.insert(bytes.end(), begin, begin + entries_.size() * sizeof(T));
    }

private:
    std::vector<T> entries_;
};

template <class T>
void add_group_norm(std::vector<Case>& cases, Index channels, Index groups, Index positions, bool channels_last,
                    bool silu) {
    for (Index count : kCounts) {
        const Index batch = 2, size = channels * positions;
        const auto x = normal<T>(batch * size), vectors = normal<T>(count * batch * size);
        using S = Statistic<T>;
        const auto mean = normal<S>(batch * groups), rstd = normal<S>(batch * groups);
        // Parameters of each sample, the weight alone; the bias is shared.
        const auto weight = normal<S>(batch * channels), bias = normal<S>(channels);
        for (bool adjoint : {false, true})
            cases.push_back({"group_norm_silu", [=](int threads) {
                                 Output<T> out(count * batch * size);
                                 sharpcore::GroupNormSiluArguments a{};
                                 a.out = out.data();
                                 a.vectors = vectors->data();
                                 a.x = x->data();
                                 a.mean = mean->data();
                                 a.rstd = rstd->data();
                                 a.weight = silu ? weight->data() : nullptr;
                                 a.bias = silu ? bias->data() : nullptr;
                                 a.dtype = Number<T>::dtype;
                                 a.count = count;
                                 a.batch = batch;
                                 a.channels = channels;
                                 a.positions = positions;
                                 a.groups = groups;
                                 a.out_count_stride = a.vector_count_stride = batch * size;
                                 a.out_batch_stride = a.vector_batch_stride = a.x_batch_stride = size;
                                 a.weight_batch_stride = channels;
                                 a.channels_last = channels_last;
                                 a.silu = silu;
                                 a.threads = threads;
                                 if (adjoint)
                                     SHARPCORE_CALL_KERNEL(group_norm_silu_adjoint, a);
                                 else
                                     SHARPCORE_CALL_KERNEL(group_norm_silu_tangent, a);
                                 std::vector<char> bytes;
                                 out.append_to(bytes);
                                 return bytes;
                             }});
    }
}

template <class T>
void add_group_norm_forward(std::vector<Case>& cases, Index channels, Index groups, Index positions,
                            bool channels_last) {
    using S = Statistic<T>;
    const Index batch = 2, size = channels * positions;
    const auto x = normal<T>(batch * size);
    const auto weight = normal<S>(channels), bias = normal<S>(channels);
    cases.push_back({"group_norm_silu_forward", [=](int threads) {
                         Output<T> out(batch * size);
                         Output<S> mean(batch * groups), rstd(batch * groups);
                         sharpcore::GroupNormSiluForwardArguments a{};
                         a.out = out.data();
                         a.mean = mean.data();
                         a.rstd = rstd.data();
                         a.x = x->data();
                         a.weight = weight->data();
                         a.bias = bias->data();
                         a.dtype = Number<T>::dtype;
                         a.eps = 1e-5;
                         a.batch = batch;
                         a.channels = channels;
                         a.positions = positions;
                         a.groups = groups;
                         a.out_batch_stride = a.x_batch_stride = size;
                         a.channels_last = channels_last;
                         a.silu = true;
                         a.threads = threads;
                         SHARPCORE_CALL_KERNEL(group_norm_silu_forward, a);
                         std::vector<char> bytes;
                         out.append_to(bytes);
                         mean.append_to(bytes);
                         rstd.append_to(bytes);
                         return bytes;
                     }});
}

template <class T>
void add_layer_norm(std::vector<Case>& cases, Index rows, Index size, bool columns, bool weighted) {
    for (Index count : kCounts) {
        const Index batch = columns ? 2 : 1, all = batch * rows * size;
        using S = Statistic<T>;
        const auto x = normal<T>(all), vectors = normal<T>(count * all);
        const auto weight = normal<S>(size), mean = normal<S>(batch * rows), rstd = normal<S>(batch * rows);
        for (bool adjoint : {false, true})
            cases.push_back({"layer_norm", [=](int threads) {
                                 Output<T> out(count * all);
                                 sharpcore::LayerNormArguments a{};
                                 a.out = out.data();
                                 a.vectors = vectors->data();
                                 a.x = x->data();
                                 a.mean = mean->data();
                                 a.rstd = rstd->data();
                                 a.weight = weighted ? weight->data() : nullptr;
                                 a.dtype = Number<T>::dtype;
                                 a.columns = columns;
                                 a.count = count;
                                 a.batch = batch;
                                 a.rows = rows;
                                 a.size = size;
                                 a.out_count_stride = a.vector_count_stride = all;
                                 a.vector_batch_stride = rows * size;
                                 a.threads = threads;
                                 if (adjoint)
                                     SHARPCORE_CALL_KERNEL(layer_norm_adjoint, a);
                                 else
                                     SHARPCORE_CALL_KERNEL(layer_norm_tangent, a);
                                 std::vector<char> bytes;
                                 out.append_to(bytes);
                                 return bytes;
                             }});
    }
}

template <class T>
void add_geglu(std::vector<Case>& cases, Index rows, Index columns, bool tanh) {
    const auto projection = normal<T>(rows * 2 * columns);
    cases.push_back({"geglu_forward", [=](int threads) {
                         Output<T> value(rows * columns), factors(rows * 2 * columns);
                         sharpcore::GegluForwardArguments a{};
                         a.value = value.data();
                         a.factors = factors.data();
                         a.projection = projection->data();
                         a.dtype = Number<T>::dtype;
                         a.tanh = tanh;
                         a.rows = rows;
                         a.columns = columns;
                         a.threads = threads;
                         SHARPCORE_CALL_KERNEL(geglu_forward, a);
                         std::vector<char> bytes;
                         value.append_to(bytes);
                         factors.append_to(bytes);
                         return bytes;
                     }});
    for (Index count : kCounts) {
        for (bool adjoint : {false, true}) {
            const Index in = rows * columns * (adjoint ? 1 : 2), outs = rows * columns * (adjoint ? 2 : 1);
            const auto vectors = normal<T>(count * in);
            cases.push_back({"geglu", [=](int threads) {
                                 Output<T> out(count * outs);
                                 sharpcore::GegluArguments a{};
                                 a.out = out.data();
                                 a.vectors = vectors->data();
                                 a.factors = projection->data();
                                 a.dtype = Number<T>::dtype;
                                 a.count = count;
                                 a.rows = rows;
                                 a.columns = columns;
                                 a.out_count_stride = outs;
                                 a.vector_count_stride = in;
                                 a.threads = threads;
                                 if (adjoint)
                                     SHARPCORE_CALL_KERNEL(geglu_adjoint, a);
                                 else
                                     SHARPCORE_CALL_KERNEL(geglu_tangent, a);
                                 std::vector<char> bytes;
                                 out.append_to(bytes);
                                 return bytes;
                             }});
        }
    }
}

template <class T>
void add_residual_add(std::vector<Case>& cases, Index rows, Index columns) {
    for (Index count : kCounts) {
        const Index batch = 2, size = rows * columns;
        const auto first = normal<T>(count * batch * size), second = normal<T>(count * batch * size);
        cases.push_back({"residual_add", [=](int threads) {
                             Output<T> out(count * batch * size);
                             sharpcore::ResidualAddArguments a{};
                             a.out = out.data();
                             a.out_count_stride = batch * size;
                             a.out_batch_stride = size;
                             a.first = {first->data(), false, batch * size, size};
                             a.second = {second->data(), true, batch * size, size};
                             a.scale = 0.5;
                             a.dtype = Number<T>::dtype;
                             a.count = count;
                             a.batch = batch;
                             a.rows = rows;
                             a.columns = columns;
                             a.threads = threads;
                             SHARPCORE_CALL_KERNEL(residual_add, a);
                             std::vector<char> bytes;
                             out.append_to(bytes);
                             return bytes;
                         }});
    }
}

template <class T>
void add_upsample(std::vector<Case>& cases, Index channels, Index height, Index width, bool channels_last) {
    for (Index count : kCounts) {
        const Index batch = 2, small = channels * height * width, large = 6 * small;
        for (bool adjoint : {false, true}) {
            const Index in = adjoint ? large : small, outs = adjoint ? small : large;
            const auto vectors = normal<T>(count * batch * in);
            cases.push_back({"upsample_nearest", [=](int threads) {
                                 Output<T> out(count * batch * outs);
                                 sharpcore::UpsampleNearestArguments a{};
                                 a.out = out.data();
                                 a.vectors = vectors->data();
                                 a.dtype = Number<T>::dtype;
                                 a.channels_last = channels_last;
                                 a.count = count;
                                 a.batch = batch;
                                 a.channels = channels;
                                 a.height = height;
                                 a.width = width;
                                 a.down = 2;
                                 a.across = 3;
                                 a.out_count_stride = batch * outs;
                                 a.out_batch_stride = outs;
                                 a.vector_count_stride = batch * in;
                                 a.vector_batch_stride = in;
                                 a.threads = threads;
                                 if (adjoint)
                                     SHARPCORE_CALL_KERNEL(upsample_nearest_adjoint, a);
                                 else
                                     SHARPCORE_CALL_KERNEL(upsample_nearest_tangent, a);
                                 std::vector<char> bytes;
                                 out.append_to(bytes);
                                 return bytes;
                             }});
        }
    }
}

template <class T>
void add_philox(std::vector<Case>& cases, Index dimension) {
    using sharpcore::ProbeKind;
    const auto ids = std::make_shared<std::vector<Index>>(std::vector<Index>{0, Index{1} << 40});
    for (Index count : kCounts) {
        for (ProbeKind kind : {ProbeKind::rademacher, ProbeKind::normal, ProbeKind::sphere})
            cases.push_back({"philox", [=](int threads) {
                                 Output<T> out(count * 2 * dimension);
                                 sharpcore::PhiloxArguments a{};
                                 a.out = out.data();
                                 a.sample_ids = ids->data();
                                 a.dtype = Number<T>::dtype;
                                 a.kind = kind;
                                 a.seed = 42;
                                 a.first = 3;
                                 a.count = count;
                                 a.samples = 2;
                                 a.dimension = dimension;
                                 a.threads = threads;
                                 SHARPCORE_CALL_KERNEL(philox_probes, a);
                                 std::vector<char> bytes;
                                 out.append_to(bytes);
                                 return bytes;
                             }});
    }
}

struct AttentionSizes {
    Index heads, rows, keys, width, value_width;
};

template <class T>
class Attention {
public:
    Attention(AttentionSizes sizes, bool masked)
        : sizes_(sizes),
          q_(normal<T>(size_of(sizes.rows, sizes.width))),
          k_(normal<T>(size_of(sizes.keys, sizes.width))),
          v_(normal<T>(size_of(sizes.keys, sizes.value_width))),
          out_(normal<T>(size_of(sizes.rows, sizes.value_width))),
          lse_(normal<Statistic<T>>(kBatch * sizes.heads * sizes.rows)),
          mask_(masked ? normal<T>(sizes.rows * sizes.keys) : nullptr) {}

    static constexpr Index kBatch = 2;

    Index size_of(Index rows, Index width) const { return kBatch * sizes_.heads * rows * width; }

    // Memory is [count, batch, rows, heads, width], as the projections of a transformer leave it.
    AttentionOperand operand(const T* data, Index rows, Index width) const {
        return {data, size_of(rows, width), rows * sizes_.heads * width, width, sizes_.heads * width};
    }

    sharpcore::AttentionPrimal primal() const {
        sharpcore::AttentionPrimal p{};
        p.q = operand(q_->data(), sizes_.rows, sizes_.width);
        p.k = operand(k_->data(), sizes_.keys, sizes_.width);
        p.v = operand(v_->data(), sizes_.keys, sizes_.value_width);
        p.out = operand(out_->data(), sizes_.rows, sizes_.value_width);
        p.lse = lse_->data();
        p.lse_batch_stride = sizes_.heads * sizes_.rows;
        p.lse_head_stride = sizes_.rows;
        p.lse_row_stride = 1;
        p.mask.data = mask_ == nullptr ? nullptr : mask_->data();
        p.mask.row_stride = sizes_.keys;
        p.mask.key_stride = 1;
        p.mask.dtype = static_cast<MaskDtype>(Number<T>::dtype);
        p.scale = 0.2;
        p.dtype = Number<T>::dtype;
        p.batch = kBatch;
        p.heads = sizes_.heads;
        p.rows = sizes_.rows;
        p.keys = sizes_.keys;
        p.width = sizes_.width;
        p.value_width = sizes_.value_width;
        return p;
    }

private:
    AttentionSizes sizes_;
    Tensor<T> q_, k_, v_, out_;
    Tensor<Statistic<T>> lse_;
    Tensor<T> mask_;
};

// `parts`: whether q, k and v have tangents, or are wanted.
template <class T>
void add_attention(std::vector<Case>& cases, AttentionSizes s, bool masked, std::vector<bool> parts) {
    const Attention<T> attention(s, masked);
    const Index all_rows = attention.size_of(s.rows, 1);
    cases.push_back({"attention_forward", [=](int threads) {
                         Output<T> out(all_rows * s.value_width);
                         Output<Statistic<T>> lse(all_rows);
                         sharpcore::AttentionForwardArguments a{};
                         a.primal = attention.primal();
                         a.primal.out = attention.operand(out.data(), s.rows, s.value_width);
                         a.primal.lse = lse.data();
                         a.threads = threads;
                         SHARPCORE_CALL_KERNEL(attention_forward, a);
                         std::vector<char> bytes;
                         out.append_to(bytes);
                         lse.append_to(bytes);
                         return bytes;
                     }});
    for (Index count : kCounts) {
        const Index rows = count * attention.size_of(s.rows, 1), keys = count * attention.size_of(s.keys, 1);
        const auto dq = normal<T>(rows * s.width), dk = normal<T>(keys * s.width), dv = normal<T>(keys * s.value_width),
                   cotangent = normal<T>(rows * s.value_width);
        cases.push_back({"attention_tangent", [=](int threads) {
                             Output<T> result(rows * s.value_width);
                             sharpcore::AttentionTangentArguments a{};
                             a.primal = attention.primal();
                             a.result = attention.operand(result.data(), s.rows, s.value_width);
                             if (parts[0]) a.dq = attention.operand(dq->data(), s.rows, s.width);
                             if (parts[1]) a.dk = attention.operand(dk->data(), s.keys, s.width);
                             if (parts[2]) a.dv = attention.operand(dv->data(), s.keys, s.value_width);
                             a.count = count;
                             a.threads = threads;
                             SHARPCORE_CALL_KERNEL(attention_tangent, a);
                             std::vector<char> bytes;
                             result.append_to(bytes);
                             return bytes;
                         }});
        cases.push_back({"attention_adjoint", [=](int threads) {
                             Output<T> grad_q(parts[0] ? rows * s.width : 0), grad_k(parts[1] ? keys * s.width : 0),
                                 grad_v(parts[2] ? keys * s.value_width : 0);
                             sharpcore::AttentionAdjointArguments a{};
                             a.primal = attention.primal();
                             a.cotangent = attention.operand(cotangent->data(), s.rows, s.value_width);
                             if (parts[0]) a.grad_q = attention.operand(grad_q.data(), s.rows, s.width);
                             if (parts[1]) a.grad_k = attention.operand(grad_k.data(), s.keys, s.width);
                             if (parts[2]) a.grad_v = attention.operand(grad_v.data(), s.keys, s.value_width);
                             a.count = count;
                             a.threads = threads;
                             SHARPCORE_CALL_KERNEL(attention_adjoint, a);
                             std::vector<char> bytes;
                             for (const Output<T>* grad : {&grad_q, &grad_k, &grad_v}) grad->append_to(bytes);
                             return bytes;
                         }});
    }
}

// A basis of unit vectors; one of its columns lies in it. Threads share one problem of 9001 elements.
template <class T>
void add_grow_basis(std::vector<Case>& cases, Index batch, Index rows, Index size, Index begin, Index count) {
    const auto block = normal<T>(count * batch * size);
    for (Index i = 0; i < batch * size; ++i)
        if (i % size >= begin) (*block)[(count - 1) * batch * size + i] = Number<T>::from(0);
    cases.push_back({"grow_basis", [=](int threads) {
                         // Blocks of their exact size; rows behind the first are finite, but nobody reads them.
                         std::vector<double> basis(batch * rows * size);
                         for (Index i = 0; i < batch; ++i)
                             for (Index m = 0; m < begin; ++m) basis[(i * rows + m) * size + m] = 1;
                         std::vector<Index> sizes(batch, begin), ranks(batch, -1);
                         if (batch > 2) sizes[1] = -1;
                         const std::vector<double> floor(batch, 0.0);
                         Output<double> coefficients(batch * rows * count), triangle(batch * count * count),
                             dropped(batch * count);
                         sharpcore::GrowBasisArguments a{};
                         a.basis = basis.data();
                         a.sizes = sizes.data();
                         a.block = block->data();
                         a.block_count_stride = batch * size;
                         a.block_batch_stride = size;
                         a.floor = floor.data();
                         a.coefficients = coefficients.data();
                         a.triangle = triangle.data();
                         a.dropped = dropped.data();
                         a.ranks = ranks.data();
                         a.dtype = Number<T>::dtype;
                         a.count = count;
                         a.batch = batch;
                         a.rows = rows;
                         a.size = size;
                         a.limit = rows < size ? rows : size;
                         a.threads = threads;
                         SHARPCORE_CALL_KERNEL(grow_basis, a);
                         std::vector<char> bytes;
                         for (const Output<double>* out : {&coefficients, &triangle, &dropped}) out->append_to(bytes);
                         for (Index i = 0; i < batch; ++i) {
                             const Index expected = count - 1 < a.limit - begin ? count - 1 : a.limit - begin;
                             CHECK(ranks[i] == (sizes[i] < 0 ? 0 : expected));
                         }
                         const char* first = reinterpret_cast<const char*>(basis.data());
                         bytes.insert(bytes.end(), first, first + basis.size() * sizeof(double));
                         return bytes;
                     }});
}

template <class T>
void add_cases(std::vector<Case>& cases) {
    for (bool channels_last : {false, true}) {
        add_group_norm<T>(cases, 8, 4, 1, channels_last, true);
        add_group_norm<T>(cases, 33, 11, 7, channels_last, true);
        add_group_norm<T>(cases, 64, 2, 77, channels_last, false);
        add_group_norm<T>(cases, 160, 32, 33, channels_last, true);
        add_group_norm_forward<T>(cases, 33, 11, 7, channels_last);
        add_group_norm_forward<T>(cases, 160, 32, 33, channels_last);
        add_upsample<T>(cases, 7, 5, 3, channels_last);
        add_upsample<T>(cases, 33, 1, 17, channels_last);
        add_layer_norm<T>(cases, 7, 1, channels_last, true);
        add_layer_norm<T>(cases, 33, 59, channels_last, true);
        add_layer_norm<T>(cases, 77, 111, channels_last, false);
    }
    add_layer_norm<T>(cases, 1, 1025, false, true);
    add_residual_add<T>(cases, 1, 7);
    add_residual_add<T>(cases, 33, 77);
    add_residual_add<T>(cases, 144, 40);
    for (Index dimension : {1, 33, 129, 2047, 20001}) add_philox<T>(cases, dimension);
    for (bool tanh : {false, true}) {
        add_geglu<T>(cases, 1, 1, tanh);
        add_geglu<T>(cases, 33, 77, tanh);
        add_geglu<T>(cases, 7, 2100, tanh);
    }
    add_attention<T>(cases, {2, 1, 1, 1, 1}, false, {true, true, true});
    add_attention<T>(cases, {2, 33, 77, 8, 8}, true, {true, false, false});
    add_attention<T>(cases, {1, 77, 7, 40, 11}, false, {false, true, true});
    add_attention<T>(cases, {3, 77, 33, 59, 64}, false, {true, true, false});
    // Heads enough for attention_adjoint to gather grad_q along keys.
    add_attention<T>(cases, {5, 33, 65, 7, 17}, false, {true, true, true});
    add_attention<T>(cases, {4, 65, 33, 16, 8}, true, {true, false, true});
}

}  // namespace

int main() {
    try {
        sharpcore::active_isa();
    } catch (const std::exception& error) {
        std::puts(error.what());
        return 77;
    }
    std::vector<Case> cases;
    add_cases<float>(cases);
    add_cases<double>(cases);
    add_cases<Half>(cases);
    add_grow_basis<float>(cases, 3, 9, 77, 4, 3);
    add_grow_basis<double>(cases, 5, 20, 515, 9, 6);
    add_grow_basis<double>(cases, 2, 7, 7, 3, 5);
    add_grow_basis<float>(cases, 1, 12, 9001, 7, 5);
    std::vector<std::vector<char>> expected;
    for (const Case& one : cases) expected.push_back(one.run(1));

    const std::size_t callers = 3, stride = 7;
    std::vector<std::thread> threads;
    for (std::size_t caller = 0; caller < callers; ++caller)
        threads.emplace_back([&, caller] {
            // Callers begin at different cases, so that different kernels meet, and the same ones as well.
            for (std::size_t i = 0; i < cases.size(); ++i) {
                const std::size_t which = (i + caller / 2 * stride) % cases.size();
                for (int workers : {2, 5}) {
                    if (cases[which].run(workers) == expected[which]) continue;
                    std::fprintf(stderr, "%s, case %zu: other bits with %d threads\n", cases[which].name.c_str(), which,
                                 workers);
                    std::abort();
                }
            }
        });
    for (std::thread& thread : threads) thread.join();
    std::printf("kernels: %zu cases on %s, the bits of one thread\n", cases.size(),
                sharpcore::isa_name(sharpcore::active_isa()));
}
