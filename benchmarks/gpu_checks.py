"""What gpu_acceptance.py checks: the kernels, products, rankings and solvers of the cuda backend, and what it
does where memory runs out."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import configs
import torch
from gpu_report import ROOT, Acceptance
from scoring_pipelines import tiny
from torch import Tensor

import sharpcore
from sharpcore.backends import get_backend, reference
from sharpcore.krylov import block_lanczos
from sharpcore.testing.tolerance import relative_error

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# A kernel's error may be this many times that of plain PyTorch in the same dtype, above a floor.
FACTOR, FLOORS = 2.0, {"float32": 2e-6, "tf32": 2e-3, "bfloat16": 4e-3, "float16": 5e-4}
Call = tuple[str, str, tuple[Any, ...], dict[str, Any]]  # kernel, case, arguments, keywords


def build(state: Acceptance) -> None:
    """The compiled modules, for this card alone where one is there; in a dry run the CUDA sources for threads
    of the CPU."""
    environment = {**os.environ, "SHARPCORE_REQUIRE_EXTENSION": "1"}
    if not state.dry:
        major, minor = torch.cuda.get_device_capability()
        environment.update(SHARPCORE_CUDA="ON", SHARPCORE_CUDA_ARCHITECTURES=f"{major}{minor}")
    missing = not list((ROOT / "sharpcore").glob("_C*.so"))
    missing |= not state.dry and not list((ROOT / "sharpcore").glob("_cuda*.so"))
    if missing:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the build failed: {done.stdout[-300:]} {done.stderr[-300:]}")
    if state.dry:
        import emulated_cuda

        emulated_cuda.build()
        return
    from sharpcore.backends import support_table

    rows = [row for row in support_table() if row.backend == "cuda"]
    reasons = {f"{row.kernel}: {row.reason}" for row in rows if not row.available}
    state.check("every kernel of the cuda backend is there", not reasons, "; ".join(reasons) or "yes")


@contextlib.contextmanager
def krylov_kernels(state: Acceptance) -> Iterator[None]:
    """Solvers take the cuda backend meanwhile; in a dry run its CUDA sources run in threads of the CPU."""
    if not state.dry:
        yield
        return
    import emulated_cuda

    from sharpcore.krylov import decomposition

    cuda = get_backend("cuda", device="cpu", dtype=torch.float64)
    with (
        emulated_cuda.in_place_of_the_gpu(emulated_cuda.build()),
        mock.patch.object(decomposition, "get_backend", return_value=cuda),
    ):
        yield


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Kernels run in their first configuration: fewer to compile."""
    with mock.patch.dict(os.environ, SHARPCORE_AUTOTUNE="0"):
        yield


def attention(state: Acceptance, precision: str) -> None:
    """Attention, its tangents and its transpose, at the sizes that count and odd ones."""
    _compare(state, precision, _attention_calls(state, PRECISIONS[precision]))


def pointwise(state: Acceptance, precision: str) -> None:
    """All other Triton kernels, in both layouts."""
    _compare(state, precision, _pointwise_calls(state, PRECISIONS[precision]))


@untuned()
def _compare(state: Acceptance, precision: str, calls: Iterator[Call]) -> None:
    ours = get_backend("cuda", device=state.device, dtype=PRECISIONS[precision], tf32=precision == "tf32")
    for kernel, case, arguments, keywords in calls:
        exact = _first(reference.KERNELS[kernel](*_double(arguments), **_double(keywords)))
        plain = relative_error(_first(reference.KERNELS[kernel](*arguments, **keywords)), exact)
        error = relative_error(_first(getattr(ours, kernel)(*arguments, **keywords)), exact)
        bound = max(FACTOR * plain, FLOORS[precision])
        state.check(
            f"{kernel} {case} {precision}", error <= bound, f"{error:.1e}, plain PyTorch {plain:.1e}", error
        )


def _attention_calls(state: Acceptance, dtype: torch.dtype) -> Iterator[Call]:
    normal = _Normal(state.device, dtype)
    lengths = [(33, 20, 40, 2)] if state.small else ATTENTION_SIZES
    for rows, keys, width, count in lengths:
        q, k, v = (normal(1, length, 2, width).transpose(1, 2) for length in (rows, keys, keys))
        for masked in (False, True) if state.small or rows * keys < 2**18 else (False,):
            mask = normal(1, 1, rows, keys) if masked else None
            settings = {"mask": mask, "scale": width**-0.5}
            case = f"{rows}x{keys} d={width} K={count}{' masked' if masked else ''}"
            yield "attention_forward", case, (q, k, v), settings
            forward = get_backend("reference", device=state.device, dtype=dtype).attention_forward
            o, lse = forward(q, k, v, **settings)
            primal = (q, k, v, o, lse)
            dq, dk, dv = (normal(count, *operand.shape) for operand in (q, k, v))
            yield "attention_tangent", case, (*primal, dq, dk, dv), settings
            yield "attention_tangent", f"{case} cross", (*primal, dq, None, None), settings
            pulled = (*primal, normal(count, *o.shape))
            yield "attention_adjoint", case, pulled, {**settings, "needed": (True,) * 3}


# Rows, keys, head width, tangents.
ATTENTION_SIZES = [
    (1025, 77, 40, 3),
    (4096, 4096, 40, 1),
    (1024, 1024, 80, 8),
    (256, 256, 160, 3),
    (144, 1025, 64, 2),
    (33, 7, 59, 1),
    (64, 64, 128, 2),
]


class _Normal:
    """Normal numbers on a device, the same ones in every run."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)


def _pointwise_calls(state: Acceptance, dtype: torch.dtype) -> Iterator[Call]:
    normal = _Normal(state.device, dtype)
    groups, count = (2, 2) if state.small else (32, 3)
    for channels, side, last in (
        [(8, 5, False), (8, 5, True)] if state.small else [(320, 64, False), (320, 64, True), (1280, 8, True)]
    ):
        x = normal(2, channels, side, side)
        order = torch.channels_last if last else torch.contiguous_format
        x = x.to(memory_format=order)
        weight, bias = normal(channels), normal(channels)
        _, mean, rstd = reference.KERNELS["group_norm_silu_forward"](x, weight, bias, groups, 1e-5, True)
        given = torch.stack([normal(*x.shape).to(memory_format=order) for _ in range(count)])
        case = f"{channels}x{side}x{side} {'last' if last else 'first'}"
        yield "group_norm_silu_forward", case, (x, weight, bias, groups, 1e-5, True), {}
        for kernel in ("group_norm_silu_tangent", "group_norm_silu_adjoint"):
            yield kernel, case, (given, x, mean, rstd, weight, bias, groups, True), {}
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


def products(state: Acceptance, precision: str) -> None:
    """A whole network, through graphs, at several points, on several streams."""
    pair = on(configs.micro(4) if state.small else configs.mid(), state.device)
    exact = pair.to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn((3, *pair.x.shape), generator=generator).to(state.device)
    points = [pair.x, pair.x + 0.1, pair.x - 0.2, pair.x + 0.3][: 2 if state.dry else 4]
    # Measured on CPUs: 1e-6 in float32, 1e-2 in bfloat16; other orders of summation have room.
    bound = {"float32": 2e-5, "tf32": 2e-2, "bfloat16": 4e-2, "float16": 8e-3}[precision]
    worst = 0.0
    with untuned():
        lin = sharpcore.linearize(pair.f, pair.x, backend=state.backend, precision=precision)
        for number, point in enumerate(points):
            truth = sharpcore.linearize(exact.f, point.double(), backend="reference")
            if number:
                lin.relinearize(point)
            for _ in range(1 if state.dry else 3):  # as it is, recorded, launched again
                errors = [
                    relative_error(product(vectors), known(vectors.double()))
                    for product, known in ((lin.jvp, truth.jvp), (lin.vjp, truth.vjp))
                    for vectors in (given, given[:1])
                ]
                worst = max(worst, *errors)
    state.check(
        f"products in {precision} at {len(points)} points",
        worst <= bound,
        f"{worst:.1e} (at most {bound:g})",
        worst,
    )
    if state.dry:
        return
    refused = lin._workspace.refused
    state.check(f"{precision}: recorded as CUDA graphs", not refused, refused or "yes")
    results = on_streams(lambda: lin.jvp(given), 4)
    same = all(torch.equal(result, results[0]) for result in results)
    state.check(f"{precision}: the same bits on four streams", same, "compared")


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


def ranking(state: Acceptance, precision: str) -> None:
    """The order of the shipped model's prompts against that in float64."""
    from scipy.stats import spearmanr

    folder = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
    prompts = [
        line
        for name in ("mem", "nonmem")
        for line in (folder / f"prompts_{name}.txt").read_text().splitlines()
    ]
    prompts, seeds = (prompts[:1] + prompts[-2:], [42]) if state.small else (prompts, [42, 43, 44, 45])
    double = tiny().to(state.device, torch.float64)
    exact = sharpcore.SharpnessScorer(double, backend="reference")(prompts, seeds=seeds)
    with untuned():
        pipe = tiny().to(state.device)
        scorer = sharpcore.SharpnessScorer(pipe, backend=state.backend, precision=precision)
        table = scorer(prompts, seeds=seeds)
    for metric in ("score_difference", "hessian_score_difference"):
        ours, truth = ([row[metric] for row in rows] for rows in (table, exact))
        rank = float(spearmanr(ours, truth).statistic)
        state.check(
            f"ranking of {len(prompts)} prompts by {metric} in {precision}", rank >= 0.999,
            f"Spearman {rank:.5f}", rank,
        )  # fmt: skip


def solvers(state: Acceptance) -> None:
    """Eigenpairs of matrices with known spectra and of a network's Hessian, and probes, on the device."""
    d, samples, wanted = (16, 2, 1) if state.small else (1024, 8, 5)
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(samples, d, d, generator=generator, dtype=torch.float64))
    values = torch.linspace(-1, 0.2, d, dtype=torch.float64).expand(samples, d).clone()
    values[:, 0] -= 10
    matrix = ((q * values[:, None, :]) @ q.mT).to(state.device)
    with krylov_kernels(state):
        found = block_lanczos(matrix, wanted, "both", block=2 if state.small else 4)
    known = torch.cat([values[:, :wanted], values[:, -wanted:]], 1).to(state.device)
    error = float((found.values - known).abs().max())
    state.check(f"block Lanczos: {2 * wanted} eigenvalues of {d}", error <= 1e-9, f"{error:.1e}", error)
    basis = found.vectors.reshape(samples, 2 * wanted, d)
    eye = torch.eye(2 * wanted, dtype=torch.float64, device=basis.device)
    off = float((basis @ basis.mT - eye).abs().max())
    state.check("block Lanczos: orthonormal vectors", off <= 1e-10, f"{off:.1e}", off)

    pair = on(configs.micro(4 if state.small else 8), state.device)
    double = pair.to(torch.float64)
    exact = sharpcore.Hessian(sharpcore.linearize(double.f, double.x, backend="reference"))
    entries = double.x.numel()
    dense = (
        exact @ torch.eye(entries, dtype=torch.float64, device=double.x.device).reshape(-1, *double.x.shape)
    ).reshape(entries, entries)
    with untuned(), krylov_kernels(state):
        lin = sharpcore.linearize(pair.f, pair.x, backend=state.backend)
        # An eigenvalue is as exact as the square of its residual.
        wanted, tolerance = (1, 1e-2) if state.small else (3, 1e-4)
        found = block_lanczos(sharpcore.Hessian(lin), wanted, "both", vectors=False, tolerance=tolerance)
    count, size = found.values.shape[1] // 2, entries // len(double.x)
    worst = 0.0
    for i in range(len(double.x)):
        part = slice(i * size, (i + 1) * size)
        truth = torch.linalg.eigvalsh(dense[part, part])
        gaps = found.values[i] - torch.cat([truth[:count], truth[-count:]])
        worst = max(worst, float(gaps.abs().max() / truth.abs().max()))
    state.check("block Lanczos: the Hessian of a network, float32", worst <= tolerance, f"{worst:.1e}", worst)

    cpu = sharpcore.krylov.probes("normal", 7, samples=[0, 5], first=3, count=2, dimension=1000, device="cpu")
    cuda = get_backend("cuda", device=state.device, dtype=torch.float64)
    with krylov_kernels(state):
        gpu = cuda.philox_probes(
            "normal", 7, torch.tensor([0, 5]), 3, 2, 1000, dtype=torch.float64, device=state.device
        )
    state.check("probes are those of the CPU, bit for bit", torch.equal(cpu, gpu.cpu()), "compared")


def memory(state: Acceptance) -> None:
    """A memory budget changes no number; a batch that does not fit is halved, and its scores are the same."""
    pair = on(configs.micro() if state.small else configs.mid(), state.device)
    given = torch.randn((2, *pair.x.shape), generator=torch.Generator().manual_seed(1)).to(state.device)
    with untuned():
        free = sharpcore.linearize(pair.f, pair.x, backend=state.backend)
        # Of so small a network most is workspace, which the budget covers as well.
        budget = int((1.6 if state.small else 0.6) * free.nbytes)
        tight = sharpcore.linearize(pair.f, pair.x, backend=state.backend, memory_budget=budget)
        error = relative_error(tight.jvp(given), free.jvp(given))
        state.check("products under a memory budget", error <= 1e-6, f"{error:.1e}", error)
        if not state.small:
            share = tight.nbytes / free.nbytes
            state.check("a memory budget keeps less", share < 1, f"{share:.2f} of the bytes", share)
        pipe = tiny().to(state.device)
        count = 2 if state.small else 8
        prompts = [f"a handwritten {number}" for number in range(count)]
        # Whoever multiplies; interpreted kernels would take minutes.
        scorer = sharpcore.SharpnessScorer(pipe, backend="reference" if state.dry else state.backend)
        before = scorer(prompts, seeds=[42])
        scorer.reset()
        with _short_of_memory(state, count):
            after = scorer(prompts, seeds=[42])
    largest = scorer._most_samples
    state.check("a batch that does not fit is halved", largest is not None and largest < count, f"{largest}")
    worst = max(
        abs(a[name] - b[name]) / abs(b[name])
        for a, b in zip(after, before, strict=True)
        for name in ("score_difference", "hessian_score_difference")
    )
    state.check("scores of the halved batch", worst <= 1e-4, f"{worst:.1e}", worst)


@contextlib.contextmanager
def _short_of_memory(state: Acceptance, count: int) -> Iterator[None]:
    """Too little memory for a batch of so many samples: the allocator's limit, or one that raises."""
    if not state.dry:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    product = sharpcore.Linearization.jvp

    def short(self: Any, tangents: Tensor, *rest: Any, **options: Any) -> Tensor:
        if self.x.shape[0] >= count:
            raise torch.OutOfMemoryError("CUDA out of memory (played)")
        return product(self, tangents, *rest, **options)

    with mock.patch.object(sharpcore.Linearization, "jvp", short):
        yield


def sanitizer(state: Acceptance) -> None:
    """The small cases under compute-sanitizer, where it is there."""
    tool = shutil.which("compute-sanitizer")
    if state.dry or tool is None:
        state.skip("compute-sanitizer memcheck", "needs a GPU" if state.dry else "not installed")
        return
    script = str(ROOT / "benchmarks" / "gpu_acceptance.py")
    # One process, as the tool follows no forks; steps that run out of time end it with an error of their own.
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script, "--small"]
    done = subprocess.run(
        [*command, "--jobs", "0", "--only", "kernels in (bfloat16|float32)|attention in|Krylov"],
        cwd=ROOT,
        env={**os.environ, "SHARPCORE_AUTOTUNE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    state.check("compute-sanitizer memcheck", done.returncode == 0, f"{done.returncode}, {' '.join(last)}")
