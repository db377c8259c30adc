"""Fixtures shared by the tests: poisoned memory, threads, the small pipelines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import interpreted  # noqa: F401  # before anything imports triton
import pytest
import torch
from kernel_checks import poisoned_memory
from pipelines import Work, load_tiny_pipeline, make_sd2_pipeline, make_xl_pipeline


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialized tensors hold NaN."""
    with poisoned_memory():
        yield


@pytest.fixture
def set_threads() -> Iterator[None]:
    """The test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_pipe() -> Any:
    """The trained pipeline; tests leave it as it is."""
    return load_tiny_pipeline()


@pytest.fixture
def fresh_pipe(tiny_pipe: Any) -> Any:
    """A copy of the trained pipeline for tests that change it."""
    pipe = copy.deepcopy(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def sd2_pipe(tiny_pipe: Any) -> Any:
    return make_sd2_pipeline(tiny_pipe)


@pytest.fixture(scope="session")
def small_xl_pipe(tiny_pipe: Any) -> Any:
    return make_xl_pipeline(tiny_pipe)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Counts forward passes, products and traces from now on."""
    return Work().patch(monkeypatch)
