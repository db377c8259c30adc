"""Random probes on the cuda backend: checks arguments and hands memory to the CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import DTYPES, dtype_code
from sharpcore.backends.cuda.native import extension, launch
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
    native, device = extension(), torch.device(device)
    if dtype == torch.float16:  # rare: rounded from what the kernel makes
        exact = philox_probes(
            kind, seed, sample_ids, first, count, dimension, dtype=torch.float64, device=device
        )
        return exact.to(dtype)
    if native is None or dtype not in DTYPES or device.type != native.device_type:
        return reference.KERNELS["philox_probes"](
            kind, seed, sample_ids, first, count, dimension, dtype=dtype, device=device
        )
    check_probes(kind, seed, sample_ids, first, count, dimension, dtype)
    samples = sample_ids.numel()
    out = torch.empty((count, samples, dimension), dtype=dtype, device=device)
    sample_ids = sample_ids.to(out.device).contiguous()
    if out.numel():
        launch(
            native,
            "philox_probes",
            out.device,
            out=out.data_ptr(),
            sample_ids=sample_ids.data_ptr(),
            dtype=dtype_code(dtype),
            kind=KINDS.index(kind),
            seed=seed,
            first=first,
            count=count,
            samples=samples,
            dimension=dimension,
        )
    return out
