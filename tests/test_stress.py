"""Whole linearizations under stress: thread counts, many callers, children made by fork, extreme numbers."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
import torch.nn.functional as F
from oracles import oracle_jvp, oracle_vjp
from small_network import normal, small_network
from torch import Tensor

from sharpcore import Linearization, NonFiniteError, linearize
from sharpcore.testing.tolerance import assert_error_at_most, relative_error

WIDTH = 24
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def layers(x: Tensor) -> Tensor:
    """What the compiled kernels differentiate and nothing with weights; x [B, 24, H, W] -> [B, H W, 12]."""
    hidden = F.silu(F.group_norm(x, 4))
    tokens = hidden.flatten(2).mT
    heads = tokens.unflatten(-1, (3, 8)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    normed = F.layer_norm(tokens + mixed, (WIDTH,))
    left, gate = normed.chunk(2, dim=-1)
    return left * F.gelu(gate)


def everything(f: Callable[[Tensor], Tensor], x: Tensor, x2: Tensor) -> list[Tensor]:
    """Values and products at both points."""
    lin = linearize(f, x)
    tangents = normal(3, *x.shape, seed=5, dtype=x.dtype)
    cotangents = normal(2, *lin.value.shape, seed=6, dtype=x.dtype)
    results = [lin.value, lin.jvp(tangents), lin.jvp(tangents[:1]), lin.vjp(cotangents)]
    lin.relinearize(x2)
    return [*results, lin.value, lin.jvp(tangents), lin.vjp(cotangents)]


# Threads.


@pytest.mark.usefixtures("set_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    points = [normal(2, WIDTH, 9, 7, seed=seed, dtype=dtype) for seed in (1, 2)]
    torch.set_num_threads(1)
    expected = everything(layers, *points)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for got, want in zip(everything(layers, *points), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.usefixtures("set_threads")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-14)])
def test_network_on_one_and_two_threads(dtype: torch.dtype, bound: float) -> None:
    """PyTorch's own convolution of 1x1 rounds differently on two threads: 2.6e-7 in float32, no
    bit in float64."""
    case = networks.build("sd1", dtype)
    torch.set_num_threads(1)
    expected = everything(case.f, case.x, case.x2)
    torch.set_num_threads(2)
    for got, want in zip(everything(case.f, case.x, case.x2), expected, strict=True):
        assert relative_error(got, want) <= bound


def at_once(count: int, work: Callable[[int], None]) -> None:
    """Runs work(0) to work(count - 1) in threads that start together; raises what one of them raised."""
    start = threading.Barrier(count)
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            start.wait(60)
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def products(lin: Linearization, count: int) -> list[Tensor]:
    tangents = normal(count, *lin.x.shape, seed=count, dtype=lin.x.dtype)
    cotangents = normal(count, *lin.value.shape, seed=count, dtype=lin.x.dtype)
    return [lin.jvp(tangents), lin.vjp(cotangents)]


@pytest.mark.usefixtures("set_threads")
@pytest.mark.parametrize("shared", [True, False], ids=["one", "several"])
@pytest.mark.parametrize("network", ["sd1", "layers"])
def test_many_callers_get_the_serial_bits(network: str, shared: bool) -> None:
    """Four threads multiply with one linearization, or each with its own, with other numbers of tangents."""
    if network == "sd1":
        case = networks.build("sd1", torch.float64)
        f, points = case.f, [case.x, case.x2]
    else:
        torch.set_num_threads(2)
        f, points = layers, [normal(2, WIDTH, 9, 7, seed=seed, dtype=torch.float32) for seed in (1, 2)]
    lins = [linearize(f, points[index % 2]) for index in range(1 if shared else 4)]
    expected = [[products(lin, count) for count in (1, 2, 3)] for lin in lins]

    def work(index: int) -> None:
        which = index % len(lins)
        for turn in range(6):
            position = (turn + index) % 3
            for got, want in zip(products(lins[which], position + 1), expected[which][position], strict=True):
                assert torch.equal(got, want)

    at_once(4, work)


@pytest.mark.usefixtures("set_threads")
def test_points_move_while_others_multiply() -> None:
    """Each thread moves a linearization of its own from point to point."""
    torch.set_num_threads(2)
    points = [normal(2, WIDTH, 9, 7, seed=seed, dtype=torch.float32) for seed in (1, 2, 3)]
    expected = [products(linearize(layers, point), 2) for point in points]

    def work(index: int) -> None:
        lin = linearize(layers, points[index])
        for turn in range(6):
            which = (index + turn) % 3
            for got, want in zip(products(lin.relinearize(points[which]), 2), expected[which], strict=True):
                assert torch.equal(got, want)

    at_once(3, work)


# Processes. A child uses one thread for PyTorch's own operations, as workers of a DataLoader do: their OpenMP
# does not survive a fork.

FORK = """
import multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from small_network import normal
from test_stress import WIDTH, layers, products
from sharpcore import linearize

torch.set_num_threads(2)
x = normal(2, WIDTH, 9, 7, dtype=torch.float32)
lin = linearize(layers, x)

def digest(linearization):
    return [product.numpy().tobytes() for product in products(linearization, 3)]

expected = digest(lin)

for turn in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        same = digest(lin) == expected and digest(lin.relinearize(2 * x).relinearize(x)) == expected
        same = same and digest(linearize(layers, x)) == expected
        os._exit(0 if same else 3)
    assert digest(lin) == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert digest(lin) == expected

def work(_):
    return digest(lin)

with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
    results = pool.map_async(work, range(6)).get(timeout=120)
assert results == [expected] * 6

class Products(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.stack(products(lin, 3)[:1])

loader = torch.utils.data.DataLoader(
    Products(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
)
for batch in loader:
    assert batch[0].numpy().tobytes() == expected[0]
assert digest(lin) == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_parent_and_children_multiply() -> None:
    """Children of os.fork, of a multiprocessing pool and of a DataLoader."""
    subprocess.run([sys.executable, "-c", FORK, str(Path(__file__).parent)], check=True, timeout=300)


# Numbers.


@pytest.fixture(scope="module")
def pair() -> tuple[Linearization, Linearization]:
    """A UNet in float32, and the same in float64."""
    single, double = (networks.build("sd1", dtype) for dtype in (torch.float32, torch.float64))
    return linearize(single.f, single.x), linearize(double.f, double.x)


def vectors_for(lin: Linearization, product: str, scale: float) -> Tensor:
    shape = lin.x.shape if product == "jvp" else lin.value.shape
    return normal(2, *shape, seed=7, dtype=torch.float32) * scale


# Measured: 3e-7 to 7e-7 at 1e30. At 1e-40 a number has 16 bits, 7e-6 at best: 4e-4 for jvp, 9e-4 for vjp.
@pytest.mark.parametrize(("scale", "bound"), [(1e-40, 5e-3), (1e-30, 2e-6), (1e30, 2e-6)])
@pytest.mark.parametrize("product", ["jvp", "vjp"])
def test_vectors_near_the_ends_of_the_range(
    pair: tuple[Linearization, Linearization], product: str, scale: float, bound: float
) -> None:
    single, double = pair
    vectors = vectors_for(single, product, scale)
    got, exact = getattr(single, product)(vectors), getattr(double, product)(vectors.double())
    assert relative_error(got.double() / scale, exact / scale) <= bound


@pytest.mark.parametrize("product", ["jvp", "vjp"])
def test_overflow_names_the_product(pair: tuple[Linearization, Linearization], product: str) -> None:
    largest = torch.finfo(torch.float32).max
    with pytest.raises(NonFiniteError, match=f"^{product}: the product is not finite"):
        getattr(pair[0], product)(vectors_for(pair[0], product, 1.0).sign() * largest)


# One of each kind of layer. A norm whose SiLU is fused into it is named as the SiLU behind it.
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("conv_in.weight", "conv_in"),
        ("down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.0.nonlinearity"),
        ("down_blocks.0.resnets.0.conv1.bias", "down_blocks.0.resnets.0.conv1"),
        (f"{BLOCK}.norm1.weight", f"{BLOCK}.norm1"),
        (f"{BLOCK}.attn1.to_q.weight", f"{BLOCK}.attn1.to_q"),
        (f"{BLOCK}.ff.net.0.proj.weight", f"{BLOCK}.ff.net.0.proj"),
        ("up_blocks.0.upsamplers.0.conv.weight", "up_blocks.0.upsamplers.0.conv"),
        ("conv_norm_out.bias", "conv_act"),
    ],
)
def test_layer_with_a_bad_weight_is_named(name: str, module: str, number: float) -> None:
    case = networks.build("sd1", torch.float32)
    assert case.module is not None
    network = copy.deepcopy(case.module)
    with torch.no_grad():
        network.get_parameter(name).view(-1)[0] = number
    with pytest.raises(NonFiniteError, match=rf"\.{re.escape(module)}\)"):
        linearize(lambda x: network(x, torch.tensor(5), torch.ones(1, 5, 12)).sample, case.x)


def test_bad_point_and_bound_tensor() -> None:
    x, scale = normal(2, 3), normal(3, seed=2)
    lin = linearize(lambda x, scale: x.tanh() * scale, x, scale)
    for number in (float("nan"), float("inf"), -float("inf")):
        bad = torch.full_like(x, number)
        with pytest.raises(NonFiniteError, match=r"^x: expected finite numbers"):
            linearize(torch.tanh, bad)
        with pytest.raises(NonFiniteError, match=r"^x: expected finite numbers"):
            lin.relinearize(bad)
        with pytest.raises(NonFiniteError, match="mul"):
            lin.relinearize(x, bad[0])
        with pytest.raises(NonFiniteError, match=r"^tangents: expected finite numbers"):
            lin.jvp(bad[None])
        with pytest.raises(NonFiniteError, match=r"^cotangents: expected finite numbers"):
            lin.vjp(bad[None])
        lin.relinearize(x, scale)


# Logits of hundreds, a softmax that is nearly one-hot. Measured: at most 1.11 times autograd's error.
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_huge_logits(backend: str) -> None:
    double = small_network()
    with torch.no_grad():
        double.qkv.weight[: 2 * 4] *= 30
    single = copy.deepcopy(double).float()
    x = normal(2, 3, 5, 4, dtype=torch.float32)
    tangents, cotangents = (normal(3, 2, 3, 5, 4, seed=seed, dtype=torch.float32) for seed in (2, 3))
    lin = linearize(single, x, backend=backend)
    for got, plain, exact in [
        (
            lin.jvp(tangents),
            oracle_jvp(single, x, tangents),
            oracle_jvp(double, x.double(), tangents.double()),
        ),
        (
            lin.vjp(cotangents),
            oracle_vjp(single, x, cotangents),
            oracle_vjp(double, x.double(), cotangents.double()),
        ),
    ]:
        assert_error_at_most(relative_error(got, exact), relative_error(plain, exact), factor=2.0, floor=1e-6)
