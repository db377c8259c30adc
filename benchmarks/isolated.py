"""One candidate in a process of its own: its peak memory, its compilation under a time limit, its crash.

python benchmarks/isolated.py REQUEST.json    # as `run` calls it
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine
import torch
from candidates import CANDIDATES
from measure import OK, Table, timed, why
from problems import Problem

HERE = Path(__file__).parent
COMPILE_LIMIT = 300.0
PEAK_LIMIT = 900.0


def peaks(network: str, names: Iterable[str], **options: Any) -> dict[str, dict[str, Any]]:
    """The peak memory of candidates, each in a fresh process: set-up and first call, above the weights.

    Before this process has a network of its own, so that there is room.
    """
    return {name: run(network, options, name, turns=0, limit=PEAK_LIMIT) for name in names}


def fill_peaks(table: Table, found: dict[str, dict[str, Any]]) -> None:
    """Put what `peaks` found into the rows of the same names."""
    for row in table.rows:
        result = found.get(row.what)
        if result is not None and row.status == OK:
            row.peak_mib = result.get("peak_mib")
            row.status = OK if result["status"] == OK else f"peak memory {result['status']}"


def add_compiled(table: Table, problem: Problem, names: Iterable[str], turns: int, limit: float) -> None:
    """Rows for each compiled candidate and its compilation; the unit runs in the same process as it."""
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.pt"
        problem.save_truth(truth)
        for name in names:
            result = run(problem.network, problem.options, name, turns=turns, limit=limit, truth=truth)
            row = table.add_row(name, per=CANDIDATES[name].per, status=result["status"])
            row.seconds, row.units = result.get("seconds", []), result.get("units", [])
            # Its peak is that of the compiler, and no row shows it.
            row.error = result.get("error")
            if "first_s" in result:
                compilation = table.add_row(f"{name}: first call (compilation)")
                compilation.seconds, compilation.units = [result["first_s"]], result["units"][:1]


def run(
    network: str,
    options: dict[str, Any],
    what: str,
    *,
    turns: int,
    limit: float,
    truth: Path | None = None,
) -> dict[str, Any]:
    """Measure one candidate in a fresh process, which is ended after `limit` seconds; never raises."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(
            json.dumps(
                {
                    "network": network,
                    "options": options,
                    "what": what,
                    "turns": turns,
                    "truth": None if truth is None else str(truth),
                    "answer": str(answer),
                }
            )
        )
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        }
        log = Path(folder) / "log.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "isolated.py"), str(request)],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return {"status": f"failed: not finished after {limit:.0f} s (set-up, compilation and turns)"}
            finally:
                _end(process)
        if answer.exists():
            return json.loads(answer.read_text())
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        return {"status": f"failed: exit code {code} {last[:200]}".rstrip()}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The child, and the compilers that it may have left: all of the session that it was started in."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    problem = Problem(request["network"], **request["options"])
    if request["truth"] is not None:
        problem.load_truth(Path(request["truth"]))
    problem.warm_up()
    candidate, forward = CANDIDATES[request["what"]], CANDIDATES["forward"].prepare(problem)
    before = machine.reset_peak()
    try:
        prepared = candidate.prepare(problem)
        first, result = timed(prepared)
        answer: dict[str, Any] = {
            "status": OK,
            "peak_mib": machine.peak_since(before),
            "error": problem.error(candidate.kind, result),
            "units": [],
            "seconds": [],
        }
        if candidate.compiled:
            answer |= {"first_s": first, "status": _graph_breaks()}
        for _ in range(request["turns"]):
            answer["units"].append(timed(forward)[0])
            answer["seconds"].append(timed(prepared)[0])
        return answer
    # Whatever a candidate raises is its result.
    except Exception as error:
        return {"status": why(error)}


def _graph_breaks() -> str:
    """Whether all of it was compiled: Dynamo runs what it cannot capture as it was."""
    from torch._dynamo.utils import counters

    breaks = sum(counters["graph_break"].values())
    return f"{OK}, with {breaks} graph breaks" if breaks else OK


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(asked["answer"]).write_text(json.dumps(_measure(asked)))
