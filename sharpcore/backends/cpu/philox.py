"""Random probes on the cpu backend: checks arguments and hands memory to the C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import DTYPES, dtype_code
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.reference.philox import KINDS, check_probes


def philox_probes(
    kind: str,
    seed: int,
    sample_ids: Tensor,
    first: int,
    count: int,
    dimension: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference, the same bits."""
    native = extension()
    if native is None or dtype not in DTYPES or torch.device(device).type != "cpu":
        return reference.KERNELS["philox_probes"](
            kind, seed, sample_ids, first, count, dimension, dtype=dtype, device=device
        )
    check_probes(kind, seed, sample_ids, first, count, dimension, dtype)
    sample_ids = sample_ids.cpu().contiguous()
    samples = sample_ids.numel()
    out = torch.empty((count, samples, dimension), dtype=dtype, device="cpu")
    if out.numel():
        native.philox_probes(
            out=out.data_ptr(),
            sample_ids=sample_ids.data_ptr(),
            dtype=dtype_code(dtype),
            kind=KINDS.index(kind),
            seed=seed,
            first=first,
            count=count,
            samples=samples,
            dimension=dimension,
            threads=torch.get_num_threads(),
        )
    return out
