// The Python module sharpcore._cuda: kernels on addresses of the device, started on a stream of the caller's. The
// Python side has checked shapes, types and layouts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cuda/grow_basis.h"
#include "cuda/lanczos_step.h"
#include "cuda/launch.h"
#include "cuda/philox.h"
#include "cuda/symmetric_eigen.h"

namespace py = pybind11;

namespace {

using sharpcore::Dtype;
using Address = std::uintptr_t;
using Index = std::int64_t;
using Strides = std::pair<Index, Index>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

template <class T>
T* of(Address address) {
    return static_cast<T*>(pointer(address));
}

sharpcore::PhiloxArguments philox_arguments(Address out, Address sample_ids, int dtype, int kind, std::uint64_t seed,
                                            Index first, Index count, Index samples, Index dimension) {
    return {pointer(out),
            of<const std::int64_t>(sample_ids),
            static_cast<Dtype>(dtype),
            static_cast<sharpcore::ProbeKind>(kind),
            seed,
            first,
            count,
            samples,
            dimension,
            1};
}

sharpcore::GrowBasisArguments grow_basis_arguments(Address basis, Address sizes, Address block, Strides block_strides,
                                                   Address floor, Address coefficients, Address triangle,
                                                   Address dropped, Address ranks, int dtype, Index count, Index batch,
                                                   Index rows, Index size, Index limit) {
    return {of<double>(basis),
            of<const std::int64_t>(sizes),
            pointer(block),
            block_strides.first,
            block_strides.second,
            of<const double>(floor),
            of<double>(coefficients),
            of<double>(triangle),
            of<double>(dropped),
            of<std::int64_t>(ranks),
            static_cast<Dtype>(dtype),
            count,
            batch,
            rows,
            size,
            limit,
            1};
}

sharpcore::cuda::LanczosStepArguments lanczos_step_arguments(Address basis, Address projected, Address lost,
                                                             Address norm, Address sizes, Address processed,
                                                             Address multiplied, Address deflated, Address breakdowns,
                                                             Address frozen, Address faults, Address products,
                                                             Strides product_strides, Address out, int product_dtype,
                                                             int out_dtype, Index count, Index batch, Index rows,
                                                             Index size, Index limit, double share, double tolerance) {
    return {of<double>(basis),
            of<double>(projected),
            of<double>(lost),
            of<double>(norm),
            of<std::int64_t>(sizes),
            of<std::int64_t>(processed),
            of<std::int64_t>(multiplied),
            of<std::int64_t>(deflated),
            of<std::int64_t>(breakdowns),
            of<const bool>(frozen),
            of<std::int64_t>(faults),
            pointer(products),
            product_strides.first,
            product_strides.second,
            pointer(out),
            static_cast<Dtype>(product_dtype),
            static_cast<Dtype>(out_dtype),
            count,
            batch,
            rows,
            size,
            limit,
            share,
            tolerance};
}

sharpcore::cuda::SymmetricEigenArguments symmetric_eigen_arguments(Address matrices, Address sizes, Address values,
                                                                   Address vectors, Index batch, Index rows) {
    return {of<const double>(matrices),
            of<const std::int64_t>(sizes),
            of<double>(values),
            of<double>(vectors),
            batch,
            rows};
}

// Defines `name`, which starts a kernel, and `name`_workspace, which takes the same arguments and says how many doubles
// of memory the kernel needs beside them.
template <class Arguments, class... Parameters, class... Names>
void define_kernel(py::module_& module, const char* name, Index (*workspace)(const Arguments&),
                   void (*kernel)(const Arguments&, double*, void*), Arguments (*pack)(Parameters...), Names... names) {
    module.def((std::string(name) + "_workspace").c_str(),
               [workspace, pack](Parameters... parameters) { return workspace(pack(parameters...)); }, py::kw_only(),
               py::arg(names)...);
    module.def(
        name,
        [kernel, pack](Address memory, int device, Address stream, Parameters... parameters) {
            const Arguments arguments = pack(parameters...);
            const py::gil_scoped_release release;
            const sharpcore::cuda::OnDevice on(device);
            kernel(arguments, of<double>(memory), pointer(stream));
        },
        py::kw_only(), py::arg("workspace"), py::arg("device"), py::arg("stream"), py::arg(names)...);
}

void residuals(int device, Address stream, Address projected, Address lost, Address processed, Address sizes,
               Address values, Address weights, Address coupling, Address noise, Index batch, Index rows, Index count) {
    const py::gil_scoped_release release;
    const sharpcore::cuda::OnDevice on(device);
    sharpcore::cuda::ritz_residuals(
        {of<const double>(projected), of<const double>(lost), of<const std::int64_t>(processed),
         of<const std::int64_t>(sizes), of<const double>(values), of<const double>(weights), of<double>(coupling),
         of<double>(noise), batch, rows, count},
        pointer(stream));
}

}  // namespace

#ifndef SHARPCORE_CUDA_MODULE
#define SHARPCORE_CUDA_MODULE _cuda
#endif

PYBIND11_MODULE(SHARPCORE_CUDA_MODULE, module) {
    module.doc() = "CUDA kernels of sharpcore; called through sharpcore.backends.cuda, which checks what is passed.";
    // What the tensors' device must be called.
    module.attr("device_type") = SHARPCORE_CUDA_DEVICE;
    module.attr("most_columns") = sharpcore::cuda::kMostColumns;
    module.attr("most_eigen_rows") = sharpcore::cuda::kMostEigenRows;
    define_kernel(module, "philox_probes", sharpcore::cuda::philox_workspace, sharpcore::cuda::philox_probes,
                  philox_arguments, "out", "sample_ids", "dtype", "kind", "seed", "first", "count", "samples",
                  "dimension");
    define_kernel(module, "grow_basis", sharpcore::cuda::grow_basis_workspace, sharpcore::cuda::grow_basis,
                  grow_basis_arguments, "basis", "sizes", "block", "block_strides", "floor", "coefficients", "triangle",
                  "dropped", "ranks", "dtype", "count", "batch", "rows", "size", "limit");
    define_kernel(module, "lanczos_step", sharpcore::cuda::lanczos_step_workspace, sharpcore::cuda::lanczos_step,
                  lanczos_step_arguments, "basis", "projected", "lost", "norm", "sizes", "processed", "multiplied",
                  "deflated", "breakdowns", "frozen", "faults", "products", "product_strides", "out", "product_dtype",
                  "out_dtype", "count", "batch", "rows", "size", "limit", "share", "tolerance");
    define_kernel(module, "symmetric_eigen", sharpcore::cuda::symmetric_eigen_workspace,
                  sharpcore::cuda::symmetric_eigen, symmetric_eigen_arguments, "matrices", "sizes", "values", "vectors",
                  "batch", "rows");
    module.def("ritz_residuals", residuals, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("projected"),
               py::arg("lost"), py::arg("processed"), py::arg("sizes"), py::arg("values"), py::arg("weights"),
               py::arg("coupling"), py::arg("noise"), py::arg("batch"), py::arg("rows"), py::arg("count"));
}
