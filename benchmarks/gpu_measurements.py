"""What gpu_acceptance.py measures: rates of the card, products of whole networks, scoring, kernels alone."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import baselines
import configs
import scoring_pipelines as pipelines
import torch
import torch.nn.functional as F
from gpu_checks import krylov_kernels, on
from gpu_report import Acceptance, Rate
from measure import Row, Table
from scoring_pipelines import tiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpcore
from sharpcore.backends import get_backend
from sharpcore.backends.reference.lanczos_step import LanczosState
from sharpcore.testing.tolerance import relative_error

TURNS = 5
ONE, EIGHT = "product, K=1", "product, K=8, per tangent"
SCALED = "scaled down"
COUNTS = ("sizes", "processed", "multiplied", "deflated", "breakdowns", "faults")
# arXiv 2601.20642, table of times: seconds for ten prompts on a datacenter card.
PUBLISHED = {
    "Stable Diffusion 1.4": {"both scores": 5.40, "score difference": 0.40},
    "Stable Diffusion 2.0": {"both scores": 14.60, "score difference": 0.80},
}


def waiting(state: Acceptance, work: Callable[[], Any], repeat: int = 1) -> Callable[[], Any]:
    """The work `repeat` times (see `times`), done when it returns."""

    def run() -> Any:
        result = None
        for _ in range(times(state, repeat)):
            result = work()
        if state.device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def seconds(state: Acceptance, work: Callable[[], Any], repeat: int = 10) -> float:
    """The median time of one of `repeat` calls in a row."""
    table = Table("", turns(state))
    row = table.add("", waiting(state, work, repeat), per=times(state, repeat))
    table.measure()
    return row.record()["median_s"]


def turns(state: Acceptance) -> int:
    """How often each candidate runs."""
    return 1 if state.small else TURNS


def times(state: Acceptance, repeat: int) -> int:
    """How often short work is repeated in a turn."""
    return 1 if state.small else repeat


def rates(state: Acceptance) -> None:
    """Bytes a second of a copy, operations a second of a bfloat16 matrix product."""
    n = 2**10 if state.small else 2**28
    source = torch.empty(n, dtype=torch.uint8, device=state.device)
    target = torch.empty_like(source)
    copied = 2 * n / seconds(state, lambda: target.copy_(source))
    n = 64 if state.small else 8192
    a = torch.randn(n, n, device=state.device, dtype=torch.bfloat16)
    multiplied = 2 * n**3 / seconds(state, lambda: a @ a)
    table = Table("rates", 1)
    for name, value in (("copy", copied), ("matmul", multiplied)):
        table.add_row(f"{name}, a second", derived=value)
        state.send(Rate(name, value))
    state.keep(table)


def sd14(state: Acceptance) -> None:
    """The UNet of Stable Diffusion 1.4 at 64x64, a guidance pair, with rivals."""
    pair = configs.small_sd() if state.small else configs.sd14(device=state.device)
    _network(state, pair, "Stable Diffusion 1.4", rivals=True)


def sd21(state: Acceptance) -> None:
    """The UNet of Stable Diffusion 2.1 at 96x96."""
    pair = configs.small_sd(linear=True) if state.small else configs.sd21(device=state.device)
    _network(state, pair, "Stable Diffusion 2.1", rivals=False)


def sdxl(state: Acceptance) -> None:
    """The UNet of Stable Diffusion XL at 128x128."""
    pair = configs.small_sdxl() if state.small else configs.sdxl(128, device=state.device)
    _network(state, pair, "Stable Diffusion XL", rivals=False)


def compile_sd14(state: Acceptance) -> None:
    """Compile all that `sd14` and the scoring tune."""
    _compile(state, configs.sd14(device=state.device))


def compile_sd21(state: Acceptance) -> None:
    """Compile all that `sd21` and the scoring tune."""
    _compile(state, configs.sd21(device=state.device))


def compile_sdxl(state: Acceptance) -> None:
    """Compile all that `sdxl` tunes."""
    _compile(state, configs.sdxl(128, device=state.device))


def _compile(state: Acceptance, pair: configs.Pair) -> None:
    """Every configuration of the kernels of a network into Triton's cache, without measuring any.

    Beside other work, as measurements cannot be: most of a first run's time is the compiler's.
    """
    tuning = importlib.import_module("sharpcore.kernels.tuning")
    done: set[Any] = set()

    def first(kernel: Any, grid: Any, arguments: Any, configurations: Any, key: Any) -> Any:
        place = (kernel.fn.__name__, len(configurations), *(arguments[name] for name in key))
        if place not in done:
            done.add(place)
            tuning.compile_all(kernel, grid, arguments, configurations)
        return configurations[0]

    low = on(pair, state.device, torch.bfloat16)
    with mock.patch.object(tuning, "_fastest", first):
        lin = sharpcore.linearize(low.f, low.x, backend=state.backend)
        for count in (1, 8):
            lin.jvp(torch.randn((count, *low.x.shape)).to(low.x))
        lin.vjp(torch.randn((1, *low.x.shape)).to(low.x))
    print(f"compiled for {len(done)} shapes of kernels", flush=True)


def _network(state: Acceptance, pair: configs.Pair, name: str, *, rivals: bool) -> None:
    """Products of a bfloat16 network in units of its own forward pass."""
    name = f"{name}, {SCALED}" if state.small else name
    # The rivals in float32 have a network of their own; ours is made bfloat16 in place.
    high = configs.Pair(copy.deepcopy(pair.unet), *_rest(pair)) if rivals else None
    low = on(pair, state.device, torch.bfloat16)
    table = Table(f"{name}, bfloat16", turns(state))
    generator = torch.Generator().manual_seed(1)
    many = 2 if state.small else 8
    tangents = torch.randn((many, *low.x.shape), generator=generator).to(low.x)

    def forward() -> Tensor:
        with torch.no_grad():
            return low.f(low.x)

    table.unit("forward", waiting(state, forward))
    lin = sharpcore.linearize(low.f, low.x, backend=state.backend)

    def warm(work: Callable[[], Any]) -> Callable[[], Any]:
        for _ in range(0 if state.dry else 3):  # as it is, recorded, launched
            work()
        return waiting(state, work)

    table.add("relinearize", prepare=lambda: warm(lambda: lin.relinearize(low.x)))
    table.add(ONE, prepare=lambda: warm(lambda: lin.jvp(tangents[:1])))
    table.add(EIGHT, prepare=lambda: warm(lambda: lin.jvp(tangents)), per=many, tangents=many)
    table.add("vjp, K=1", prepare=lambda: warm(lambda: lin.vjp(tangents[:1])))
    if high is not None:
        _rivals(state, table, on(high, state.device), low, tangents)
    table.measure()
    state.keep(table)
    state.target(f"{name}: {ONE}", table.ratio(ONE), 1.4)
    state.target(f"{name}: {EIGHT}", table.ratio(EIGHT), 1.2)
    state.target(f"{name}: relinearize", table.ratio("relinearize"), 1.2)
    if high is None:
        return
    _against_rivals(state, table, name)
    # The tuned kernels, by the rule of tolerances: against forward mode in float32, and that in bfloat16.
    exact = baselines.forward_mode(high.f, high.x)(tangents[:1].float())
    plain = relative_error(baselines.forward_mode(low.f, low.x)(tangents[:1]), exact)
    error = relative_error(lin.jvp(tangents[:1]), exact)
    found = f"{error:.1e}, torch.func.jvp {plain:.1e}"
    state.check(f"{name}: the product in bfloat16", error <= max(2 * plain, 4e-3), found, error)


def _rest(pair: configs.Pair) -> tuple[Any, ...]:
    return pair.x, pair.timestep, pair.prompt, pair.added


FORWARD_MODE = "torch.func.jvp, float32, math attention"


def _rivals(state: Acceptance, table: Table, high: configs.Pair, low: configs.Pair, tangents: Tensor) -> None:
    """What else gives such products on a GPU; one that cannot is a row that says why."""
    few: dict[str, Any] = {"turns": 2}
    many = len(tangents)
    wide = _prepared(state, baselines.forward_mode, high, tangents[:1].float())
    table.add(FORWARD_MODE, prepare=wide, **few)
    one, all_of_them = tangents[:1], tangents
    table.add(
        "rival: vmap(jvp)", prepare=_prepared(state, baselines.vmap_jvp, low, all_of_them), per=many, **few
    )
    table.add("rival: torch.func.jvp", prepare=_prepared(state, baselines.forward_mode, low, one), **few)
    table.add("rival: central difference", prepare=_prepared(state, baselines.difference, low, one), **few)
    table.add(
        "rival: jvp-flash-attention", prepare=_prepared(state, baselines.flash_forward_mode, low, one), **few
    )


def _prepared(
    state: Acceptance, products: Any, pair: configs.Pair, vectors: Tensor
) -> Callable[[], Callable[[], Any]]:
    return lambda: waiting(state, functools.partial(products(pair.f, pair.x), vectors))


def _against_rivals(state: Acceptance, table: Table, name: str) -> None:
    one, eight, forward_mode = table.ratio(ONE), table.ratio(EIGHT), table.ratio(FORWARD_MODE)
    over = forward_mode / one if forward_mode and one else None
    state.target(f"{name}: over torch.func.jvp", over, 8, at_most=False)
    _over_the_best(state, table, f"{name}: over the best rival, per tangent", eight)
    if eight is not None:
        state.send(Rate(EIGHT, eight))


def _over_the_best(state: Acceptance, table: Table, what: str, ours: float | None) -> None:
    found = [table.ratio(row.what) for row in table.rows if row.what.startswith("rival: ")]
    best = min((ratio for ratio in found if ratio is not None), default=None)
    state.target(what, best / ours if best and ours else None, 2, at_most=False)


def compiled(state: Acceptance) -> None:
    """The rivals under torch.compile, one after the other, as compiling may take all the time there is."""
    pair = configs.micro() if state.small else configs.sd14(device=state.device)
    low = on(pair, state.device, torch.bfloat16)
    name = f"Stable Diffusion 1.4{f', {SCALED}' if state.small else ''}, torch.compile"
    generator = torch.Generator().manual_seed(1)
    tangents = torch.randn((8, *low.x.shape), generator=generator).to(low.x)

    def forward() -> Tensor:
        with torch.no_grad():
            return low.f(low.x)

    rivals: list[tuple[str, Any, int]] = [
        ("central difference", baselines.compiled_central_difference, 1),
        ("torch.func.jvp", baselines.compiled_forward_mode, 1),
        ("vmap(jvp)", baselines.compiled_vmap_jvp, 8),
    ]
    for what, products, count in rivals:
        table = Table(f"{name}, {what}", turns(state))
        table.unit("forward", waiting(state, forward))
        prepared = _prepared(state, products, low, tangents[:count])
        table.add(f"rival: compiled {what}", prepare=prepared, per=count, turns=2)
        table.measure()
        state.keep(table)
        ours = state.rates.get(EIGHT)
        _over_the_best(state, table, f"{name}: over {what}, per tangent", ours)


def scoring_sd14(state: Acceptance) -> None:
    """With the networks of Stable Diffusion 1.4."""
    _scoring(state, tiny() if state.small else pipelines.sd14(state.device), "Stable Diffusion 1.4")


def scoring_sd20(state: Acceptance) -> None:
    """With the networks of Stable Diffusion 2.0, at 768 pixels."""
    _scoring(state, tiny() if state.small else pipelines.sd20(state.device), "Stable Diffusion 2.0")


def _scoring(state: Acceptance, pipe: Any, name: str) -> None:
    """Ten prompts, one seed, both scores, against the plain score difference alone."""
    published = PUBLISHED[name]
    name = f"{name}, {SCALED}" if state.small else name
    low = {} if state.dry else {"torch_dtype": torch.bfloat16}
    pipe = pipe.to(state.device, **low)
    # One in a dry run, whose kernels are interpreted.
    prompts = [f"a bold upright handwritten {number}" for number in range(1 if state.dry else 10)]
    scorer = sharpcore.SharpnessScorer(pipe, backend=state.backend)
    asked: dict[str, dict[str, Any]] = {
        "score difference": {"metrics": ("score_difference",)},
        "both scores": {},
    }
    table = Table(f"scoring, {name}", turns(state))

    def warm(options: dict[str, Any]) -> Callable[[], Any]:
        def work() -> Any:
            return scorer(prompts, seeds=[42], **options)

        for _ in range(0 if state.dry else 3):
            work()
        return waiting(state, work)

    for what, options in asked.items():
        table.add(what, prepare=functools.partial(warm, options))
    table.measure()
    state.keep(table)
    state.target(f"scoring, {name}: both scores over the score difference", table.ratio("both scores"), 2.5)
    for row in table.rows:
        state.target(
            f"scoring, {name}: seconds for ten prompts, {row.what}",
            row.record()["median_s"],
            published[row.what],
        )


def kernels(state: Acceptance) -> None:
    """Useful work of the heaviest kernels against what the card was seen to do."""
    dtype = torch.float32 if state.dry else torch.bfloat16
    ours = get_backend("cuda", device=state.device, dtype=dtype)
    for measure in (_attention, _group_norm):
        measure(state, ours, dtype)
    with krylov_kernels(state):
        _lanczos(state)


def _attention(state: Acceptance, ours: Any, dtype: torch.dtype) -> None:
    length, width, heads = (33, 40, 1) if state.small else (4096, 40, 8)
    table = Table("attention tangent", turns(state))
    q, k, v = (
        torch.randn(2, length, heads, width, device=state.device, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    settings = {"mask": None, "scale": width**-0.5}
    o, lse = ours.attention_forward(q, k, v, **settings)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        fused = waiting(state, lambda: F.scaled_dot_product_attention(q, k, v), 5)
        table.unit("fused forward", fused, per=times(state, 5))
        for count in (1, 2 if state.small else 8):
            dq, dk, dv = (torch.randn(count, *q.shape, device=state.device, dtype=dtype) for _ in range(3))
            work = functools.partial(ours.attention_tangent, q, k, v, o, lse, dq, dk, dv, **settings)
            # Two products of the scores, four for each tangent.
            flop = 2 * 2 * heads * length * length * width * (1 + 4 * count) / count
            what = f"attention_tangent, K={count}, per tangent"
            table.add(what, waiting(state, work, 5), per=times(state, 5) * count, flop=flop)
        table.measure()
    state.keep(table)
    for row in table.rows[1:]:
        _share(state, row, row.labels["flop"], "matmul", 0.45)


def _share(state: Acceptance, row: Row, amount: float, rate: str, bound: float) -> None:
    """How much of a rate of the card a row reaches, doing `amount` of it in a unit of work."""
    taken, possible = row.record()["median_s"], state.rates.get(rate)
    share = amount / taken / possible if taken and possible else None
    state.target(f"{row.table}, {row.what}: share of the {rate} rate", share, bound, at_most=False)


def _group_norm(state: Acceptance, ours: Any, dtype: torch.dtype) -> None:
    batch, channels, side, groups = (1, 8, 5, 2) if state.small else (16, 320, 64, 32)
    table = Table("GroupNorm and SiLU tangent", turns(state))
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(batch, channels, side, side, device=state.device, dtype=dtype)
        x = x.to(memory_format=order)
        weight, bias = (torch.randn(channels, device=state.device, dtype=dtype) for _ in range(2))
        _, mean, rstd = ours.group_norm_silu_forward(x, weight, bias, groups, 1e-5, True)
        given = torch.stack([torch.randn_like(x) for _ in range(2)])
        out = torch.empty_like(given)
        work = functools.partial(
            ours.group_norm_silu_tangent, given, x, mean, rstd, weight, bias, groups, True, out=out
        )
        what = "channels last" if order is torch.channels_last else "channels first"
        # Two tangents and x are read, two results written.
        moved = 5 * x.numel() * x.element_size()
        table.add(what, waiting(state, work, 10), per=times(state, 10), bytes=moved)
    table.measure()
    state.keep(table)
    for row in table.rows:
        _share(state, row, row.labels["bytes"], "copy", 0.8)


def _lanczos(state: Acceptance) -> None:
    d, samples, block, rows = (64, 1, 2, 8) if state.small else (16384, 8, 8, 64)
    calls = 4 if state.small else 256
    device = state.device
    step = get_backend("cuda", device=device, dtype=torch.float64).lanczos_step
    q, _ = torch.linalg.qr(torch.randn(samples, d, rows, dtype=torch.float64, device=device))
    basis = torch.zeros(samples, rows + block, d, dtype=torch.float64, device=device)
    basis[:, :rows] = q.mT
    products = torch.randn(block, samples, d, dtype=torch.float64, device=device)
    out = torch.empty_like(products)

    def before() -> LanczosState:
        """Bases of so many rows, the last block of which has just been multiplied."""
        counts = {name: torch.zeros(samples, dtype=torch.int64, device=device) for name in COUNTS}
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        made = LanczosState(
            basis=basis,
            projected=zeros(samples, rows + block, rows + block),
            lost=zeros(samples, rows + block),
            norm=zeros(samples),
            frozen=torch.zeros(samples, dtype=torch.bool, device=device),
            **counts,
        )
        made.sizes.fill_(rows)
        made.processed.fill_(rows - block)
        return made

    # A step changes its state: each call has one of its own.
    states = itertools.cycle([before() for _ in range(calls)])

    def one_step() -> Any:
        return step(next(states), products, share=1e-12, tolerance=1e-10, limit=rows + block, out=out)

    def loop() -> None:
        for i in range(samples):
            w = products[:, i].clone()
            for _ in range(2):
                w -= (w @ basis[i, :rows].mT) @ basis[i, :rows]
            for j in range(block):
                for _ in range(2):
                    if j:
                        w[j] -= (w[:j] @ w[j]) @ w[:j]
                w[j] /= torch.linalg.vector_norm(w[j])
            basis[i, rows : rows + block] = w

    table = Table("Lanczos step", turns(state))
    unit = table.unit("step", waiting(state, one_step, 5), per=times(state, 5))
    table.add("loop of torch operations", waiting(state, loop))
    table.measure()
    state.keep(table)
    # Two passes, each of which reads the basis for the coefficients and again for the update.
    _share(state, unit, 4 * samples * rows * d * 8, "copy", 0.6)
    over = table.ratio("loop of torch operations")
    state.target("Lanczos step: a loop of torch operations over it", over, 10, at_most=False)
