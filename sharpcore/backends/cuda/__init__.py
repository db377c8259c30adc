"""The cuda backend: Triton kernels for tangents, CUDA C++ for Krylov bases; one file per stem.

Each checks tensors and launches. Imported when first asked for, as importing Triton takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sharpcore.backends.cuda import native
from sharpcore.backends.cuda.attention_tangent import (
    attention_adjoint,
    attention_forward,
    attention_tangent,
)
from sharpcore.backends.cuda.geglu_tangent import geglu_adjoint, geglu_forward, geglu_tangent
from sharpcore.backends.cuda.group_norm_silu_forward import group_norm_silu_forward
from sharpcore.backends.cuda.group_norm_silu_tangent import group_norm_silu_adjoint, group_norm_silu_tangent
from sharpcore.backends.cuda.grow_basis import grow_basis
from sharpcore.backends.cuda.lanczos_step import lanczos_step
from sharpcore.backends.cuda.layer_norm_tangent import layer_norm_adjoint, layer_norm_tangent
from sharpcore.backends.cuda.layout import DTYPES, interpreted
from sharpcore.backends.cuda.philox import philox_probes
from sharpcore.backends.cuda.residual_add import residual_add
from sharpcore.backends.cuda.symmetric_eigen import ritz_residuals, symmetric_eigen
from sharpcore.backends.cuda.upsample_nearest_tangent import (
    upsample_nearest_adjoint,
    upsample_nearest_tangent,
)

__all__ = ["KERNELS", "dtypes", "interpreted", "why_missing"]

_TRITON: tuple[Callable[..., Any], ...] = (
    attention_forward,
    attention_tangent,
    attention_adjoint,
    group_norm_silu_forward,
    group_norm_silu_tangent,
    group_norm_silu_adjoint,
    layer_norm_tangent,
    layer_norm_adjoint,
    geglu_tangent,
    geglu_adjoint,
    geglu_forward,
    residual_add,
    upsample_nearest_tangent,
    upsample_nearest_adjoint,
)
# With the dtypes of what they are given, or make.
_NATIVE: Mapping[Callable[..., Any], tuple[torch.dtype, ...]] = {
    grow_basis: (torch.float64, torch.float32),
    lanczos_step: (torch.float64, torch.float32),
    symmetric_eigen: (torch.float64,),
    ritz_residuals: (torch.float64,),
    philox_probes: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}

KERNELS: Mapping[str, Callable[..., Any]] = {kernel.__name__: kernel for kernel in (*_TRITON, *_NATIVE)}


def dtypes(kernel: str) -> tuple[torch.dtype, ...]:
    """What the kernel of this name computes in; none where there is none."""
    found = KERNELS.get(kernel)
    return () if found is None else _NATIVE.get(found, DTYPES)


def why_missing(kernel: str) -> str:
    """Why the kernel of this name cannot run although there is a GPU; empty where it can."""
    compiled = KERNELS.get(kernel) in _NATIVE
    return native.why_missing() if compiled and native.extension() is None else ""
