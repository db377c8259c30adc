"""Every way to a product under the name of its row, made on demand from a `Problem`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import baselines
import torch
from measure import Run
from problems import Problem

import sharpcore


@dataclass(frozen=True)
class Candidate:
    """`prepare` is the untimed set-up and returns what is timed; `kind` names the truth of its result."""

    prepare: Callable[[Problem], Run]
    kind: str = "product"
    per: int = 1
    setup: str | None = None  # the row of the set-up's own time
    rival: bool = True  # not ours
    compiled: bool = False  # compiles in its first call: measured in a process of its own, with a time limit


def _ours(
    work: str, count: int = 1, precision: str = "float32", *, budgeted: bool = False
) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        linearization = problem.linearization(precision, budgeted=budgeted)
        vectors = (problem.tangents if work == "jvp" else problem.cotangents)[:count]
        getattr(linearization, work)(vectors)  # the first product with so many vectors plans its buffers
        return lambda: getattr(linearization, work)(vectors)

    return prepare


def _relinearize(problem: Problem) -> Run:
    linearization = problem.linearization()
    return lambda: linearization.relinearize(problem.x)


def _rival(make: Callable[..., Any], count: int = 1) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        products, vectors = make(problem.f, problem.x), problem.tangents[:count]
        return lambda: products(vectors)

    return prepare


def _low_forward(problem: Problem) -> Run:
    return baselines.forward(problem.low.f, problem.low.x)


def _low_forward_mode(problem: Problem) -> Run:
    products, tangents = baselines.forward_mode(problem.low.f, problem.low.x), problem.tangents[:1]
    return lambda: products(tangents.to(torch.bfloat16))


def _compiled(make: Callable[..., Any], kind: str = "product", count: int = 1) -> Candidate:
    return Candidate(_rival(make, count), kind, per=count, compiled=True)


CANDIDATES: dict[str, Candidate] = {
    "forward": Candidate(lambda p: baselines.forward(p.f, p.x), "value", rival=False),
    "linearize (trace)": Candidate(lambda p: lambda: sharpcore.linearize(p.f, p.x), "value", rival=False),
    "relinearize": Candidate(_relinearize, "value", rival=False),
    "product, K=1": Candidate(_ours("jvp"), rival=False),
    "product, K=8, per tangent": Candidate(_ours("jvp", 8), per=8, rival=False),
    "transposed product, K=1": Candidate(_ours("vjp"), "pulled", rival=False),
    "one-off product (linearize and K=1)": Candidate(
        lambda p: lambda: sharpcore.linearize(p.f, p.x).jvp(p.tangents[:1]), rival=False
    ),
    "linearize (trace), memory budget": Candidate(
        lambda p: lambda: sharpcore.linearize(p.f, p.x, memory_budget=p.budget), "value", rival=False
    ),
    "product, K=1, memory budget": Candidate(_ours("jvp", budgeted=True), rival=False),
    "bfloat16 product, K=1": Candidate(_ours("jvp", 1, "bfloat16"), rival=False),
    "bfloat16 product, K=8, per tangent": Candidate(_ours("jvp", 8, "bfloat16"), per=8, rival=False),
    "bfloat16 transposed product, K=1": Candidate(_ours("vjp", 1, "bfloat16"), "pulled", rival=False),
    "bfloat16 network, forward": Candidate(_low_forward, "value"),
    "bfloat16 network, torch.func.jvp": Candidate(_low_forward_mode),
    "central difference": Candidate(_rival(baselines.difference)),
    "torch.func.jvp": Candidate(_rival(baselines.forward_mode)),
    "double-backward jvp": Candidate(_rival(baselines.double_backward)),
    "vmap(jvp), K=8, per tangent": Candidate(_rival(baselines.vmap_jvp, 8), per=8),
    "torch.func.linearize, product": Candidate(
        _rival(baselines.torch_linearize), setup="torch.func.linearize, set-up"
    ),
    "autograd vjp, with its forward": Candidate(_rival(baselines.autograd_vjp), "pulled"),
    "curvlinops, Jacobian in the latent": Candidate(_rival(baselines.curvlinops_jacobian)),
    "curvlinops, the same K=8, per tangent": Candidate(_rival(baselines.curvlinops_jacobian, 8), per=8),
    "curvlinops, transposed Jacobian": Candidate(_rival(baselines.curvlinops_adjoint), "pulled"),
    "hessian-eigenthings, Hessian of <w, f(x)>": Candidate(_rival(baselines.hessian_eigenthings)),
    "forward, compiled": Candidate(lambda p: baselines.compiled_forward(p.f, p.x), "value", compiled=True),
    "central difference, compiled": _compiled(baselines.compiled_central_difference),
    "torch.func.jvp, compiled": _compiled(baselines.compiled_forward_mode),
    "double-backward jvp, compiled": _compiled(baselines.compiled_double_backward),
    "vmap(jvp), K=8, per tangent, compiled": _compiled(baselines.compiled_vmap_jvp, count=8),
    "torch.func.jvp, make_fx, compiled": _compiled(baselines.traced_forward_mode),
    "double-backward jvp, make_fx, compiled": _compiled(baselines.traced_double_backward),
    "vmap(jvp), K=8, per tangent, make_fx, compiled": _compiled(baselines.traced_vmap_jvp, count=8),
    "torch.func.linearize, product, compiled": _compiled(baselines.compiled_torch_linearize),
    "autograd vjp, with its forward, compiled": _compiled(baselines.compiled_vjp, "pulled"),
}
COMPILED = tuple(name for name, candidate in CANDIDATES.items() if candidate.compiled)


def add(table: Any, problem: Problem, *names: str, turns: int | None = None, needs: float = 0.0) -> None:
    """Rows of a table for these candidates; the first row of the table, if this is it, becomes the unit."""
    for name in names:
        candidate = CANDIDATES[name]
        table.add(
            name,
            prepare=lambda prepare=candidate.prepare: prepare(problem),
            per=candidate.per,
            error=lambda result, kind=candidate.kind: problem.error(kind, result),
            turns=turns,
            needs=needs,
            setup=candidate.setup,
        )
