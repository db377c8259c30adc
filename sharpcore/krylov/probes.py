"""Random probes of a seed: numbers that do not depend on how the samples and probes are split into calls."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from sharpcore.backends import get_backend
from sharpcore.errors import InvalidInput

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def probes(
    kind: str,
    seed: int,
    *,
    samples: Sequence[int] | Tensor,
    first: int = 0,
    count: int,
    dimension: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Random vectors z with E[z z^T] = I for each of B samples, by counting instead of by a state.

    Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
    makes every number from (kind, seed, sample, probe, element) alone: the same bits for every batch, call,
    backend, device and number of threads. Three kinds have three streams, independent of each other; the
    reference backend's `philox_probes` says which bits become what.

    Args:
        kind: "rademacher" (1 or -1), "normal" (mean 0, variance 1), or "sphere" (uniform on the sphere of
            radius sqrt(d)).
        seed: 0 to 2^63 - 1.
        samples: the B samples' numbers, 0 to 2^63 - 1 each; equal ones get equal probes.
        first: number of the first probe.
        count: how many probes; first + count is at most 2^32.
        dimension: d, 1 to 2^31.
        device: where the probes are made.
        dtype: float64, or float32, bfloat16 or float16, to which the float64 numbers are rounded.

    Returns:
        [count, B, d] of `dtype` on `device`; probe first + i of sample samples[j] is [i, j].

    Raises:
        InvalidInput: an argument is none of these.
    """
    if dtype not in _DTYPES:
        raise InvalidInput(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(f"device: expected a device of PyTorch, got {device!r}") from error
    return get_backend("auto", device=device, dtype=dtype).philox_probes(
        kind,
        _integer("seed", seed),
        _sample_ids(samples),
        _integer("first", first),
        _integer("count", count),
        _integer("dimension", dimension),
        dtype=dtype,
        device=device,
    )


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidInput(f"{name}: expected an integer, got {value!r}") from None


def _sample_ids(samples: Sequence[int] | Tensor) -> Tensor:
    if isinstance(samples, Tensor):
        if samples.dim() != 1 or samples.dtype not in _INTEGERS:
            raise InvalidInput(f"samples: expected integers [B], got {samples.dtype} {list(samples.shape)}")
        samples = samples.tolist()
    try:
        numbers = [operator.index(sample) for sample in samples]
    except TypeError:
        raise InvalidInput(f"samples: expected a sequence of integers, got {samples!r}") from None
    wrong = [number for number in numbers if not 0 <= number < 2**63]
    if wrong:
        raise InvalidInput(f"samples: expected numbers from 0 to 2^63 - 1, got {wrong[0]}")
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
