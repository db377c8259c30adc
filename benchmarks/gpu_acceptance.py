"""One command that proves the cuda backend on a GPU: it builds, checks all against float64, and measures.

    python benchmarks/gpu_acceptance.py              # on a GPU: under 8 minutes, nothing is downloaded
    python benchmarks/gpu_acceptance.py --dry-run    # without one: toy sizes, kernels interpreted

Rows go to benchmarks/results/gpu_<card>.csv, a summary to the screen. A step that fails is named, and the
others go on; one that would pass the time limit is a line that says so. The exit code is 1 if a check failed
or a target was missed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_report import ROOT, Acceptance, Verdict

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT = 480  # seconds that the whole may take


@dataclass(frozen=True)
class Step:
    """A named part; `seconds` is what it takes at most on a card that the project was made for."""

    name: str
    run: Callable[[Acceptance], None]
    seconds: float


def build(state: Acceptance) -> None:
    """The compiled modules, for this card alone where one is there."""
    environment = {**os.environ, "SHARPCORE_REQUIRE_EXTENSION": "1"}
    if not state.dry:
        import torch

        major, minor = torch.cuda.get_device_capability()
        environment.update(SHARPCORE_CUDA="ON", SHARPCORE_CUDA_ARCHITECTURES=f"{major}{minor}")
    missing = not list((ROOT / "sharpcore").glob("_C*.so"))
    missing |= not state.dry and not list((ROOT / "sharpcore").glob("_cuda*.so"))
    if missing:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the build failed: {done.stdout[-300:]} {done.stderr[-300:]}")
    from sharpcore.backends import support_table

    rows = [row for row in support_table() if row.backend == "cuda"]
    reasons = {f"{row.kernel}: {row.reason}" for row in rows if not row.available}
    if not state.dry:
        state.check("every kernel of the cuda backend is there", not reasons, "; ".join(reasons) or "yes")


def steps() -> list[Step]:
    """All of them, in order; imported late, as the interpreter must be switched on before Triton is."""
    import gpu_checks as checks
    import gpu_measurements as measurements

    return [
        Step("rates of the card", measurements.rates, 10),
        Step("kernels against float64", checks.kernels, 60),
        Step("products against float64", checks.products, 40),
        Step("ranking of the shipped model's prompts", checks.ranking, 40),
        Step("Krylov solvers against LAPACK", checks.solvers, 30),
        Step("Stable Diffusion 1.4, products", measurements.sd14, 110),
        Step("kernels alone", measurements.kernels, 30),
        Step("scoring ten prompts", measurements.scoring, 60),
        Step("Stable Diffusion 2.1, products", measurements.sd21, 40),
        Step("Stable Diffusion XL, products", measurements.sdxl, 60),
        Step("compute-sanitizer", checks.sanitizer, 60),
    ]


def run(state: Acceptance, only: str | None) -> None:
    """Every step, whatever becomes of the others."""
    from measure import why

    for step in [Step("build", build, 90), *steps()]:
        if only is not None and not re.search(only, step.name):
            continue
        if step.seconds > state.left and not state.small:
            state.verdicts.append(Verdict(step.name, f"skipped: {state.left:.0f} s left", None))
            continue
        print(f"== {step.name}", flush=True)
        start = time.perf_counter()
        try:
            step.run(state)
        except Exception as error:  # named, and the others go on
            state.check(step.name, False, why(error))
        print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def summary(state: Acceptance) -> str:
    """One line for each check and target."""
    words = {True: "ok", False: "FAILED", None: "-"}
    lines = [f"{words[v.ok]:7s} {v.what}: {v.found}" for v in state.verdicts]
    failed = sum(v.ok is False for v in state.verdicts)
    return "\n".join(
        [*lines, f"{failed} failed of {len(state.verdicts)}, {time.perf_counter() - state.began:.0f} s"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a check failed or a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, kernels interpreted")
    parser.add_argument("--small", action="store_true", help="toy sizes on the GPU")
    parser.add_argument("--only", help="regular expression: the steps to run")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for the whole (480)")
    parser.add_argument("--output", type=Path, help="folder of the CSV (benchmarks/results)")
    asked = parser.parse_args(arguments)
    if asked.dry_run:
        os.environ["SHARPCORE_AUTOTUNE"] = "0"
        import interpreted  # noqa: F401  # switches Triton's interpreter on
    import torch

    if not asked.dry_run and not torch.cuda.is_available():
        print("no GPU: PyTorch finds none; --dry-run goes through the steps without one")
        return 1
    small = asked.small or asked.dry_run
    state = Acceptance("cpu" if asked.dry_run else "cuda", asked.dry_run, small, asked.limit)
    run(state, asked.only)
    print("\n" + summary(state))
    if state.records and (asked.output or not small):
        from machine import describe
        from results import FOLDER, save

        card = (
            "dry_run" if state.dry else re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
        )
        about = {"card": card, **describe("python benchmarks/gpu_acceptance.py")}
        print(save(f"gpu_{card}", [{**record, **about} for record in state.records], asked.output or FOLDER))
    return int(any(verdict.ok is False for verdict in state.verdicts))


if __name__ == "__main__":
    sys.exit(main())
