"""A step of block Lanczos on the cuda backend: nothing waits for the device."""

from __future__ import annotations

from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import dtype_code
from sharpcore.backends.cuda.native import launch, usable
from sharpcore.backends.reference.lanczos_step import LanczosState, check_step


def lanczos_step(
    state: LanczosState,
    products: Tensor,
    *,
    share: float,
    tolerance: float,
    limit: int,
    out: Tensor,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; a [d] of the products that has gaps is copied."""
    native = usable((state.basis, products, out))
    if native is None:
        step = reference.KERNELS["lanczos_step"]
        return step(state, products, share=share, tolerance=tolerance, limit=limit, out=out)
    check_step(state, products, limit, out)
    samples, rows, dimension = state.basis.shape
    if dimension > 1 and products.stride(2) != 1:
        products = products.contiguous()
    launch(
        native,
        "lanczos_step",
        products.device,
        **{name: tensor.data_ptr() for name, tensor in state._asdict().items()},
        products=products.data_ptr(),
        product_strides=products.stride()[:2],
        out=out.data_ptr(),
        product_dtype=dtype_code(products.dtype),
        out_dtype=dtype_code(out.dtype),
        count=products.shape[0],
        batch=samples,
        rows=rows,
        size=dimension,
        limit=limit,
        share=share,
        tolerance=tolerance,
    )
    return out
