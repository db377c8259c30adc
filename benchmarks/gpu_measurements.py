"""What gpu_acceptance.py measures: rates of the card, products of whole networks, scoring, kernels alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import baselines
import configs
import torch
import torch.nn.functional as F
from gpu_checks import on
from gpu_report import Acceptance
from measure import Table
from scoring_pipelines import sd14 as sd14_pipeline
from scoring_pipelines import tiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpcore
from sharpcore.backends import get_backend

TURNS = 5
ONE, EIGHT = "product, K=1", "product, K=8, per tangent"
# arXiv 2601.20642, table of times: seconds for ten prompts of Stable Diffusion 1.4 on a datacenter card.
PUBLISHED = {"both scores": 5.40, "score difference": 0.40}


def waiting(state: Acceptance, work: Callable[[], Any], repeat: int = 1) -> Callable[[], Any]:
    """The work `repeat` times, done when it returns."""

    def run() -> Any:
        result = None
        for _ in range(repeat):
            result = work()
        if state.device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def seconds(state: Acceptance, work: Callable[[], Any], repeat: int = 10) -> float:
    """The median time of one of `repeat` calls in a row."""
    table = Table("", TURNS)
    row = table.add("", waiting(state, work, repeat), per=repeat)
    table.measure()
    return row.record()["median_s"]


def rates(state: Acceptance) -> None:
    """Bytes a second of a copy, operations a second of a bfloat16 matrix product."""
    n = 2**10 if state.small else 2**28
    source = torch.empty(n, dtype=torch.uint8, device=state.device)
    target = torch.empty_like(source)
    state.measured["copy"] = 2 * n / seconds(state, lambda: target.copy_(source))
    n = 64 if state.small else 8192
    a = torch.randn(n, n, device=state.device, dtype=torch.bfloat16)
    state.measured["matmul"] = 2 * n**3 / seconds(state, lambda: a @ a)
    table = Table("rates", 1)
    for name, value in state.measured.items():
        table.add_row(f"{name}, a second", derived=value)
    state.keep(table)


def _network(state: Acceptance, pair: configs.Pair, name: str, *, rivals: bool) -> None:
    """Products of a bfloat16 network in units of its own forward pass."""
    if state.small:
        pair = configs.micro()
    low = on(pair, state.device, torch.bfloat16)
    backend = "cuda" if state.dry else "auto"
    table = Table(f"{name}, bfloat16", TURNS)
    generator = torch.Generator().manual_seed(1)
    tangents = torch.randn((8, *low.x.shape), generator=generator).to(low.x)

    def forward() -> Tensor:
        with torch.no_grad():
            return low.f(low.x)

    table.unit("forward", waiting(state, forward))
    made: list[sharpcore.Linearization] = []

    def lin() -> sharpcore.Linearization:
        if not made:
            made.append(sharpcore.linearize(low.f, low.x, backend=backend))
            for _ in range(3):  # as it is, recorded, launched
                made[0].relinearize(low.x)
        return made[0]

    def warm(work: Callable[[], Any]) -> Callable[[], Any]:
        for _ in range(3):
            work()
        return waiting(state, work)

    table.add("relinearize", prepare=lambda: warm(lambda: lin().relinearize(low.x)))
    table.add(ONE, prepare=lambda: warm(lambda: lin().jvp(tangents[:1])))
    table.add(EIGHT, prepare=lambda: warm(lambda: lin().jvp(tangents)), per=8)
    table.add("vjp, K=1", prepare=lambda: warm(lambda: lin().vjp(tangents[:1])))
    if rivals:
        _rivals(state, table, pair, low, tangents)
    table.measure()
    state.keep(table)
    state.target(f"{name}: {ONE}", table.ratio(ONE), 1.4)
    state.target(f"{name}: {EIGHT}", table.ratio(EIGHT), 1.2)
    state.target(f"{name}: relinearize", table.ratio("relinearize"), 1.2)
    if not rivals:
        return
    one = table.ratio(ONE)
    autocast = table.ratio("torch.func.jvp, autocast, math attention")
    state.target(f"{name}: over torch.func.jvp", autocast and one and autocast / one, 8, at_most=False)
    others = [table.ratio(row.what) for row in table.rows if row.what.startswith("rival: ")]
    best = min((ratio for ratio in others if ratio is not None), default=None)
    eight = table.ratio(EIGHT)
    state.target(
        f"{name}: over the best rival, per tangent", best and eight and best / eight, 2, at_most=False
    )


def _rivals(state: Acceptance, table: Table, pair: configs.Pair, low: configs.Pair, tangents: Tensor) -> None:
    """What else gives such products on a GPU; one that cannot is a row that says why."""
    own = configs.Pair(copy.deepcopy(low.unet), pair.x, pair.timestep, pair.prompt, pair.added)
    high = on(own, state.device, torch.float32)
    wide = tangents.float()
    few = min(2, TURNS)

    def autocast() -> Tensor:
        with torch.autocast(state.device, torch.bfloat16):
            return baselines.forward_mode(high.f, high.x)(wide[:1])

    def prepared(products: Any, f: Any, x: Tensor, vectors: Tensor) -> Callable[[], Callable[[], Any]]:
        return lambda: waiting(state, functools.partial(products(f, x), vectors))

    table.add("torch.func.jvp, autocast, math attention", waiting(state, autocast), turns=few)
    table.add(
        "rival: vmap(jvp), K=8",
        prepare=prepared(baselines.vmap_jvp, low.f, low.x, tangents),
        per=8,
        turns=few,
    )
    table.add(
        "rival: central difference, K=1",
        prepare=prepared(baselines.difference, low.f, low.x, tangents[:1]),
        turns=few,
    )
    if not state.small:
        table.add(
            "rival: compiled central difference, K=1",
            prepare=prepared(baselines.compiled_central_difference, low.f, low.x, tangents[:1]),
            turns=few,
        )
    table.add("rival: jvp-flash-attention, K=1", prepare=lambda: _flash(state, low, tangents[:1]), turns=few)


def _flash(state: Acceptance, low: configs.Pair, tangents: Tensor) -> Callable[[], Any]:
    """torch.func.jvp through the package's attention in the place of PyTorch's."""
    from jvp_flash_attention.jvp_attention import attention

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *_: Any, **__: Any) -> Tensor:
        return attention(q, k, v, attn_mask)

    def run() -> Tensor:
        usual = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = fused
        try:
            return torch.func.jvp(low.f, (low.x,), (tangents[0],))[1]
        finally:
            F.scaled_dot_product_attention = usual

    return waiting(state, run)


def sd14(state: Acceptance) -> None:
    """The UNet of Stable Diffusion 1.4 at 64x64, a guidance pair, with rivals."""
    _network(state, configs.micro() if state.small else configs.sd14(), "sd14", rivals=True)


def sd21(state: Acceptance) -> None:
    """The UNet of Stable Diffusion 2.1 at 96x96."""
    _network(state, configs.micro() if state.small else configs.sd21(), "sd21", rivals=False)


def sdxl(state: Acceptance) -> None:
    """The UNet of Stable Diffusion XL at 128x128."""
    _network(state, configs.micro() if state.small else configs.sdxl(128), "sdxl", rivals=False)


def scoring(state: Acceptance) -> None:
    """Ten prompts, one seed, both scores, against the plain score difference alone."""
    pipe = tiny() if state.small else sd14_pipeline()
    low = {} if state.dry else {"torch_dtype": torch.bfloat16}
    pipe = pipe.to(state.device, **low)
    prompts = [f"a bold upright handwritten {number}" for number in range(2 if state.small else 10)]
    backend = "cuda" if state.dry else "auto"
    scorers = {
        "score difference": sharpcore.SharpnessScorer(pipe, metrics=("score_difference",), backend=backend),
        "both scores": sharpcore.SharpnessScorer(pipe, backend=backend),
    }
    table = Table("scoring", 2 if state.small else TURNS)

    def warm(scorer: Any) -> Callable[[], Any]:
        def work() -> Any:
            return scorer(prompts, seeds=[42])

        for _ in range(1 if state.small else 3):
            work()
        return waiting(state, work)

    for name, scorer in scorers.items():
        table.add(name, prepare=functools.partial(warm, scorer))
    table.measure()
    state.keep(table)
    state.target("scoring: both scores over the score difference", table.ratio("both scores"), 2.5)
    for row in table.rows:
        state.target(
            f"scoring: seconds for ten prompts, {row.what}", row.record()["median_s"], PUBLISHED[row.what]
        )


def kernels(state: Acceptance) -> None:
    """Useful work of the heaviest kernels against what the card was seen to do."""
    dtype = torch.float32 if state.dry else torch.bfloat16
    ours = get_backend("cuda", device=state.device, dtype=dtype)
    _attention(state, ours, dtype)
    _group_norm(state, ours, dtype)
    _lanczos(state)


def _attention(state: Acceptance, ours: Any, dtype: torch.dtype) -> None:
    length, width, heads = (33, 40, 1) if state.small else (4096, 40, 8)
    table = Table("attention tangent", TURNS)
    q, k, v = (
        torch.randn(2, length, heads, width, device=state.device, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    settings = {"mask": None, "scale": width**-0.5}
    o, lse = ours.attention_forward(q, k, v, **settings)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        table.unit("fused forward", waiting(state, lambda: F.scaled_dot_product_attention(q, k, v), 5), per=5)
    for count in (1, 8):
        dq, dk, dv = (torch.randn(count, *q.shape, device=state.device, dtype=dtype) for _ in range(3))
        work = functools.partial(ours.attention_tangent, q, k, v, o, lse, dq, dk, dv, **settings)
        row = table.add(f"attention_tangent, K={count}, per tangent", waiting(state, work, 5), per=5 * count)
        row.labels["flop"] = 2 * 2 * heads * length * length * width * (1 + 4 * count) / count
    table.measure()
    state.keep(table)
    for row in table.rows[1:]:
        share = row.labels["flop"] / row.record()["median_s"] / state.measured["matmul"]
        state.target(f"{row.what}: share of the matrix rate", share, 0.45, at_most=False)


def _group_norm(state: Acceptance, ours: Any, dtype: torch.dtype) -> None:
    channels, side = (32, 5) if state.small else (320, 64)
    table = Table("GroupNorm and SiLU tangent", TURNS)
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(16, channels, side, side, device=state.device, dtype=dtype).to(memory_format=order)
        weight, bias = (torch.randn(channels, device=state.device, dtype=dtype) for _ in range(2))
        _, mean, rstd = ours.group_norm_silu_forward(x, weight, bias, 32, 1e-5, True)
        given = torch.stack([torch.randn_like(x) for _ in range(2)])
        out = torch.empty_like(given)
        work = functools.partial(
            ours.group_norm_silu_tangent, given, x, mean, rstd, weight, bias, 32, True, out=out
        )
        what = "channels last" if order is torch.channels_last else "channels first"
        row = table.add(what, waiting(state, work, 10), per=10)
        row.labels["bytes"] = 5 * x.numel() * x.element_size()  # two tangents and x read, two results written
    table.measure()
    state.keep(table)
    for row in table.rows:
        share = row.labels["bytes"] / row.record()["median_s"] / state.measured["copy"]
        state.target(
            f"GroupNorm and SiLU tangent, {row.what}: share of the copy rate", share, 0.8, at_most=False
        )


def _lanczos(state: Acceptance) -> None:
    d, samples, block, rows = (64, 2, 2, 8) if state.small else (16384, 8, 8, 64)
    device = state.device
    grow = get_backend("cuda", device=device, dtype=torch.float64).grow_basis
    q, _ = torch.linalg.qr(torch.randn(samples, d, rows, dtype=torch.float64, device=device))
    basis = torch.zeros(samples, rows + block, d, dtype=torch.float64, device=device)
    basis[:, :rows] = q.mT
    vectors = torch.randn(block, samples, d, dtype=torch.float64, device=device)
    sizes = torch.full((samples,), rows, device=device)
    floor = torch.zeros(samples, dtype=torch.float64, device=device)
    if state.dry:
        sizes, floor = sizes.cpu(), floor.cpu()
    table = Table("Lanczos step", TURNS)

    def step() -> Any:
        return grow(basis, sizes, vectors, floor=floor, limit=rows + block)

    def loop() -> None:
        for i in range(samples):
            w = vectors[:, i].clone()
            for _ in range(2):
                w -= (w @ basis[i, :rows].mT) @ basis[i, :rows]
            for j in range(block):
                for _ in range(2):
                    if j:
                        w[j] -= (w[:j] @ w[j]) @ w[:j]
                w[j] /= torch.linalg.vector_norm(w[j])
            basis[i, rows : rows + block] = w

    table.unit("step", waiting(state, step, 5), per=5)
    table.add("loop of torch operations", waiting(state, loop))
    table.measure()
    state.keep(table)
    # Two passes, each of which reads the basis for the coefficients and again for the update.
    moved = 4 * samples * rows * d * 8
    share = moved / table.rows[0].record()["median_s"] / state.measured["copy"]
    state.target("Lanczos step: share of the copy rate", share, 0.6, at_most=False)
    state.target("Lanczos step: loop over it", table.ratio("loop of torch operations"), 10, at_most=False)
