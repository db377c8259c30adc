"""The harness of the benchmarks on a small network: protocol, failures as rows, files, targets, charts."""

# ruff: noqa: E402 (the imports follow a check of what this distribution holds)

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the source distribution", allow_module_level=True)
sys.path.append(str(ROOT / "benchmarks"))

from candidates import CANDIDATES, COMPILED, add
from configs import float64_layers, micro
from isolated import fill_peaks, peaks
from measure import OK, Table
from overhead import overhead
from plots import main as draw
from problems import Problem
from results import Missing, Results, load, save
from scaling import curve
from targets import EIGHT, ONE, TARGETS, report


@pytest.fixture(scope="module")
def problem() -> Problem:
    found = Problem("micro")
    found.find_truth()
    return found


# Of packages that are optional.
OPTIONAL = ("curvlinops", "hessian-eigenthings")
LOW = tuple(name for name in CANDIDATES if name.startswith("bfloat16"))
SINGLE = tuple(name for name in CANDIDATES if name not in (*COMPILED, *LOW))


@pytest.mark.parametrize("names", [SINGLE, ("forward", *LOW)], ids=["float32", "bfloat16"])
def test_every_candidate_gives_its_product(problem: Problem, names: tuple[str, ...]) -> None:
    table = Table("micro", turns=2)
    add(table, problem, *names)
    table.measure()
    for record in table.records():
        if record["what"].startswith(OPTIONAL) and "ModuleNotFoundError" in record["status"]:
            continue
        assert record["status"] == OK, record
        assert record["ratio"] > 0
        assert record["lower_quartile_s"] <= record["median_s"] <= record["upper_quartile_s"]
        if record["what"].endswith("set-up"):
            continue
        # Measured: 3e-7 and less for float32, 1e-4 for a central difference, 7e-3 in bfloat16.
        low = "bfloat16" in record["what"]
        bound = 3e-2 if low else 1e-3 if "central" in record["what"] else 2e-6
        assert record["relative_error"] < bound, record


def test_turns_follow_the_unit_and_slow_ones_take_fewer() -> None:
    calls: list[str] = []
    table = Table("order", turns=3)
    table.add("unit", lambda: calls.append("u"))
    table.add("fast", lambda: calls.append("f"), per=4)
    table.add("slow", lambda: calls.append("s"), turns=1)
    table.measure()
    # A call of each, which is not timed, then in turn, each after the unit; the unit's own turn comes first.
    assert "".join(calls) == "ufs" + "u" + "uf" + "us" + 2 * ("u" + "uf")
    unit, fast, slow = table.rows
    assert [len(row.seconds) for row in table.rows] == [7, 3, 1]
    assert fast.ratios() == [s / 4 / u for s, u in zip(fast.seconds, fast.units, strict=True)]
    assert slow.units[0] in unit.units


def test_short_calls_fill_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    calls = {"unit": 0, "short": 0, "long": 0}
    monkeypatch.setattr("measure.perf_counter", lambda: clock[0])

    def candidate(name: str, seconds: float) -> Any:
        def run() -> None:
            clock[0] += seconds
            calls[name] += 1

        return run

    table = Table("short", turns=3, turn_seconds=1.0)
    table.add("unit", candidate("unit", 0.25))
    table.add("short", candidate("short", 0.001), per=2)
    table.add("long", candidate("long", 2.0))
    table.measure()
    assert [row.seconds for row in table.rows] == [
        pytest.approx([0.25] * 9),
        pytest.approx([0.001] * 3),
        pytest.approx([2.0] * 3),
    ]
    assert table.ratio("short") == pytest.approx(0.002)
    # One call for the error, one or more to see how many fill a turn, then turns: timed after untimed.
    assert calls["long"] == 2 + 3
    assert calls["short"] >= 2 * 3 * 1000
    assert calls["unit"] >= 2 * 9 * 4


def test_a_ratio_is_the_median_over_the_turns() -> None:
    row = Table("t", 1).add_row("x", per=2)
    row.seconds, row.units = [2.0, 8.0, 100.0], [1.0, 2.0, 1.0]
    assert (row.record()["ratio"], row.record()["median_s"]) == (2.0, 4.0)


def test_failures_are_rows_that_say_why() -> None:
    def fail() -> None:
        raise ValueError("this first line says all that one has to know about it\nand a second")

    answers = iter([None])
    table = Table("failures", turns=2)
    table.add("unit", lambda: None)
    table.add("at once", fail)
    table.add("in set-up", prepare=fail, setup="its set-up")
    table.add("later", lambda: next(answers))
    table.add("too large", lambda: None, needs=1e9)
    table.unit("a unit that fails", fail)
    table.add("measured against it", lambda: None)
    table.measure()
    status = {row.what: row.status for row in table.rows}
    assert status["unit"] == OK
    why = "failed: ValueError: this first line says all that one has to know about it"
    assert status["at once"] == status["in set-up"] == status["its set-up"] == why
    assert status["later"] == "failed: StopIteration"
    assert re.fullmatch(r"skipped: needs 1000000000\.0 GiB, \d+\.\d free", status["too large"])
    assert status["measured against it"] == "skipped: the unit 'a unit that fails' did not run"
    assert why in str(table)


def test_peak_memory_comes_from_a_process_of_its_own(problem: Problem) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks are read from Linux's /proc")
    found = peaks("micro", ("forward",))
    table = Table("micro", turns=1)
    add(table, problem, "forward")
    fill_peaks(table, found)
    (row,) = table.rows
    assert row.status == OK
    assert row.peak_mib is not None
    assert 0 <= row.peak_mib < 500


def test_a_process_that_takes_too_long_is_ended(problem: Problem) -> None:
    run = importlib.import_module("isolated").run
    result = run("micro", {}, "forward", turns=0, limit=0.05)
    assert result == {"status": "failed: not finished after 0 s (set-up, compilation and turns)"}


def test_float64_layers_compute_as_a_float64_network_and_restore_the_weights() -> None:
    pair = micro()
    before = [parameter.clone() for parameter in pair.unet.parameters()]
    exact = pair.to(torch.float64)
    with torch.no_grad(), float64_layers(pair.unet):
        value = pair.inputs(torch.float64).f(exact.x)
    assert torch.equal(value, exact.f(exact.x))
    after = list(pair.unet.parameters())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(after, before, strict=True))


def test_scaling_and_overhead_have_a_row_a_point(problem: Problem) -> None:
    table = Table("scaling-tangents", turns=1)
    curve(table, "micro", "tangents", (1, 4))
    found = {(record["what"], record["point"]): record["status"] for record in table.records()}
    names = {("forward", 1), ("product", 1), ("central difference", 1), ("torch.func.jvp", 1)}
    assert found == dict.fromkeys(
        {*names, *((n, 4) for n in ("forward", "product", "central difference", "vmap(jvp)"))}, OK
    )
    table = Table("overhead", turns=1)
    overhead(table, problem, Problem("micro"))
    assert [row.status for row in table.rows] == [OK] * 4
    product, executor, one, share = table.rows
    instructions = len(problem.linearization().program.steps)
    assert len(executor.seconds) == 1
    assert f"{instructions} instructions" in product.what
    assert table.ratio(share.what) == pytest.approx(instructions * table.ratio(one.what))


def _record(table: str, what: str, ratio: float | str, **columns: Any) -> dict[str, Any]:
    return {"table": table, "what": what, "status": OK, "ratio": ratio, **columns}


def test_saved_tables_replace_their_own_older_rows(tmp_path: Path) -> None:
    save("kernels", [_record("a", "x", 1.0), _record("a", "y", 2.0)], tmp_path)
    save("kernels", [_record("b", "x", 3.0, depth=10)], tmp_path)
    path = save("kernels", [_record("a", "x", 4.0)], tmp_path)
    rows = [(row["table"], row["what"], row["ratio"], row["depth"]) for row in load(path)]
    assert rows == [("b", "x", "3", "10"), ("a", "x", "4", "")]


def test_targets_are_judged_by_the_saved_rows(tmp_path: Path) -> None:
    save(
        "mid",
        [_record("mid", ONE, 1.2), _record("mid", EIGHT, 1.2), _record("mid", "torch.func.jvp", 12.0)],
        tmp_path,
    )
    failed = {**_record("sd14", ONE, ""), "status": "failed: MemoryError"}
    save("sd14", [failed], tmp_path)
    rows = Results.read(tmp_path)
    verdicts = {(target.section, target.what): target.judge(rows) for target in TARGETS}
    assert verdicts["mid, forward passes", ONE] == ("1.2", "ok")
    assert verdicts["mid, forward passes", EIGHT] == ("1.2", "missed")
    assert verdicts["mid, times faster than", "torch.func.jvp"] == ("10", "ok")
    assert verdicts["sd14, forward passes", ONE] == ("-", "failed: MemoryError")
    assert verdicts["sdxl, forward passes", ONE] == ("-", "not measured")
    assert len(report(rows).splitlines()) == len(TARGETS) + 1
    with pytest.raises(Missing, match="not measured"):
        rows.number("mid", "relinearize")


def test_charts_are_drawn_from_the_saved_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, tmp_path)
    assert "no rows in mid.csv" in capsys.readouterr().out
    save("mid", [_record("mid", what, 1.0) for what in ("forward", ONE, "torch.func.jvp")], tmp_path)
    points = [_record("scaling-size", "product", 1.0 + p, axis="size", point=p) for p in (16, 32)]
    save("scaling", points, tmp_path)
    draw(tmp_path, tmp_path)
    sizes = [(tmp_path / name).stat().st_size for name in ("against_baselines.png", "scaling.png")]
    assert all(1_000 < size < 100_000 for size in sizes)
