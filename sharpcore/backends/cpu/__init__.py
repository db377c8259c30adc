"""The cpu backend: C++ kernels, one file per stem that checks tensors and hands their addresses over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sharpcore.backends.cpu.attention_tangent import (
    attention_adjoint,
    attention_forward,
    attention_tangent,
)
from sharpcore.backends.cpu.geglu_tangent import geglu_adjoint, geglu_forward, geglu_tangent
from sharpcore.backends.cpu.group_norm_silu_forward import group_norm_silu_forward
from sharpcore.backends.cpu.group_norm_silu_tangent import group_norm_silu_adjoint, group_norm_silu_tangent
from sharpcore.backends.cpu.grow_basis import grow_basis
from sharpcore.backends.cpu.layer_norm_tangent import layer_norm_adjoint, layer_norm_tangent
from sharpcore.backends.cpu.layout import DTYPES
from sharpcore.backends.cpu.native import extension, why_missing
from sharpcore.backends.cpu.philox import philox_probes
from sharpcore.backends.cpu.residual_add import residual_add
from sharpcore.backends.cpu.upsample_nearest_tangent import (
    upsample_nearest_adjoint,
    upsample_nearest_tangent,
)

__all__ = ["DTYPES", "KERNELS", "extension", "why_missing"]

KERNELS: Mapping[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (
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
        grow_basis,
        upsample_nearest_tangent,
        upsample_nearest_adjoint,
        philox_probes,
    )
}
