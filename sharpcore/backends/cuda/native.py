"""The compiled module of the cuda backend: imported when first asked for, or a sentence why it cannot be."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_extension: ModuleType | None = None
_import_error: str | None = None


def extension() -> ModuleType | None:
    """The compiled module ``sharpcore._cuda``, imported at the first call, or None where it cannot be.

    It can be on a machine without a GPU, where there are no tensors for it.
    """
    global _extension, _import_error
    if _extension is None and _import_error is None:
        try:
            _extension = importlib.import_module("sharpcore._cuda")
        except ImportError as error:
            _import_error = str(error)
    return _extension


def why_missing() -> str:
    """A sentence that says why :func:`extension` is None and how to get it."""
    return (
        "Krylov bases on a GPU need the compiled module sharpcore._cuda, which cannot be imported "
        f"({_import_error}); install nvcc (CUDA 12.8 or newer) and then sharpcore again, with "
        "SHARPCORE_CUDA=ON to see why a build fails"
    )


def usable(tensors: Sequence[Tensor]) -> ModuleType | None:
    """The compiled module where it takes these tensors: all on one GPU, nothing for autograd to record."""
    native, device = extension(), tensors[0].device
    if native is None or device.type != native.device_type:
        return None
    recording = torch.is_grad_enabled()
    if any(tensor.device != device or (recording and tensor.requires_grad) for tensor in tensors):
        return None
    return native


def launch(native: ModuleType, name: str, device: torch.device, **arguments: Any) -> None:
    """Start a kernel on the current stream of `device`, with memory for what it needs meanwhile."""
    size = getattr(native, f"{name}_workspace")(**arguments)
    workspace = torch.empty(size, dtype=torch.float64, device=device)
    getattr(native, name)(workspace=workspace.data_ptr(), **where(device), **arguments)


def where(device: torch.device) -> dict[str, int]:
    """The number of a device, and its current stream."""
    if device.type != "cuda":
        return {"device": 0, "stream": 0}
    stream = torch.cuda.current_stream(device)
    return {"device": stream.device_index, "stream": stream.cuda_stream}
