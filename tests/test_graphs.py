"""Recorded work: the logic around CUDA graphs, on a recorder that does PyTorch operations again in place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from small_unet import prediction, vectors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharpcore import SharpnessScorer, linearize, workspace
from sharpcore.graphs import Recordings


class Recorder(TorchDispatchMode):
    """As a CUDA graph: notes every operation with the memory it reads and writes, and does it again there.

    What was made while recording is filled with NaN, as a graph that is recorded has not run.
    """

    made: ClassVar[list[Recorder]] = []

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.launches = 0
        self.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore words")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def record(self, work: Callable[[], Any]) -> Any:
        with self:
            result = work()
        for _, args, kwargs, out in self.operations:
            given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            for tensor in tensors(out):
                if tensor.is_floating_point() and tensor.untyped_storage()._cdata not in given:
                    tensor.fill_(float("nan"))
        return result

    def launch(self) -> None:
        self.launches += 1
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    """Those with memory that PyTorch shows: not oneDNN's packed weights."""
    leaves = tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    made: list[Recorder] = []
    monkeypatch.setattr(Recorder, "made", made)
    monkeypatch.setattr(workspace, "graph_maker", lambda device: Recorder)
    # PyTorch's fused attention for CPUs, which no GPU runs, is followed by a look at values.
    attention = importlib.import_module("sharpcore.backends.reference.attention_tangent")
    monkeypatch.setattr(attention, "_flash_fits", lambda *_: False)
    return made


def points(x: Tensor, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_and_moves_are_launched_again(recorders: list[Recorder], precision: str) -> None:
    f, x = prediction()
    recorded = linearize(f, x, backend="reference", precision=precision)
    for step, y in enumerate([x, *points(x, 4)]):
        if step:
            recorded.relinearize(y)
        fresh = linearize(f, y, backend="reference", precision=precision)
        for k in (1, 3):
            given = vectors(k, x, seed=step)
            for name in ("jvp", "vjp"):
                for _ in range(3):
                    product = getattr(recorded, name)(given)
                # The other linearization allocates as it goes: its first product is not recorded.
                torch.testing.assert_close(product, getattr(fresh, name)(given), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recorded.value, fresh.value, rtol=1e-4, atol=1e-5)
    # The second move is recorded; from then on moves write residuals to where they were, so that the graphs
    # of the products at the second point serve all later ones.
    assert [recorder.launches for recorder in recorders] == [*[2] * 4, *[3] * 4, 3, *[9] * 4]


def test_results_are_the_callers(recorders: list[Recorder]) -> None:
    f, x = prediction()
    lin = linearize(f, x, backend="reference")
    results = [lin.jvp(vectors(1, x, seed=seed)) for seed in (0, 0, 0, 1)]
    assert recorders[0].launches == 3
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[1], results[2])
    assert not torch.allclose(results[2], results[3])
    values = [lin.relinearize(y).value for y in points(x, 4)]
    assert all(not torch.equal(a, b) for a, b in zip(values[1:], values[:-1], strict=True))


def test_a_memory_budget_records_nothing(recorders: list[Recorder]) -> None:
    f, x = prediction()
    least = linearize(f, x, backend="reference")
    lin = linearize(f, x, backend="reference", memory_budget=int(0.6 * least.nbytes))
    assert lin._residuals.segments
    for _ in range(3):
        product = lin.jvp(vectors(1, x))
    assert not recorders
    torch.testing.assert_close(product, least.jvp(vectors(1, x)), rtol=1e-4, atol=1e-5)


def test_work_that_waits_for_the_device_goes_on_as_it_is() -> None:
    recordings = Recordings(Recorder)
    x = torch.arange(3.0)

    def work(x: Tensor) -> Tensor:
        return x * float(x.sum())

    for _ in range(4):
        assert torch.equal(recordings.run("sum", (x,), work), 3 * x)
    assert not recordings.holds("sum")
    assert recordings.refused == {"sum": "operation not permitted when stream is capturing"}


def test_instructions_are_timed_without_a_graph(recorders: list[Recorder]) -> None:
    f, x = prediction()
    lin = linearize(f, x, backend="reference")
    assert "Convolution" in lin.explain(2)
    assert not recorders


class Full(Recorder):
    """A graph for whose memory there is no room."""

    def record(self, work: Callable[[], Any]) -> Any:
        work()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")


def test_a_graph_that_does_not_fit_into_memory_is_not_needed() -> None:
    recordings = Recordings(Full)
    x = torch.arange(3.0)
    for _ in range(4):
        assert torch.equal(recordings.run("double", (x,), lambda x: 2 * x), 2 * x)
    assert not recordings.holds("double")
    assert "out of memory" in recordings.refused["double"]


@pytest.mark.parametrize("held", [1, 2])
def test_scores_where_memory_runs_out(recorders: list[Recorder], tiny_pipe: Any, held: int) -> None:
    """Samples whose products do not fit: the batch is halved until they do, and the scores stay the same.

    As on a GPU: linearizations record their work, and a product raises at any of its three kinds of call.
    """
    prompts, seeds = ["one", "two"], [42, 43]
    expected = SharpnessScorer(tiny_pipe, backend="reference")(prompts, seeds=seeds).rows
    tried: list[int] = []
    run = Recordings.run

    def short(self: Recordings, name: Any, inputs: Any, work: Callable[..., Any]) -> Any:
        samples = inputs[0].shape[-4]
        tried.append(samples)
        if samples > held:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, name, inputs, work)

    scorer, most = SharpnessScorer(tiny_pipe, backend="reference"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recordings, "run", short)
        for _ in range(2):
            found = scorer(prompts, seeds=seeds).rows
            for row, other in zip(found, expected, strict=True):
                for metric in ("score_difference_seeds", "hessian_score_difference_seeds"):
                    assert row[metric] == pytest.approx(other[metric], rel=1e-4)
            most.append(max(tried))
            tried.clear()
    assert most[0] > held >= most[1], "what was learnt is kept"
    assert any(recorder.launches for recorder in recorders)
