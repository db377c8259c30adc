"""What interpreted Triton kernels read and write: elements of tensors, counted at every access."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


@dataclass
class Traffic:
    """Elements of one tensor that were read, and written, each counted as often as it was."""

    size: int
    read: int = 0
    written: int = 0

    @property
    def reads(self) -> float:
        """How often each element was read, on average."""
        return self.read / self.size

    @property
    def writes(self) -> float:
        """How often each element was written, on average."""
        return self.written / self.size


@contextlib.contextmanager
def counted(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Traffic]]:
    """The traffic of contiguous tensors while kernels run in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    made = {name: Traffic(tensor.numel()) for name, tensor in tensors.items()}
    ranges = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for name, tensor in tensors.items()
    }
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(pointers: Any, mask: Any, kind: str) -> None:
        places = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        for name, (first, end) in ranges.items():
            hits = int(((places >= first) & (places < end)).sum())
            setattr(made[name], kind, getattr(made[name], kind) + hits)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count(pointers, mask, "read")
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count(pointers, mask, "written")
        return store(self, pointers, value, mask, *rest, **options)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield made
