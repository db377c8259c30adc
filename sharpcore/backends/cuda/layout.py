"""Which tensors the Triton kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before the import)."""
    return bool(triton.knobs.runtime.interpret)


def computable(tensors: Sequence[Tensor], statistics: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels take these: one supported dtype (statistics float32), all on one GPU (or on the
    CPU, for the interpreter), nothing for autograd to record."""
    first = tensors[0]
    if first.dtype not in DTYPES or first.device.type != ("cpu" if interpreted() else "cuda"):
        return False
    recording = torch.is_grad_enabled()
    for group, dtype in ((tensors, first.dtype), (statistics, torch.float32)):
        for tensor in group:
            if tensor.dtype != dtype or tensor.device != first.device or (recording and tensor.requires_grad):
                return False
    return True
