"""Benchmarks under pytest: options, markers, and the table that a test fills, which is printed and saved."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import machine
import results
from isolated import COMPILE_LIMIT
from measure import KERNEL_TURN_SECONDS, Table

LARGE = {
    "sd14": "Stable Diffusion 1.4's size: many minutes, 18 GiB",
    "sdxl": "Stable Diffusion XL's widths: many minutes, as much memory as there is",
    "spectra": "whole spectra in float64: many minutes",
    "scaling": "curves over tangents, latent size, channels and batch: many minutes",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharpcore benchmarks")
    group.addoption("--save-results", action="store_true", help="write the tables to benchmarks/results/")
    group.addoption("--turns", type=int, default=5, help="how often each candidate runs (default: 5)")
    group.addoption(
        "--compile-limit",
        type=float,
        default=COMPILE_LIMIT,
        help="seconds for each torch.compile candidate, all in all (default: 300)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of the quick table")
    config.addinivalue_line("markers", "kernel: a turn is as many calls as take 20 ms")
    for name, meaning in LARGE.items():
        config.addinivalue_line("markers", f"{name}: {meaning}; runs only with -m {name}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.endswith("_tangent") and "[mid" in item.name:
            item.add_marker("quick")
        for name in LARGE:
            if name in item.keywords and name not in config.getoption("markexpr"):
                item.add_marker(pytest.mark.skip(reason=f"runs only with -m {name}"))


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """A table named after the test, printed at its end also where the test fails, saved when asked for."""
    name = request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")
    turn_seconds = KERNEL_TURN_SECONDS if "kernel" in request.keywords else 0.0
    result = Table(name, request.config.getoption("--turns"), turn_seconds)
    yield result
    if not result.rows:
        return
    host = machine.describe(_command(request.config))
    processor = f"{host['cpu']} ({host['cpu_features']}), {host['threads']} threads"
    print(f"\n{result.name}: {processor}, torch {host['torch']}")
    print(result)
    if request.config.getoption("--save-results"):
        section = request.node.originalname.removeprefix("test_")
        print(f"saved to {results.save(section, [record | host for record in result.records()]).name}")


def _command(config: pytest.Config) -> str:
    """What to type in the root of the repository to get these rows."""
    return shlex.join(["pytest", *map(str, config.invocation_params.args)])
