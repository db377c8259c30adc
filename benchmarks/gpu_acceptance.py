"""One command that proves the cuda backend on a GPU: it builds, checks all against float64, and measures.

    python benchmarks/gpu_acceptance.py              # on a GPU: under 8 minutes, nothing is downloaded
    python benchmarks/gpu_acceptance.py --dry-run    # without one: toy sizes, kernels interpreted

Rows go to benchmarks/results/gpu_<card>.csv, a summary beside it and to the screen (of a dry run to a
temporary folder). Every step is a process of its own: one that fails, hangs or breaks the GPU's context is
named, and the others go on. Checks run beside each other, as most of their time is the compiler's;
measurements run alone. The exit code is 1 if a check failed or a target was missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gpu_report import FAILED, ROOT, SKIPPED, Acceptance, Finding, Report

FOLDERS = (ROOT, ROOT / "tests", ROOT / "benchmarks")
sys.path[:0] = map(str, FOLDERS[:2])
LIMIT = 480  # seconds that the whole may take
DRY_LIMIT = 3600
JOBS = 8  # checks beside each other at most
LEAST = 5  # seconds: what is begun with less ends in the middle
# What every step needs, imported once and inherited.
PRELOADED = ["diffusers", "gpu_checks", "gpu_measurements"]


@dataclass(frozen=True)
class Step:
    """A named part, which may take so many seconds on a GPU; None: what is left."""

    name: str
    run: Callable[[Acceptance], None]
    seconds: float | None = None


@dataclass(frozen=True)
class How:
    """What kind of run this is."""

    device: str
    dry: bool
    small: bool
    jobs: int


def checks(dry: bool) -> list[Step]:
    """Imported late, as the interpreter must be switched on before Triton is."""
    import gpu_checks as made
    import gpu_measurements as measured

    compiling = [
        Step(f"compiling for Stable Diffusion {name}", work, 170)
        for name, work in (
            ("1.4", measured.compile_sd14),
            ("2.1", measured.compile_sd21),
            ("XL", measured.compile_sdxl),
        )
    ]
    precisions = [p for p in made.PRECISIONS if not (dry and p == "tf32")]
    return [
        *([] if dry else compiling),
        *(Step(f"attention in {p}", partial(made.attention, precision=p), 100) for p in made.PRECISIONS),
        *(Step(f"norms and pointwise kernels in {p}", partial(made.pointwise, precision=p), 60)
          for p in made.PRECISIONS if p != "tf32"),
        *(Step(f"products in {p}", partial(made.products, precision=p), 60) for p in precisions),
        *(Step(f"ranking of the shipped model's prompts in {p}", partial(made.ranking, precision=p), 60)
          for p in precisions),
        Step("Krylov solvers", made.solvers, 60),
        Step("memory that runs out", made.memory, 60),
    ]  # fmt: skip


def measurements() -> list[Step]:
    """In the order in which time runs out for them."""
    import gpu_measurements as made

    return [
        Step("rates of the card", made.rates, 20),
        Step("kernels alone", made.kernels, 45),
        Step("Stable Diffusion 1.4, products", made.sd14, 120),
        Step("scoring ten prompts, Stable Diffusion 1.4", made.scoring_sd14, 50),
        Step("Stable Diffusion XL, products", made.sdxl, 60),
        Step("Stable Diffusion 2.1, products", made.sd21, 45),
        Step("scoring ten prompts, Stable Diffusion 2.0", made.scoring_sd20, 45),
        Step("Stable Diffusion 1.4, torch.compile", made.compiled, 90),
    ]


def go(report: Report, how: How, only: str | None) -> None:
    """Every step, whatever becomes of the others."""
    import gpu_checks

    def chosen(steps: Sequence[Step]) -> list[Step]:
        return [step for step in steps if only is None or re.search(only, step.name)]

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload((["interpreted"] if how.dry else []) + PRELOADED)
    together(context, report, how, chosen([Step("build", gpu_checks.build, 120)]), 1)
    together(context, report, how, chosen(checks(how.dry)), how.jobs)
    for step in chosen([*measurements(), Step("compute-sanitizer", gpu_checks.sanitizer)]):
        together(context, report, how, [step], 1)


@dataclass
class _Running:
    step: Step
    process: BaseProcess
    connection: Connection
    began: float
    deadline: float


def together(context: Any, report: Report, how: How, steps: Sequence[Step], jobs: int) -> None:
    """Run steps in processes of their own, `jobs` at a time, and take what they send; in this one if `how`
    has no jobs."""
    for step in steps if how.jobs == 0 else ():
        print(f"== {step.name}", flush=True)
        _attempt(step, how, report.rates, report.take)
    waiting, running = [] if how.jobs == 0 else list(steps), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            step = waiting.pop(0)
            if report.left < LEAST:
                report.take(Finding(step.name, SKIPPED, "no time was left"))
                continue
            print(f"== {step.name}", flush=True)
            seconds = report.left if how.small or step.seconds is None else min(step.seconds, report.left)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(step, how, report.rates, theirs))
            process.start()
            theirs.close()
            now = time.monotonic()
            running.append(_Running(step, process, ours, now, now + seconds))
        if not running:
            continue
        soonest = min(one.deadline for one in running) - time.monotonic()
        ready = wait([one.connection for one in running], timeout=max(0.0, soonest))
        for one in list(running):
            late = time.monotonic() > one.deadline
            if one.connection in ready and _receive(one, report):
                one.process.join()
                if one.process.exitcode:
                    report.take(Finding(one.step.name, FAILED, f"ended with {one.process.exitcode}"))
            elif late:
                one.process.kill()
                one.process.join()
                report.take(Finding(one.step.name, FAILED, f"was cut after {one.deadline - one.began:.0f} s"))
            else:
                continue
            one.connection.close()
            running.remove(one)
            print(f"   {one.step.name}: {time.monotonic() - one.began:.1f} s", flush=True)


def _receive(one: _Running, report: Report) -> bool:
    """Take what has come; whether that was the end."""
    try:
        report.take(one.connection.recv())
    except EOFError:
        return True
    return False


def _work(step: Step, how: How, rates: dict[str, float], connection: Connection) -> None:
    _attempt(step, how, rates, connection.send)
    connection.close()


def _attempt(step: Step, how: How, rates: dict[str, float], send: Callable[[Any], None]) -> None:
    from measure import why

    state = Acceptance(how.device, how.dry, how.small, rates, send)
    try:
        step.run(state)
    except Exception as error:  # named, and the others go on
        traceback.print_exc()
        state.check(step.name, False, why(error))


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a check failed or a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, kernels interpreted")
    parser.add_argument("--small", action="store_true", help="toy sizes on the GPU")
    parser.add_argument("--only", help="regular expression: the steps to run")
    parser.add_argument("--limit", type=float, help=f"seconds for the whole ({LIMIT}; dry: {DRY_LIMIT})")
    parser.add_argument(
        "--jobs", type=int, help=f"checks at a time (cores, at most {JOBS}; dry: 1; 0: no processes)"
    )
    parser.add_argument("--output", type=Path, help="folder of the CSV (benchmarks/results)")
    asked = parser.parse_args(arguments)
    dry, small = asked.dry_run, asked.small or asked.dry_run
    # Processes of steps start with what they find there.
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
    if dry:
        os.environ.update(SHARPCORE_AUTOTUNE="0", CUDA_VISIBLE_DEVICES="")
        import interpreted  # noqa: F401  # switches Triton's interpreter on
    import torch

    if not dry and not torch.cuda.is_available():
        print("no GPU: PyTorch finds none; --dry-run goes through the steps without one")
        return 1
    usual = 1 if dry else min(JOBS, os.cpu_count() or 1)
    jobs = usual if asked.jobs is None else asked.jobs
    report = Report(asked.limit or (DRY_LIMIT if dry else LIMIT))
    go(report, How("cpu" if dry else "cuda", dry, small, jobs), asked.only)
    print(f"\n{report.summary()}")
    if report.records or report.findings:
        from machine import describe
        from results import FOLDER

        # Toy sizes prove nothing that the repository should keep.
        folder = asked.output or (Path(tempfile.mkdtemp(prefix="gpu_acceptance-")) if small else FOLDER)
        card = "dry run" if dry else torch.cuda.get_device_name()
        about = {"card": card, **describe("python benchmarks/gpu_acceptance.py")}
        print(report.save(card, about, folder))
    return int(not report.passed)


if __name__ == "__main__":
    sys.exit(main())
