"""The project's performance targets against the saved rows: target, measured, reached or missed.

    python benchmarks/targets.py

It reports and never fails: a time that is missed on one machine is not an error of the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from results import FOLDER, Missing, Results

ONE, EIGHT = "product, K=1", "product, K=8, per tangent"
BUDGETED = f"{ONE}, memory budget"
LOW_ONE, LOW_EIGHT = f"bfloat16 {ONE}", f"bfloat16 {EIGHT}"
FURTHER, OVER = "each further prompt, per seed", "authors' procedure over each further prompt"


@dataclass(frozen=True)
class Target:
    """One number with its bound; `measure` raises `Missing` where a row is not there."""

    section: str
    what: str
    measure: Callable[[Results], float]
    bound: float
    at_most: bool = True

    def judge(self, rows: Results) -> tuple[str, str]:
        """The measured number and the verdict."""
        try:
            value = self.measure(rows)
        except Missing as reason:
            return "-", str(reason)
        reached = value <= self.bound if self.at_most else value >= self.bound
        return f"{value:.3g}", "ok" if reached else "missed"


def _number(table: str, what: str, column: str = "ratio") -> Callable[[Results], float]:
    return lambda rows: rows.number(table, what, column)


def _quotient(
    table: str, above: str, below: str, column: str = "ratio", below_table: str | None = None
) -> Callable[[Results], float]:
    return lambda rows: rows.number(table, above, column) / rows.number(below_table or table, below, column)


def _worst(prefix: str, what: str) -> Callable[[Results], float]:
    """The largest ratio over the tables that begin with the prefix."""

    def measure(rows: Results) -> float:
        found = rows.tables(prefix)
        if not found:
            raise Missing("not measured")
        return max(rows.number(table, what) for table in found)

    return measure


def _over_fewest(table: str, what: str, prefixes: tuple[str, ...], column: str) -> Callable[[Results], float]:
    """A row's number over the smallest of the rows that begin with one of the prefixes."""

    def measure(rows: Results) -> float:
        found = []
        for name, row in rows.rows:
            if name == table and row.startswith(prefixes):
                try:
                    found.append(rows.number(table, row, column))
                except Missing:  # a rival that failed is no rival
                    continue
        if not found:
            raise Missing("not measured")
        return rows.number(table, what, column) / min(found)

    return measure


def _at_least(section: str, what: str, measure: Callable[[Results], float], bound: float) -> Target:
    return Target(section, what, measure, bound, at_most=False)


SD14, LOW, XL = "sd14", "sd14_bfloat16", "sdxl"
JVP, VMAP, DOUBLE = "torch.func.jvp", "vmap(jvp), K=8, per tangent", "double-backward jvp"
LINEARIZE, DIFFERENCE = "torch.func.linearize", "central difference"
RELINEARIZE, TRACE = "relinearize", "linearize (trace)"
LANCZOS = "block_lanczos, b=1"
PAPER = "paper's procedure, Arnoldi on torch.func.jvp"
RIVALS = ("eigsh", "PRIMME", "lobpcg")

TARGETS: tuple[Target, ...] = (
    Target("mid, forward passes", ONE, _number("mid", ONE), 1.3),
    Target("mid, forward passes", EIGHT, _number("mid", EIGHT), 1.1),
    Target("mid, forward passes", RELINEARIZE, _number("mid", RELINEARIZE), 1.15),
    Target("mid, forward passes", "transposed product, K=1", _number("mid", "transposed product, K=1"), 1.4),
    Target("sd14, forward passes", ONE, _number(SD14, ONE), 1.35),
    Target("sd14, forward passes", EIGHT, _number(SD14, EIGHT), 1.3),
    Target("sd14, forward passes", RELINEARIZE, _number(SD14, RELINEARIZE), 1.15),
    Target(
        "sd14, peak memory",
        f"{BUDGETED}, over that of a forward",
        _quotient(SD14, BUDGETED, "forward", "peak_mib"),
        2.5,
    ),
    Target("sd14, forward passes", BUDGETED, _number(SD14, BUDGETED), 1.35),
    Target("sd14 in bfloat16, float32 forwards", ONE, _number(LOW, LOW_ONE), 0.75),
    Target("sd14 in bfloat16, float32 forwards", EIGHT, _number(LOW, LOW_EIGHT), 0.65),
    Target(
        "sd14 in bfloat16, error",
        f"{ONE}, over that of a plain bfloat16 {JVP}",
        _quotient(LOW, LOW_ONE, f"bfloat16 network, {JVP}", "relative_error"),
        2.0,
    ),
    Target("sdxl, forward passes", ONE, _number(XL, ONE), 1.4),
    Target("sdxl, forward passes", EIGHT, _number(XL, EIGHT), 1.3),
    _at_least("mid, times faster than", JVP, _quotient("mid", JVP, ONE), 8),
    _at_least("mid, times faster than", DOUBLE, _quotient("mid", DOUBLE, ONE), 8),
    _at_least("mid, times faster than", VMAP, _quotient("mid", VMAP, EIGHT), 5),
    _at_least(
        "mid, times faster than", f"{LINEARIZE}, product", _quotient("mid", f"{LINEARIZE}, product", ONE), 3
    ),
    _at_least(
        "mid, times faster than", f"{LINEARIZE}, set-up", _quotient("mid", f"{LINEARIZE}, set-up", TRACE), 20
    ),
    _at_least("mid, times faster than", DIFFERENCE, _quotient("mid", DIFFERENCE, ONE), 1.4),
    _at_least(
        "mid, times as accurate as", DIFFERENCE, _quotient("mid", DIFFERENCE, ONE, "relative_error"), 1000
    ),
    _at_least("sd14, times faster than", JVP, _quotient(SD14, JVP, ONE), 4),
    _at_least(
        "sd14, times faster than",
        f"{JVP} in float32, ours in bfloat16",
        _quotient(SD14, JVP, LOW_ONE, below_table=LOW),
        6,
    ),
    _at_least(
        "sd14, times faster than",
        f"{JVP}, for one product with its linearization",
        _quotient(SD14, JVP, "one-off product (linearize and K=1)"),
        2.3,
    ),
    _at_least("sd14, times faster than", DIFFERENCE, _quotient(SD14, DIFFERENCE, ONE), 1.4),
    _at_least(
        "sd14, times as accurate as", DIFFERENCE, _quotient(SD14, DIFFERENCE, ONE, "relative_error"), 1000
    ),
    Target("sd14 scoring, sample-forwards", FURTHER, _number("scoring-sd14", FURTHER), 4.0),
    _at_least("sd14 scoring, times faster", OVER, _number("scoring-sd14", OVER), 4),
    Target("sd14 scoring in bfloat16", FURTHER, _number("scoring-sd14", f"bfloat16: {FURTHER}"), 2.8),
    _at_least("sd14 scoring in bfloat16", OVER, _number("scoring-sd14", f"bfloat16: {OVER}"), 6),
    Target(
        "kernels, over a fused forward",
        "attention, N=4096, d=40, 8 heads, K=1",
        _number("attention_tangent-sd-outer-1", "cpu kernel"),
        2.4,
    ),
    Target(
        "kernels, over a fused forward",
        "the same, K=8, per tangent",
        _number("attention_tangent-sd-outer-8", "cpu kernel"),
        2.0,
    ),
    Target(
        "kernels, over a copy",
        "GroupNorm+SiLU at Stable Diffusion's sizes, worst",
        _worst("group_norm_silu_tangent-sd", "cpu kernel"),
        1.5,
    ),
    Target(
        "whole spectra in float64",
        "error over the largest eigenvalue, worst of 30",
        _number("spectra", "largest of all", "relative_error"),
        1e-6,
    ),
    Target(
        "10 pairs at both ends, products",
        "over the fewest of eigsh and PRIMME",
        _over_fewest("krylov_one", LANCZOS, RIVALS[:2], "products"),
        1.2,
    ),
    Target(
        "10 pairs at both ends, time",
        "over the fastest rival, one sample",
        _over_fewest("krylov_one", LANCZOS, RIVALS, "ratio"),
        1.0,
    ),
    Target(
        "10 pairs at both ends, time",
        "over the fastest rival, 8 samples",
        _over_fewest("krylov_batch", LANCZOS, RIVALS, "ratio"),
        0.8,
    ),
    _at_least(
        "10 pairs at both ends, times faster",
        PAPER,
        _quotient("krylov_paper", PAPER, LANCZOS),
        4,
    ),
    Target(
        "block Lanczos",
        "outside of products, share on mid, basis of 64, b=4",
        _number("krylov_overhead-64", "outside of products, share"),
        0.05,
    ),
    _at_least(
        "kernels, times faster than a loop of torch",
        "growth of 64 bases of 64 rows, d=1024, b=4",
        _quotient("grow_basis-tiny", "loop of torch operations", "cpu kernel"),
        5,
    ),
    Target(
        "executor",
        "executor alone, calls doing nothing, share of a product on mid",
        _worst("overhead", "the executor alone, its calls doing nothing"),
        0.05,
    ),
    Target(
        "executor",
        "overhead of all instructions, share of a product on mid",
        _worst("overhead", "overhead of all instructions, at most"),
        0.05,
    ),
)


def report(rows: Results) -> str:
    """One line a target."""
    lines = [f"{'':38s} {'':62s} {'target':>9s} {'measured':>9s}"]
    for target in TARGETS:
        measured, verdict = target.judge(rows)
        bound = f"{'<=' if target.at_most else '>='} {target.bound:g}"
        lines.append(f"{target.section:38s} {target.what:62s} {bound:>9s} {measured:>9s}  {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Results.read(FOLDER)))
