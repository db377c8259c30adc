// The Python module sharpcore._C: kernels on raw pointers. The Python side has checked shapes, types and layouts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

#include "sharpcore/attention_adjoint.h"
#include "sharpcore/attention_forward.h"
#include "sharpcore/attention_tangent.h"
#include "sharpcore/cpu_features.h"
#include "sharpcore/geglu_tangent.h"
#include "sharpcore/group_norm_silu_forward.h"
#include "sharpcore/group_norm_silu_tangent.h"
#include "sharpcore/grow_basis.h"
#include "sharpcore/isa.h"
#include "sharpcore/layer_norm_tangent.h"
#include "sharpcore/philox.h"
#include "sharpcore/residual_add.h"
#include "sharpcore/upsample_nearest_tangent.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Strides = std::pair<std::int64_t, std::int64_t>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

sharpcore::GroupNormSiluArguments group_norm_arguments(Address out, Address vectors, Address x, Address mean,
                                                       Address rstd, Address weight, Address bias, int dtype,
                                                       std::int64_t count, std::int64_t batch, std::int64_t channels,
                                                       std::int64_t positions, std::int64_t groups, Strides out_strides,
                                                       Strides vector_strides, std::int64_t x_stride,
                                                       std::int64_t weight_stride, std::int64_t bias_stride,
                                                       bool channels_last, bool silu, int threads) {
    return {pointer(out),
            pointer(vectors),
            pointer(x),
            pointer(mean),
            pointer(rstd),
            pointer(weight),
            pointer(bias),
            static_cast<sharpcore::Dtype>(dtype),
            count,
            batch,
            channels,
            positions,
            groups,
            out_strides.first,
            out_strides.second,
            vector_strides.first,
            vector_strides.second,
            x_stride,
            weight_stride,
            bias_stride,
            channels_last,
            silu,
            threads};
}

sharpcore::GroupNormSiluForwardArguments group_norm_forward_arguments(
    Address out, Address mean, Address rstd, Address x, Address weight, Address bias, int dtype, double eps,
    std::int64_t batch, std::int64_t channels, std::int64_t positions, std::int64_t groups, std::int64_t out_stride,
    std::int64_t x_stride, std::int64_t weight_stride, std::int64_t bias_stride, bool channels_last, bool silu,
    int threads) {
    return {pointer(out),
            pointer(mean),
            pointer(rstd),
            pointer(x),
            pointer(weight),
            pointer(bias),
            static_cast<sharpcore::Dtype>(dtype),
            eps,
            batch,
            channels,
            positions,
            groups,
            out_stride,
            x_stride,
            weight_stride,
            bias_stride,
            channels_last,
            silu,
            threads};
}

sharpcore::LayerNormArguments layer_norm_arguments(Address out, Address vectors, Address x, Address mean, Address rstd,
                                                   Address weight, int dtype, bool columns, std::int64_t count,
                                                   std::int64_t batch, std::int64_t rows, std::int64_t size,
                                                   std::int64_t out_stride, Strides vector_strides,
                                                   std::int64_t weight_stride, int threads) {
    return {pointer(out),
            pointer(vectors),
            pointer(x),
            pointer(mean),
            pointer(rstd),
            pointer(weight),
            static_cast<sharpcore::Dtype>(dtype),
            columns,
            count,
            batch,
            rows,
            size,
            out_stride,
            vector_strides.first,
            vector_strides.second,
            weight_stride,
            threads};
}

sharpcore::GegluForwardArguments geglu_forward_arguments(Address value, Address factors, Address projection, int dtype,
                                                         bool tanh, std::int64_t rows, std::int64_t columns,
                                                         int threads) {
    return {pointer(value), pointer(factors), pointer(projection), static_cast<sharpcore::Dtype>(dtype), tanh, rows,
            columns,        threads};
}

sharpcore::GegluArguments geglu_arguments(Address out, Address vectors, Address factors, int dtype, std::int64_t count,
                                          std::int64_t rows, std::int64_t columns, std::int64_t out_stride,
                                          std::int64_t vector_stride, int threads) {
    return {
        pointer(out), pointer(vectors), pointer(factors), static_cast<sharpcore::Dtype>(dtype), count, rows, columns,
        out_stride,   vector_stride,    threads};
}

using ResidualTuple = std::tuple<Address, bool, Strides>;  // data; transposed; strides of count and batch

sharpcore::ResidualAddArguments residual_add_arguments(Address out, Strides out_strides, const ResidualTuple& first,
                                                       const ResidualTuple& second, double scale, int dtype,
                                                       std::int64_t count, std::int64_t batch, std::int64_t rows,
                                                       std::int64_t columns, int threads) {
    const auto residual = [](const ResidualTuple& tuple) {
        const auto& [address, transposed, strides] = tuple;
        return sharpcore::ResidualOperand{reinterpret_cast<void*>(address), transposed, strides.first, strides.second};
    };
    return {reinterpret_cast<void*>(out),
            out_strides.first,
            out_strides.second,
            residual(first),
            residual(second),
            scale,
            static_cast<sharpcore::Dtype>(dtype),
            count,
            batch,
            rows,
            columns,
            threads};
}

sharpcore::UpsampleNearestArguments upsample_arguments(Address out, Address vectors, int dtype, bool channels_last,
                                                       std::array<std::int64_t, 5> sizes,
                                                       std::pair<std::int64_t, std::int64_t> factors,
                                                       Strides out_strides, Strides vector_strides, int threads) {
    const auto [count, batch, channels, height, width] = sizes;
    return {reinterpret_cast<void*>(out),
            reinterpret_cast<void*>(vectors),
            static_cast<sharpcore::Dtype>(dtype),
            channels_last,
            count,
            batch,
            channels,
            height,
            width,
            factors.first,
            factors.second,
            out_strides.first,
            out_strides.second,
            vector_strides.first,
            vector_strides.second,
            threads};
}

using OperandTuple = std::pair<Address, std::array<std::int64_t, 4>>;  // data; strides of count, batch, head, row

sharpcore::AttentionOperand operand(const OperandTuple& tuple) {
    const auto& [address, strides] = tuple;
    return {reinterpret_cast<void*>(address), strides[0], strides[1], strides[2], strides[3]};
}

sharpcore::AttentionPrimal attention_primal(const OperandTuple& q, const OperandTuple& k, const OperandTuple& v,
                                            const OperandTuple& out, Address lse,
                                            std::array<std::int64_t, 3> lse_strides, Address mask,
                                            std::array<std::int64_t, 4> mask_strides, int mask_dtype, double scale,
                                            int dtype, std::array<std::int64_t, 6> sizes) {
    const auto [batch, heads, rows, keys, width, value_width] = sizes;
    return {operand(q),
            operand(k),
            operand(v),
            operand(out),
            reinterpret_cast<void*>(lse),
            lse_strides[0],
            lse_strides[1],
            lse_strides[2],
            {reinterpret_cast<void*>(mask), mask_strides[0], mask_strides[1], mask_strides[2], mask_strides[3],
             static_cast<sharpcore::MaskDtype>(mask_dtype)},
            scale,
            static_cast<sharpcore::Dtype>(dtype),
            batch,
            heads,
            rows,
            keys,
            width,
            value_width};
}

sharpcore::AttentionForwardArguments attention_forward_arguments(OperandTuple q, OperandTuple k, OperandTuple v,
                                                                 OperandTuple out, Address lse,
                                                                 std::array<std::int64_t, 3> lse_strides, Address mask,
                                                                 std::array<std::int64_t, 4> mask_strides,
                                                                 int mask_dtype, double scale, int dtype,
                                                                 std::array<std::int64_t, 6> sizes, int threads) {
    return {attention_primal(q, k, v, out, lse, lse_strides, mask, mask_strides, mask_dtype, scale, dtype, sizes),
            threads};
}

sharpcore::AttentionTangentArguments attention_tangent_arguments(
    OperandTuple q, OperandTuple k, OperandTuple v, OperandTuple out, Address lse,
    std::array<std::int64_t, 3> lse_strides, Address mask, std::array<std::int64_t, 4> mask_strides, int mask_dtype,
    double scale, int dtype, std::array<std::int64_t, 6> sizes, OperandTuple result, OperandTuple dq, OperandTuple dk,
    OperandTuple dv, std::int64_t count, int threads) {
    return {attention_primal(q, k, v, out, lse, lse_strides, mask, mask_strides, mask_dtype, scale, dtype, sizes),
            operand(result),
            operand(dq),
            operand(dk),
            operand(dv),
            count,
            threads};
}

sharpcore::AttentionAdjointArguments attention_adjoint_arguments(
    OperandTuple q, OperandTuple k, OperandTuple v, OperandTuple out, Address lse,
    std::array<std::int64_t, 3> lse_strides, Address mask, std::array<std::int64_t, 4> mask_strides, int mask_dtype,
    double scale, int dtype, std::array<std::int64_t, 6> sizes, OperandTuple cotangent, OperandTuple grad_q,
    OperandTuple grad_k, OperandTuple grad_v, std::int64_t count, int threads) {
    return {attention_primal(q, k, v, out, lse, lse_strides, mask, mask_strides, mask_dtype, scale, dtype, sizes),
            operand(cotangent),
            operand(grad_q),
            operand(grad_k),
            operand(grad_v),
            count,
            threads};
}

sharpcore::PhiloxArguments philox_arguments(Address out, Address sample_ids, int dtype, int kind, std::uint64_t seed,
                                            std::int64_t first, std::int64_t count, std::int64_t samples,
                                            std::int64_t dimension, int threads) {
    return {pointer(out),
            static_cast<const std::int64_t*>(pointer(sample_ids)),
            static_cast<sharpcore::Dtype>(dtype),
            static_cast<sharpcore::ProbeKind>(kind),
            seed,
            first,
            count,
            samples,
            dimension,
            threads};
}

sharpcore::GrowBasisArguments grow_basis_arguments(Address basis, Address sizes, Address block, Strides block_strides,
                                                   Address floor, Address coefficients, Address triangle,
                                                   Address dropped, Address ranks, int dtype, std::int64_t count,
                                                   std::int64_t batch, std::int64_t rows, std::int64_t size,
                                                   std::int64_t limit, int threads) {
    const auto doubles = [](Address address) { return static_cast<double*>(pointer(address)); };
    return {doubles(basis),
            static_cast<const std::int64_t*>(pointer(sizes)),
            pointer(block),
            block_strides.first,
            block_strides.second,
            doubles(floor),
            doubles(coefficients),
            doubles(triangle),
            doubles(dropped),
            static_cast<std::int64_t*>(pointer(ranks)),
            static_cast<sharpcore::Dtype>(dtype),
            count,
            batch,
            rows,
            size,
            limit,
            threads};
}

// Defines a function of the module that packs its arguments with `pack` and runs `kernel` without the GIL.
template <class Arguments, class... Parameters, class... Names>
void define_kernel(py::module_& module, const char* name, void (*kernel)(const Arguments&),
                   Arguments (*pack)(Parameters...), Names... names) {
    module.def(
        name,
        [kernel, pack](Parameters... parameters) {
            const Arguments arguments = pack(parameters...);
            const py::gil_scoped_release release;
            kernel(arguments);
        },
        py::kw_only(), py::arg(names)...);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ kernels of sharpcore; called through sharpcore.backends, which checks what is passed.";
    module.def(
        "isa", [] { return sharpcore::isa_name(sharpcore::active_isa()); },
        "Instruction set of the kernels: portable, avx2, avx512 or avx512bf16.");
    module.def(
        "sanitizers", [] { return SHARPCORE_SANITIZE; }, "Sanitizers of this build, separated by commas, or nothing.");
    module.def(
        "cpu_features",
        [] {
            py::dict features;
            for (const auto& [name, present] : sharpcore::cpu_features()) features[name.c_str()] = present;
            return features;
        },
        "Instruction-set extensions and whether this CPU has them.");

    const auto define_group_norm = [&](const char* name, void (*kernel)(const sharpcore::GroupNormSiluArguments&)) {
        define_kernel(module, name, kernel, group_norm_arguments, "out", "vectors", "x", "mean", "rstd", "weight",
                      "bias", "dtype", "count", "batch", "channels", "positions", "groups", "out_strides",
                      "vector_strides", "x_stride", "weight_stride", "bias_stride", "channels_last", "silu", "threads");
    };
    define_group_norm("group_norm_silu_tangent", [](const sharpcore::GroupNormSiluArguments& arguments) {
        SHARPCORE_CALL_KERNEL(group_norm_silu_tangent, arguments);
    });
    define_group_norm("group_norm_silu_adjoint", [](const sharpcore::GroupNormSiluArguments& arguments) {
        SHARPCORE_CALL_KERNEL(group_norm_silu_adjoint, arguments);
    });
    define_kernel(module, "group_norm_silu_forward",
                  static_cast<void (*)(const sharpcore::GroupNormSiluForwardArguments&)>(
                      [](const sharpcore::GroupNormSiluForwardArguments& arguments) {
                          SHARPCORE_CALL_KERNEL(group_norm_silu_forward, arguments);
                      }),
                  group_norm_forward_arguments, "out", "mean", "rstd", "x", "weight", "bias", "dtype", "eps", "batch",
                  "channels", "positions", "groups", "out_stride", "x_stride", "weight_stride", "bias_stride",
                  "channels_last", "silu", "threads");
    define_kernel(module, "attention_forward",
                  static_cast<void (*)(const sharpcore::AttentionForwardArguments&)>(
                      [](const sharpcore::AttentionForwardArguments& arguments) {
                          SHARPCORE_CALL_KERNEL(attention_forward, arguments);
                      }),
                  attention_forward_arguments, "q", "k", "v", "out", "lse", "lse_strides", "mask", "mask_strides",
                  "mask_dtype", "scale", "dtype", "sizes", "threads");
    define_kernel(module, "attention_tangent",
                  static_cast<void (*)(const sharpcore::AttentionTangentArguments&)>(
                      [](const sharpcore::AttentionTangentArguments& arguments) {
                          SHARPCORE_CALL_KERNEL(attention_tangent, arguments);
                      }),
                  attention_tangent_arguments, "q", "k", "v", "out", "lse", "lse_strides", "mask", "mask_strides",
                  "mask_dtype", "scale", "dtype", "sizes", "result", "dq", "dk", "dv", "count", "threads");
    define_kernel(module, "attention_adjoint",
                  static_cast<void (*)(const sharpcore::AttentionAdjointArguments&)>(
                      [](const sharpcore::AttentionAdjointArguments& arguments) {
                          SHARPCORE_CALL_KERNEL(attention_adjoint, arguments);
                      }),
                  attention_adjoint_arguments, "q", "k", "v", "out", "lse", "lse_strides", "mask", "mask_strides",
                  "mask_dtype", "scale", "dtype", "sizes", "cotangent", "grad_q", "grad_k", "grad_v", "count",
                  "threads");

    const auto define_layer_norm = [&](const char* name, void (*kernel)(const sharpcore::LayerNormArguments&)) {
        define_kernel(module, name, kernel, layer_norm_arguments, "out", "vectors", "x", "mean", "rstd", "weight",
                      "dtype", "columns", "count", "batch", "rows", "size", "out_stride", "vector_strides",
                      "weight_stride", "threads");
    };
    define_layer_norm("layer_norm_tangent", [](const sharpcore::LayerNormArguments& arguments) {
        SHARPCORE_CALL_KERNEL(layer_norm_tangent, arguments);
    });
    define_layer_norm("layer_norm_adjoint", [](const sharpcore::LayerNormArguments& arguments) {
        SHARPCORE_CALL_KERNEL(layer_norm_adjoint, arguments);
    });
    define_kernel(
        module, "geglu_forward",
        static_cast<void (*)(const sharpcore::GegluForwardArguments&)>(
            [](const sharpcore::GegluForwardArguments& arguments) { SHARPCORE_CALL_KERNEL(geglu_forward, arguments); }),
        geglu_forward_arguments, "value", "factors", "projection", "dtype", "tanh", "rows", "columns", "threads");
    const auto define_geglu = [&](const char* name, void (*kernel)(const sharpcore::GegluArguments&)) {
        define_kernel(module, name, kernel, geglu_arguments, "out", "vectors", "factors", "dtype", "count", "rows",
                      "columns", "out_stride", "vector_stride", "threads");
    };
    define_geglu("geglu_tangent",
                 [](const sharpcore::GegluArguments& arguments) { SHARPCORE_CALL_KERNEL(geglu_tangent, arguments); });
    define_geglu("geglu_adjoint",
                 [](const sharpcore::GegluArguments& arguments) { SHARPCORE_CALL_KERNEL(geglu_adjoint, arguments); });
    define_kernel(
        module, "residual_add",
        static_cast<void (*)(const sharpcore::ResidualAddArguments&)>(
            [](const sharpcore::ResidualAddArguments& arguments) { SHARPCORE_CALL_KERNEL(residual_add, arguments); }),
        residual_add_arguments, "out", "out_strides", "first", "second", "scale", "dtype", "count", "batch", "rows",
        "columns", "threads");
    const auto define_upsample = [&](const char* name, void (*kernel)(const sharpcore::UpsampleNearestArguments&)) {
        define_kernel(module, name, kernel, upsample_arguments, "out", "vectors", "dtype", "channels_last", "sizes",
                      "factors", "out_strides", "vector_strides", "threads");
    };
    define_upsample("upsample_nearest_tangent", [](const sharpcore::UpsampleNearestArguments& arguments) {
        SHARPCORE_CALL_KERNEL(upsample_nearest_tangent, arguments);
    });
    define_upsample("upsample_nearest_adjoint", [](const sharpcore::UpsampleNearestArguments& arguments) {
        SHARPCORE_CALL_KERNEL(upsample_nearest_adjoint, arguments);
    });
    define_kernel(
        module, "philox_probes",
        static_cast<void (*)(const sharpcore::PhiloxArguments&)>(
            [](const sharpcore::PhiloxArguments& arguments) { SHARPCORE_CALL_KERNEL(philox_probes, arguments); }),
        philox_arguments, "out", "sample_ids", "dtype", "kind", "seed", "first", "count", "samples", "dimension",
        "threads");
    define_kernel(
        module, "grow_basis",
        static_cast<void (*)(const sharpcore::GrowBasisArguments&)>(
            [](const sharpcore::GrowBasisArguments& arguments) { SHARPCORE_CALL_KERNEL(grow_basis, arguments); }),
        grow_basis_arguments, "basis", "sizes", "block", "block_strides", "floor", "coefficients", "triangle",
        "dropped", "ranks", "dtype", "count", "batch", "rows", "size", "limit", "threads");
}
