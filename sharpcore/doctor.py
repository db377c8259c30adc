"""Examines an installation: versions, CPU, backends, the shipped model, and a self-test."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sharpcore import __version__, backends
from sharpcore.testing.tolerance import relative_error

_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "diffusers",
    "transformers",
    "peft",
    "triton",
    "pandas",
    "pyarrow",
    "matplotlib",
)
# Measured 2e-16 to 6e-16; a wrong rule is off by a per cent or more.
_TOLERANCE = 1e-12

Report = dict[str, Any]


def examine(model: Path) -> Report:
    """Everything that `sharpcore doctor` prints, as an object that JSON can hold.

    `versions` maps packages to versions or "not installed"; `cpu` and `devices` describe the machine;
    `backends` has one entry per backend and kernel; `model` says whether the pipeline in the folder `model`
    is complete; `self_test` is a list of {name, passed, detail}.
    """
    return {
        "versions": {"sharpcore": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "devices": ["cpu", *(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))],
        "backends": [asdict(row) for row in backends.support_table()],
        "model": _model(model),
        "self_test": [_run(name, test) for name, test in _TESTS.items()],
    }


def render(report: Report) -> str:
    """The report as text."""
    lines = ["versions"]
    lines += [f"  {name:<14}{version}" for name, version in report["versions"].items()]
    cpu = report["cpu"]
    present = [name for name, there in cpu["features"].items() if there]
    lines += ["", "cpu", f"  {'architecture':<14}{cpu['architecture']}"]
    lines += [f"  {'features':<14}{' '.join(present) or 'unknown (no compiled kernels)'}"]
    lines += [
        f"  {'kernels use':<14}{cpu['isa']}",
        f"  {'threads':<14}{cpu['threads']} of {cpu['cores']} cores",
    ]
    lines += ["", "devices", *(f"  {name}" for name in report["devices"]), "", "backends"]
    for row in report["backends"]:
        state = (
            f"{' '.join(row['dtypes'])} on {' '.join(row['devices'])}" if row["available"] else row["reason"]
        )
        lines.append(
            f"  {row['backend']:<11}{row['kernel']:<30}{'yes' if row['available'] else 'no':<5}{state}"
        )
    lines += ["", "model", f"  {report['model']['detail']}", "", "self-test"]
    for test in report["self_test"]:
        lines.append(f"  {'passed' if test['passed'] else 'FAILED':<8}{test['name']}: {test['detail']}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> Report:
    native = backends.cpu.extension()
    return {
        "architecture": platform.machine(),
        "features": native.cpu_features() if native else {},
        "isa": native.isa() if native else "none: " + backends.cpu.why_missing(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _model(folder: Path) -> Report:
    parts = ("model_index.json", "unet", "text_encoder", "tokenizer", "scheduler")
    missing = [name for name in parts if not (folder / name).exists()]
    detail = f"{folder}: incomplete, without {', '.join(missing)}" if missing else f"{folder}: complete"
    return {"folder": str(folder), "complete": not missing, "detail": detail}


def _run(name: str, test: Callable[[], float]) -> Report:
    try:
        error = test()
    # Whatever goes wrong in a test is its result, and must not hide the rest of the report.
    except Exception as failure:
        return {"name": name, "passed": False, "detail": f"{type(failure).__name__}: {failure}"}
    detail = f"relative error {error:.1e}, at most {_TOLERANCE:.0e} is allowed"
    return {"name": name, "passed": error <= _TOLERANCE, "detail": detail}


def _network(fused: bool) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A tiny network (attention as one operation or spelled out), a point [2, 4, 5, 3], 3 tangents."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    into, out, scale, shift = normal(8, 4, 3, 3) / 6, normal(4, 8, 3, 3) / 8, normal(8), normal(8)
    projections = [normal(8, 8) / 3 for _ in range(3)]

    def network(x: Tensor) -> Tensor:
        hidden = functional.silu(
            functional.group_norm(functional.conv2d(x, into, padding=1), 2, scale, shift)
        )
        tokens = hidden.flatten(2).transpose(1, 2)
        query, key, value = (functional.linear(tokens, weight) for weight in projections)
        if fused:
            attention = functional.scaled_dot_product_attention(query, key, value)
        else:
            attention = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, dim=-1) @ value
        return functional.conv2d(hidden + attention.transpose(1, 2).reshape(hidden.shape), out, padding=1)

    return network, normal(2, 4, 5, 3), normal(3, 2, 4, 5, 3)


def _products_agree() -> float:
    from sharpcore.linearization import linearize

    network, x, tangents = _network(fused=True)
    spelled_out, _, _ = _network(fused=False)
    expected = torch.stack([torch.func.jvp(spelled_out, (x,), (tangent,))[1] for tangent in tangents])
    return relative_error(linearize(network, x).jvp(tangents), expected)


def _transpose_agrees() -> float:
    from sharpcore.linearization import linearize

    network, x, tangents = _network(fused=True)
    pushed = linearize(network, x)
    cotangents = tangents.flip(0)
    left = (cotangents * pushed.jvp(tangents)).sum()
    return relative_error((pushed.vjp(cotangents) * tangents).sum(), left)


def _kernels_agree() -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, 6, 5, 3, generator=generator, dtype=torch.float64)
    tangents = torch.randn(3, 2, 6, 5, 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn((2, 6), generator=generator, dtype=torch.float64)
    grouped = x.reshape(2, 2, -1)
    mean, rstd = grouped.mean(-1), (grouped.var(-1, unbiased=False) + 1e-5).rsqrt()
    chosen = backends.get_backend("auto", device="cpu", dtype=torch.float64)
    reference = backends.get_backend("reference", device="cpu", dtype=torch.float64)
    arguments = (tangents, x, mean, rstd, weight, bias, 2, True)
    return max(
        relative_error(getattr(chosen, kernel)(*arguments), getattr(reference, kernel)(*arguments))
        for kernel in ("group_norm_silu_tangent", "group_norm_silu_adjoint")
    )


_TESTS: dict[str, Callable[[], float]] = {
    "linearize against torch.func.jvp": _products_agree,
    "transposed product": _transpose_agrees,
    "kernels of the chosen backend against the reference": _kernels_agree,
}
