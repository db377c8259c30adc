"""Executors of the linear program's kernels: selection by name, and the table of what each supports."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from sharpcore.backends import cpu, reference
from sharpcore.errors import InvalidInput

NAMES = ("auto", "reference", "cpu", "cuda")
# The least compute capability that the Triton and CUDA kernels are built and tested for.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Backend:
    """One executor; every kernel is an attribute: ``backend.group_norm_silu_tangent(...)``.

    A kernel that the executor lacks, or has not for a dtype or device, is the
    reference's: a call always works. With ``tf32``, matrix products of float32 tensors on a GPU round their
    operands to TF32.
    """

    name: str
    kernels: Mapping[str, Callable[..., Any]]
    tf32: bool = False

    def __getattr__(self, kernel: str) -> Callable[..., Any]:
        try:
            return self.__dict__["kernels"][kernel]
        except KeyError:
            raise AttributeError(f"backend has no kernel {kernel!r}") from None


@dataclass(frozen=True)
class Support:
    """Whether a backend has its own kernel for a dtype and device; if not, the reason in words."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class SupportRow:
    """One line of :func:`support_table`."""

    backend: str
    kernel: str
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    available: bool
    reason: str


_REFERENCE = Backend("reference", reference.KERNELS)
_CPU = Backend("cpu", {**reference.KERNELS, **cpu.KERNELS})
_REFERENCE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_already_warned: set[str] = set()


def get_backend(name: str, *, device: torch.device | str, dtype: torch.dtype, tf32: bool = False) -> Backend:
    """The executor called ``name`` for tensors of ``dtype`` on ``device``.

    Args:
        name: "reference" (plain PyTorch), "cpu" (C++ kernels), "cuda" (Triton and CUDA C++ kernels), or
            "auto": cuda for tensors on a GPU that it supports; cpu where its extension is built, the device
            is the CPU and the dtype is one it computes in; else reference.
        device: where the tensors live.
        dtype: what the network computes in.
        tf32: whether matrix products of float32 tensors on a GPU may round their operands to TF32.

    Raises:
        InvalidInput: ``name`` is not one of the backends.

    Asking for a backend that cannot run here warns once per process and gives the reference.
    """
    if name not in NAMES:
        raise InvalidInput(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    device = torch.device(device)
    if name == "auto":
        if device.type == "cuda":
            name = "reference" if _why_no_cuda(device) else "cuda"
        else:
            usable = device.type == "cpu" and dtype in cpu.DTYPES and cpu.extension() is not None
            name = "cpu" if usable else "reference"
    elif name == "cpu" and cpu.extension() is None:
        _warn_once(cpu.why_missing())
        name = "reference"
    elif name == "cuda" and (reason := _why_no_cuda(device)):
        _warn_once(reason)
        name = "reference"
    if name == "cuda":
        return _cuda_backend(tf32)
    chosen = _CPU if name == "cpu" else _REFERENCE
    return replace(chosen, tf32=True) if tf32 else chosen


@functools.cache
def _cuda_backend(tf32: bool) -> Backend:
    own = dict(_cuda().KERNELS)
    if tf32:
        own.update(
            {name: functools.partial(own[name], tf32=True) for name in own if name.startswith("attention")}
        )
    return Backend("cuda", {**reference.KERNELS, **own}, tf32)


def _cuda() -> ModuleType:
    """The package of the cuda backend, which imports Triton."""
    return importlib.import_module("sharpcore.backends.cuda")


def _why_no_cuda(device: torch.device) -> str:
    """Why the cuda backend cannot work on this device, in a sentence; empty where it can."""
    try:
        cuda = _cuda()
    except ImportError as error:
        return f"the cuda backend needs Triton, which cannot be imported ({error}): pip install triton"
    if device.type != "cuda":
        if device.type == "cpu" and cuda.interpreted():
            return ""
        return f"the cuda backend works on tensors on a GPU, not on {device.type}"
    if not torch.cuda.is_available():
        return "the cuda backend needs a GPU, and PyTorch finds none"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"the cuda backend needs compute capability {_version(LEAST_CAPABILITY)} or more; "
            f"{torch.cuda.get_device_name(device)} has {_version(capability)}"
        )
    return ""


def supports(backend: str, kernel: str, *, device: torch.device | str, dtype: torch.dtype) -> Support:
    """Whether ``backend`` has its own ``kernel`` for ``dtype`` on ``device``; if not, the reason in words.

    Raises:
        InvalidInput: there is no such backend or kernel.
    """
    if backend not in NAMES[1:]:
        raise InvalidInput(f"backend: expected one of {', '.join(NAMES[1:])}, got {backend!r}")
    if kernel not in reference.KERNELS:
        raise InvalidInput(f"kernel: expected one of {', '.join(reference.KERNELS)}, got {kernel!r}")
    if backend == "reference":
        return (
            Support(True) if dtype.is_floating_point else Support(False, f"{dtype} is not a floating dtype")
        )
    device = torch.device(device)
    if backend == "cuda":
        reason = _why_no_cuda(device)
        if reason:
            return Support(False, reason)
        own, dtypes = _cuda().KERNELS, _cuda().dtypes(kernel)
    else:
        own, dtypes = cpu.KERNELS, cpu.DTYPES
    if kernel not in own:
        return Support(False, f"the {backend} backend has no {kernel}; the reference is used")
    if backend == "cuda" and (reason := _cuda().why_missing(kernel)):
        return Support(False, reason)
    if backend == "cpu" and cpu.extension() is None:
        return Support(False, cpu.why_missing())
    if backend == "cpu" and device.type != "cpu":
        return Support(False, f"the cpu backend works on CPU tensors, not on {device.type}")
    if dtype not in dtypes:
        return Support(
            False, f"the {backend} backend computes {kernel} in {_names(dtypes)}, not in {_short(dtype)}"
        )
    return Support(True)


def support_table() -> list[SupportRow]:
    """One row per backend and kernel: dtypes, devices, whether it can be used here, and if not, why.

    The devices of the cuda backend are the GPUs here that it supports, with their compute capability.
    """
    rows = [
        SupportRow("reference", kernel, tuple(map(_short, _REFERENCE_DTYPES)), ("any",), True, "")
        for kernel in reference.KERNELS
    ]
    for kernel in reference.KERNELS:
        own = kernel in cpu.KERNELS
        support = supports("cpu", kernel, device="cpu", dtype=cpu.DTYPES[0])
        dtypes = tuple(map(_short, cpu.DTYPES)) if own else ()
        rows.append(SupportRow("cpu", kernel, dtypes, ("cpu",) if own else (), support.ok, support.reason))
    return [*rows, *_cuda_rows()]


def _cuda_rows() -> list[SupportRow]:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    usable = [device for device in devices if not _why_no_cuda(device)]
    named = tuple(f"{device} ({_version(torch.cuda.get_device_capability(device))})" for device in usable)
    device = (*usable, *devices, torch.device("cuda"))[0]
    rows = []
    for kernel in reference.KERNELS:
        try:
            dtypes = _cuda().dtypes(kernel)
        except ImportError:
            dtypes = ()
        support = supports("cuda", kernel, device=device, dtype=dtypes[0] if dtypes else torch.float32)
        rows.append(SupportRow("cuda", kernel, tuple(map(_short, dtypes)), named, support.ok, support.reason))
    return rows


def _warn_once(message: str) -> None:
    if message not in _already_warned:
        _already_warned.add(message)
        warnings.warn(f"{message}; the reference backend is used instead", RuntimeWarning, stacklevel=3)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(map(_short, dtypes))
