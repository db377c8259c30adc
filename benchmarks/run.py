"""The command of the benchmarks: each section in a process of its own, with pinned threads.

python benchmarks/run.py quick                       # minutes
python benchmarks/run.py full --save-results         # hours; rows go to benchmarks/results/
python benchmarks/run.py mid sd14 --turns 3          # sections alone
python benchmarks/run.py check                       # the saved rows against the project's targets
python benchmarks/run.py plots                       # the charts of README and docs from the saved rows
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHOLE = ("krylov", "linearize", "overhead", "scaling", "scoring", "sd14", "sdxl", "spectra")
KERNELS = tuple(
    f"benchmarks/{path.name}"
    for path in sorted(ROOT.glob("benchmarks/bench_*.py"))
    if path.stem.removeprefix("bench_") not in WHOLE
)
QUICK_TURNS = 3


@dataclass(frozen=True)
class Section:
    """Arguments of one pytest, and the threads that it needs where that is not the caller's choice."""

    arguments: tuple[str, ...]
    threads: int | None = None


SECTIONS: dict[str, tuple[Section, ...]] = {
    "quick": (
        Section(("benchmarks/bench_linearize.py", "benchmarks/bench_overhead.py", *KERNELS, "-m", "quick")),
    ),
    "kernels": (Section(KERNELS),),
    "mid": (Section(("benchmarks/bench_linearize.py", "-m", "not quick")),),
    "overhead": (
        Section(("benchmarks/bench_overhead.py",), 1),
        Section(("benchmarks/bench_overhead.py",), 2),
    ),
    "scoring": (Section(("benchmarks/bench_scoring.py",)),),
    "sd14": (
        Section(("benchmarks/bench_sd14.py", "-m", "sd14", "-k", "not bfloat16")),
        Section(("benchmarks/bench_sd14.py", "-m", "sd14", "-k", "bfloat16")),
    ),
    "sd14-scoring": (Section(("benchmarks/bench_scoring.py", "-m", "sd14")),),
    "sdxl": (Section(("benchmarks/bench_sdxl.py", "-m", "sdxl")),),
    "krylov": (Section(("benchmarks/bench_krylov.py", "-k", "not krylov_quick")),),
    "krylov-quick": (Section(("benchmarks/bench_krylov.py", "-m", "quick")),),
    "spectra": (Section(("benchmarks/bench_spectra.py", "-m", "spectra")),),
    "scaling": (Section(("benchmarks/bench_scaling.py", "-m", "scaling")),),
}
FULL = tuple(name for name in SECTIONS if not name.endswith("quick"))


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns 0 where every pytest did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = (*SECTIONS, "full", "check", "plots")
    parser.add_argument("sections", nargs="+", choices=choices, metavar="SECTION", help=", ".join(choices))
    parser.add_argument("--turns", type=int, help="how often each candidate runs (default: 5; quick: 3)")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS (default: as set, or all cores)")
    parser.add_argument("--save-results", action="store_true", help="write rows to benchmarks/results/")
    parser.add_argument("--compile-limit", type=float, help="seconds for each torch.compile candidate (300)")
    asked = parser.parse_args(arguments)
    failures = 0
    for name in asked.sections:
        if name in ("check", "plots"):
            module = "targets.py" if name == "check" else "plots.py"
            failures += subprocess.run([sys.executable, f"benchmarks/{module}"], cwd=ROOT).returncode != 0
            continue
        for section in FULL if name == "full" else (name,):
            for part in SECTIONS[section]:
                failures += _run(section, part, asked) != 0
    return int(failures > 0)


def _run(name: str, section: Section, asked: argparse.Namespace) -> int:
    threads = section.threads or asked.threads or int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    turns = asked.turns or (QUICK_TURNS if name.endswith("quick") else None)
    command = ["-m", "pytest", *section.arguments, "-s", "-q", "--benchmark-quiet", "--no-header"]
    command += [] if turns is None else ["--turns", str(turns)]
    command += [] if asked.compile_limit is None else ["--compile-limit", str(asked.compile_limit)]
    command += ["--save-results"] if asked.save_results else []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    print(f"\n== {name}: OMP_NUM_THREADS={threads} python {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
    print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
