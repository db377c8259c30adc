// The Python module sharpcore._C: kernels on raw pointers. The Python side has checked shapes, types and layouts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "sharpcore/cpu_features.h"
#include "sharpcore/group_norm_silu_tangent.h"
#include "sharpcore/isa.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Strides = std::pair<std::int64_t, std::int64_t>;

sharpcore::GroupNormSiluArguments group_norm_arguments(Address out, Address vectors, Address x, Address mean,
                                                       Address rstd, Address weight, Address bias, bool float64,
                                                       std::int64_t count, std::int64_t batch, std::int64_t channels,
                                                       std::int64_t positions, std::int64_t groups, Strides out_strides,
                                                       Strides vector_strides, std::int64_t x_stride,
                                                       bool channels_last, bool silu, int threads) {
    const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
    return {pointer(out),
            pointer(vectors),
            pointer(x),
            pointer(mean),
            pointer(rstd),
            pointer(weight),
            pointer(bias),
            float64,
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
            channels_last,
            silu,
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
        "Instruction set of the kernels: portable, avx2 or avx512.");
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
                      "bias", "float64", "count", "batch", "channels", "positions", "groups", "out_strides",
                      "vector_strides", "x_stride", "channels_last", "silu", "threads");
    };
    define_group_norm("group_norm_silu_tangent", [](const sharpcore::GroupNormSiluArguments& arguments) {
        SHARPCORE_CALL_KERNEL(group_norm_silu_tangent, arguments);
    });
    define_group_norm("group_norm_silu_adjoint", [](const sharpcore::GroupNormSiluArguments& arguments) {
        SHARPCORE_CALL_KERNEL(group_norm_silu_adjoint, arguments);
    });
}
