"""The cuda backend: Triton kernels for tangents, CUDA C++ for Krylov bases; one file per stem.

Each checks tensors and launches. Imported when first asked for, as importing Triton takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sharpcore.backends.cuda.layout import DTYPES, interpreted

__all__ = ["KERNELS", "dtypes", "interpreted", "why_missing"]

_TRITON: tuple[Callable[..., Any], ...] = ()
_NATIVE: Mapping[Callable[..., Any], tuple[torch.dtype, ...]] = {}

KERNELS: Mapping[str, Callable[..., Any]] = {kernel.__name__: kernel for kernel in (*_TRITON, *_NATIVE)}


def dtypes(kernel: str) -> tuple[torch.dtype, ...]:
    """What the kernel of this name computes in; none where there is none."""
    found = KERNELS.get(kernel)
    return () if found is None else _NATIVE.get(found, DTYPES)


def why_missing(kernel: str) -> str:
    """Why the kernel of this name cannot run although there is a GPU; empty where it can."""
    return ""
