"""What gpu_acceptance.py checks: the kernels, products, rankings and solvers of the cuda backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import configs
import torch
from gpu_report import ROOT, Acceptance
from scoring_pipelines import tiny
from torch import Tensor

import sharpcore
from sharpcore.backends import get_backend, reference
from sharpcore.krylov import block_lanczos
from sharpcore.testing.tolerance import relative_error

# A kernel's error may be this many times that of plain PyTorch in the same dtype, above a floor.
FACTOR, FLOORS = 2.0, {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
Call = tuple[str, str, tuple[Any, ...], dict[str, Any]]  # kernel, case, arguments, keywords


def kernels(state: Acceptance) -> None:
    """Every Triton kernel in three dtypes, at the sizes that count and odd ones."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = get_backend("cuda", device=state.device, dtype=dtype)
        for kernel, case, arguments, keywords in _calls(state, dtype):
            exact = _first(reference.KERNELS[kernel](*_double(arguments), **_double(keywords)))
            plain = relative_error(_first(reference.KERNELS[kernel](*arguments, **keywords)), exact)
            error = relative_error(_first(getattr(ours, kernel)(*arguments, **keywords)), exact)
            bound = max(FACTOR * plain, FLOORS[dtype])
            name = f"{kernel} {case} {str(dtype).removeprefix('torch.')}"
            state.check(name, error <= bound, f"{error:.1e}, plain PyTorch {plain:.1e}")


def _calls(state: Acceptance, dtype: torch.dtype) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(state.device, dtype)

    lengths = (
        [(77, 77, 40, 3)] if state.small else [(1025, 77, 40, 3), (4096, 4096, 40, 1), (1024, 1024, 80, 8)]
    )
    lengths += (
        [] if state.small else [(256, 256, 160, 3), (144, 1025, 64, 2), (33, 7, 59, 1), (64, 64, 128, 2)]
    )
    for rows, keys, width, count in lengths:
        q, k, v = (normal(1, length, 2, width).transpose(1, 2) for length in (rows, keys, keys))
        settings = {"mask": None, "scale": width**-0.5}
        case = f"{rows}x{keys} d={width} K={count}"
        yield "attention_forward", case, (q, k, v), settings
        forward = get_backend("reference", device=state.device, dtype=dtype).attention_forward
        o, lse = forward(q, k, v, **settings)
        dq, dk, dv = (normal(count, *operand.shape) for operand in (q, k, v))
        yield "attention_tangent", case, (q, k, v, o, lse, dq, dk, dv), settings
        yield "attention_tangent", f"{case} cross", (q, k, v, o, lse, dq, None, None), settings
        yield (
            "attention_adjoint",
            case,
            (q, k, v, o, lse, normal(count, *o.shape)),
            {**settings, "needed": (True,) * 3},
        )
    for channels, side, last in (
        [(32, 5, False)] if state.small else [(320, 64, False), (320, 64, True), (1280, 8, True)]
    ):
        x = normal(2, channels, side, side)
        order = torch.channels_last if last else torch.contiguous_format
        x = x.to(memory_format=order)
        weight, bias = normal(channels), normal(channels)
        _, mean, rstd = reference.KERNELS["group_norm_silu_forward"](x, weight, bias, 32, 1e-5, True)
        given = torch.stack([normal(*x.shape).to(memory_format=order) for _ in range(3)])
        case = f"{channels}x{side}x{side} {'last' if last else 'first'}"
        yield "group_norm_silu_forward", case, (x, weight, bias, 32, 1e-5, True), {}
        for kernel in ("group_norm_silu_tangent", "group_norm_silu_adjoint"):
            yield kernel, case, (given, x, mean, rstd, weight, bias, 32, True), {}
        yield "upsample_nearest_tangent", case, (given, (2, 2)), {}
        yield "upsample_nearest_adjoint", case, (given.repeat(1, 1, 1, 2, 2), (2, 2)), {}
    tokens, width = (7, 33) if state.small else (4096, 320)
    x, weight = normal(2, tokens, width), normal(width)
    exact = x.float()
    mean = exact.mean(-1, keepdim=True)
    rstd = (exact.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    for kernel in ("layer_norm_tangent", "layer_norm_adjoint"):
        yield kernel, f"{tokens}x{width}", (normal(3, *x.shape), x, mean, rstd, weight, 1), {}
    projection = normal(2, tokens, 2 * width)
    _, factors = reference.KERNELS["geglu_forward"](projection, "none")
    yield "geglu_forward", f"{tokens}x{width}", (projection, "none"), {}
    yield "geglu_tangent", f"{tokens}x{width}", (normal(3, *projection.shape), factors), {}
    yield "geglu_adjoint", f"{tokens}x{width}", (normal(3, *x.shape), factors), {}
    yield "residual_add", f"{tokens}x{width}", (normal(3, *x.shape), normal(3, *x.shape), 0.5), {}


def _double(values: Any) -> Any:
    def one(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(values, dict):
        return {key: one(value) for key, value in values.items()}
    return tuple(one(value) for value in values)


def _first(result: Any) -> Tensor:
    """All results of a kernel as one vector."""
    parts = (result,) if isinstance(result, Tensor) else tuple(part for part in result if part is not None)
    return torch.cat([part.double().flatten() for part in parts])


def products(state: Acceptance) -> None:
    """A whole network in every precision, through graphs, at several points, on several streams."""
    pair = on(configs.micro() if state.small else configs.mid(), state.device)
    exact = pair.to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn((3, *pair.x.shape), generator=generator).to(state.device)
    points = [pair.x, pair.x + 0.1, pair.x - 0.2, pair.x + 0.3]
    # Measured on CPUs: 1e-6 in float32, 1e-2 in bfloat16; other orders of summation have room.
    bounds = {"float32": 2e-5, "tf32": 2e-2, "bfloat16": 4e-2, "float16": 8e-3}
    for precision, bound in bounds.items():
        if state.dry and precision == "tf32":
            continue
        backend = "cuda" if state.dry else "auto"
        lin = sharpcore.linearize(pair.f, pair.x, backend=backend, precision=precision)
        worst = 0.0
        for number, point in enumerate(points):
            truth = sharpcore.linearize(exact.f, point.double(), backend="reference")
            if number:
                lin.relinearize(point)
            for _ in range(3):  # as it is, recorded, launched again
                errors = [
                    relative_error(product(vectors), known(vectors.double()))
                    for product, known in ((lin.jvp, truth.jvp), (lin.vjp, truth.vjp))
                    for vectors in (given, given[:1])
                ]
                worst = max(worst, *errors)
        state.check(
            f"products in {precision} at four points", worst <= bound, f"{worst:.1e} (at most {bound:g})"
        )
        state.check(
            f"{precision}: recorded as CUDA graphs",
            state.dry or not lin._workspace.refused,
            lin._workspace.refused or "yes",
        )
    if not state.dry:
        lin = sharpcore.linearize(pair.f, pair.x)
        results = on_streams(lambda: lin.jvp(given), 4)
        state.check(
            "the same bits on four streams", all(torch.equal(r, results[0]) for r in results), "compared"
        )


def on_streams(work: Callable[[], Tensor], count: int) -> list[Tensor]:
    """What `work` gives on streams of their own, launched without waiting."""
    results = []
    for _ in range(count):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(work())
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return results


def on(pair: configs.Pair, device: str, dtype: torch.dtype | None = None) -> configs.Pair:
    """A network and its inputs on a device."""
    unet = pair.unet.to(device, dtype) if dtype else pair.unet.to(device)

    def moved(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        return tensor.to(device, dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    added = {key: moved(value) for key, value in pair.added.items()}
    return configs.Pair(unet, moved(pair.x), moved(pair.timestep), moved(pair.prompt), added)


def ranking(state: Acceptance) -> None:
    """The order of the shipped model's prompts in every precision against that in float64."""
    from scipy.stats import spearmanr

    folder = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
    prompts = [
        line
        for name in ("mem", "nonmem")
        for line in (folder / f"prompts_{name}.txt").read_text().splitlines()
    ]
    prompts, seeds = (prompts[:3], [42]) if state.small else (prompts, [42, 43, 44, 45])
    exact = sharpcore.SharpnessScorer(tiny().to(torch.float64), backend="reference")(prompts, seeds=seeds)
    for precision in ("float32", "bfloat16", "float16"):
        pipe = tiny().to(state.device)
        backend = "cuda" if state.dry else "auto"
        table = sharpcore.SharpnessScorer(pipe, backend=backend, precision=precision)(prompts, seeds=seeds)
        for metric in ("score_difference", "hessian_score_difference"):
            ours, truth = ([row[metric] for row in rows] for rows in (table, exact))
            rank = float(spearmanr(ours, truth).statistic)
            state.check(f"ranking by {metric} in {precision}", rank >= 0.999, f"Spearman {rank:.5f}")


def solvers(state: Acceptance) -> None:
    """Ten pairs at both ends of matrices with known spectra, on the device."""
    d, samples = (64, 2) if state.small else (1024, 8)
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(samples, d, d, generator=generator, dtype=torch.float64))
    values = torch.linspace(-1, 0.2, d, dtype=torch.float64).expand(samples, d).clone()
    values[:, 0] -= 10
    matrix = ((q * values[:, None, :]) @ q.mT).to(state.device)
    found = block_lanczos(matrix, 5, "both", block=4)
    wanted = torch.cat([values[:, :5], values[:, -5:]], 1).to(state.device)
    error = float((found.values - wanted).abs().max())
    state.check("block Lanczos: ten eigenvalues of 1024", error <= 1e-9, f"{error:.1e}")
    basis = found.vectors.reshape(samples, 10, d)
    off = float((basis @ basis.mT - torch.eye(10, dtype=torch.float64, device=basis.device)).abs().max())
    state.check("block Lanczos: orthonormal vectors", off <= 1e-10, f"{off:.1e}")
    cpu, gpu = (
        sharpcore.krylov.probes("normal", 7, samples=[0, 5], first=3, count=2, dimension=1000, device=device)
        for device in ("cpu", state.device)
    )
    state.check("probes are those of the CPU, bit for bit", torch.equal(cpu, gpu.cpu()), "compared")


def sanitizer(state: Acceptance) -> None:
    """The small cases under compute-sanitizer, where it is there."""
    tool = shutil.which("compute-sanitizer")
    if state.dry or tool is None:
        print("  compute-sanitizer: not here")
        return
    script = str(ROOT / "benchmarks" / "gpu_acceptance.py")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script, "--small"]
    done = subprocess.run(
        [*command, "--only", "kernels against float64|Krylov"],
        cwd=ROOT,
        env={**os.environ, "SHARPCORE_AUTOTUNE": "0"},
        capture_output=True,
        text=True,
        timeout=max(10.0, state.left),
        check=False,
    )
    state.check("compute-sanitizer memcheck", done.returncode == 0, (done.stdout + done.stderr)[-300:])
