"""Triton kernels of attention: in the interpreter against float64, and compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import aot
import pytest
import torch
from attention_cases import ACTIVE, Case, banded_mask, check, check_forward, check_half
from interpreted import DEVICE, needs_triton
from kernel_checks import poisoned_memory
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import relative_error

pytestmark = needs_triton

HALVES = [torch.bfloat16, torch.float16]
# Rows, keys, head size, width of the values, tangents: one piece and two, the last block whole and not.
SIZES = [
    (1, 7, 40, 40, 1),
    (7, 1, 8, 24, 2),
    (18, 20, 59, 80, 3),
    (18, 20, 160, 111, 1),
    (32, 64, 64, 40, 1),
]


@pytest.fixture
def kernels() -> Any:
    """The wrappers of the Triton kernels."""
    from sharpcore.backends.cuda import KERNELS

    return SimpleNamespace(**KERNELS)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def make(*sizes: int, **options: Any) -> Case:
    rows, keys, width, values, count = sizes
    return Case(rows, keys, width, values, count, **{"batch": 1, "device": DEVICE, **options})


def surrounded(tensor: Tensor) -> Tensor:
    """The same values, a part of a tensor of NaN that goes on in rows, columns and heads."""
    sizes = [size + 3 if axis >= tensor.ndim - 3 else size for axis, size in enumerate(tensor.shape)]
    sizes[-3], sizes[-2] = sizes[-2], sizes[-3]
    view = tensor.new_full(sizes, float("nan")).transpose(-2, -3)
    view = view[..., : tensor.shape[-3], : tensor.shape[-2], : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def surround(case: Case) -> Case:
    """The case with NaN around all its operands."""
    for name, tensor in case.tensors.items():
        if name == "lse":
            case.tensors[name] = surrounded(tensor.unsqueeze(-1)).squeeze(-1)
        elif tensor is not None:
            case.tensors[name] = surrounded(tensor)
    return case


@pytest.mark.parametrize("sizes", SIZES)
def test_float32_over_sizes(sizes: tuple[int, ...], kernels: Any) -> None:
    case = surround(make(*sizes, dtype=torch.float32))
    check_forward(case, kernels)
    check(case, backend=kernels)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES[:4])
def test_half_precision_over_sizes(sizes: tuple[int, ...], dtype: torch.dtype, kernels: Any) -> None:
    check_half(surround(make(*sizes, dtype=dtype)), backend=kernels)


@pytest.mark.parametrize("active", ACTIVE)
def test_every_set_of_operands(active: tuple[bool, bool, bool], kernels: Any) -> None:
    check(surround(make(9, 20, 8, 8, 2, active=active, dtype=torch.float32)), backend=kernels)


def test_many_tangents_of_the_queries_alone(kernels: Any) -> None:
    check(make(9, 20, 16, 16, 8, heads=1, active=(True, False, False), dtype=torch.float32), backend=kernels)


@pytest.mark.parametrize("part", [(Ellipsis,), (slice(None), slice(None), slice(0, 1)), (0, 0)])
def test_masks(part: tuple[Any, ...], kernels: Any) -> None:
    """Of every shape, with a row that sees no key, and one that sees none in the first block of keys."""
    mask = banded_mask(9, 40, 2)
    mask[..., 4, :] = float("-inf")
    mask[..., 5, :36] = float("-inf")
    case = surround(make(9, 40, 8, 8, 2, mask=mask[part], dtype=torch.float32))
    check_forward(case, kernels)
    check(case, backend=kernels)
    if mask[part].shape[-2] == 9:
        out, lse = case.forward(kernels)
        assert bool((out[..., 4, :] == 0).all())
        assert bool((lse[..., 4] == float("-inf")).all())
        assert bool((case.tangent(kernels)[..., 4, :] == 0).all())


def test_masks_of_either_dtype(kernels: Any) -> None:
    mask = banded_mask(9, 20).bfloat16()
    mask[..., 5, :] = torch.finfo(torch.bfloat16).min
    case = make(9, 20, 8, 8, 2, mask=mask.double(), dtype=torch.bfloat16)
    check_half(case, backend=kernels)
    t, wide = case.tensors, mask.float().to(DEVICE)
    o, lse = kernels.attention_forward(*case.qkv, mask=wide, scale=case.scale)
    assert torch.equal(o, case.forward(kernels)[0])
    assert torch.equal(lse, case.forward(kernels)[1])
    operands = [t[name] for name in ("q", "k", "v", "out", "lse", "dq", "dk", "dv")]
    moved = kernels.attention_tangent(*operands, mask=wide, scale=case.scale)
    assert torch.equal(moved, case.tangent(kernels))


@pytest.mark.parametrize("gain", [1e-22, 30.0])
def test_huge_and_tiny_logits(gain: float, kernels: Any) -> None:
    # As on the CPU: nearly all of dS cancels where logits are huge.
    check(
        make(9, 40, 16, 16, 1, gain=gain, dtype=torch.float32),
        floor=2.5e-4 if gain > 1 else 0.0,
        backend=kernels,
    )


def test_small_tangents_in_float16(kernels: Any) -> None:
    """Products of probabilities and tangents that are subnormal in float16 keep their digits."""
    case = make(16, 256, 8, 8, 1, dtype=torch.float16, active=(True, False, False))
    case.tensors["dq"] = case.tensors["dq"] * 1e-2
    truth = case.as_float64().tangent("reference")
    # Measured 4e-4.
    assert relative_error(case.tangent(kernels), truth) < 1e-3


def test_tf32_is_asked_for(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sharpcore.kernels import attention_tangent as triton_kernels

    asked = []
    run = triton_kernels.run

    def note(kernel: Any, grid: Any, arguments: Any, *rest: Any) -> None:
        asked.append(arguments.get("PRECISION"))
        run(kernel, grid, arguments, *rest)

    monkeypatch.setattr(triton_kernels, "run", note)
    case = make(3, 5, 8, 8, 1, dtype=torch.float32)
    t = case.tensors
    primal = [t[name] for name in ("q", "k", "v", "out", "lse")]
    tangents = [t[name] for name in ("dq", "dk", "dv")]
    for tf32 in (True, False):
        options: dict[str, Any] = {"mask": None, "scale": case.scale, "tf32": tf32}
        kernels.attention_forward(*case.qkv, **options)
        kernels.attention_tangent(*primal, *tangents, **options)
        kernels.attention_adjoint(*primal, case.cotangent(), **options, needed=case.active)
    assert [precision for precision in asked if precision] == ["tf32"] * 4 + ["tf32x3"] * 4


@pytest.mark.parametrize("choice", range(1, 7))
def test_configurations(choice: int, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those among which the tuner chooses: larger blocks, several tangents in a program."""
    from sharpcore.kernels import attention_tangent as triton_kernels

    run, ran = triton_kernels.run, set()

    def run_that(kernel: Any, grid: Any, arguments: Any, configurations: Any, key: Any) -> None:
        ran.add(kernel.fn.__name__)
        run(kernel, grid, arguments, [configurations[min(choice, len(configurations) - 1)]], key)

    monkeypatch.setattr(triton_kernels, "run", run_that)
    case = make(18, 40, 40, 24, 3, dtype=torch.float16, heads=1)
    check_half(case, backend=kernels)
    assert len(ran) == 5


@pytest.mark.parametrize("layout", ["part", "columns"])
def test_out_takes_the_results(layout: str, kernels: Any) -> None:
    def empty(like: Tensor) -> Tensor:
        shape = like.shape
        if layout == "part":
            memory = like.new_empty((*shape[:-1], shape[-1] + 5))[..., 2 : 2 + shape[-1]]
        else:
            memory = like.new_empty((*shape[:-2], shape[-1], shape[-2])).mT
        return memory.fill_(float("nan"))

    case = make(9, 20, 12, 20, 3, dtype=torch.float32, active=(True, False, True))
    t, cotangent = case.tensors, case.cotangent()
    expected = (*case.forward(kernels), case.tangent(kernels), *case.adjoint(kernels, cotangent))
    options: dict[str, Any] = {"mask": None, "scale": case.scale}
    forward = (empty(expected[0]), empty(expected[1].unsqueeze(-1)).squeeze(-1))
    primal = [t[name] for name in ("q", "k", "v", "out", "lse")]
    tangents = [t[name] for name in ("dq", "dk", "dv")]
    given = kernels.attention_forward(*case.qkv, **options, out=forward)
    assert given[0] is forward[0]
    assert given[1] is forward[1]
    moved = empty(expected[2])
    assert kernels.attention_tangent(*primal, *tangents, **options, out=moved) is moved
    targets = (empty(expected[3]), None, empty(expected[5]))
    grads = kernels.attention_adjoint(*primal, cotangent, **options, needed=case.active, out=targets)
    assert all(grad is target for grad, target in zip(grads, targets, strict=True))
    for ours, result in zip((*forward, moved, *targets), expected, strict=True):
        assert (ours is None) == (result is None)
        assert ours is None or torch.equal(ours, result)
    with pytest.raises(InvalidInput, match="out: expected shape"):
        kernels.attention_tangent(*primal, *tangents, **options, out=moved[..., :-1])


def test_layout_of_operands_does_not_matter(kernels: Any) -> None:
    case = make(9, 20, 16, 16, 3, dtype=torch.float32)
    expected = case.tangent(kernels)
    assert expected.transpose(-2, -3).is_contiguous()
    strided = replace(case, tensors={})
    for name, tensor in case.tensors.items():
        strided.tensors[name] = None if tensor is None else tensor.contiguous()
    strided.tensors["dk"] = strided.tensors["dk"].mT.contiguous().mT
    assert torch.equal(strided.tangent(kernels), expected)
    strided.tensors["dq"] = case.tensors["dq"][:1].expand(3, -1, -1, -1, -1)
    assert torch.equal(strided.tangent(kernels)[0], expected[0])


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 2)])
def test_other_leading_axes(leading: tuple[int, ...], kernels: Any) -> None:
    case = make(9, 20, 8, 8, 2, batch=2, dtype=torch.float32)
    flat = replace(case, tensors={})
    count = 1
    for size in leading:
        count *= size
    for name, tensor in case.tensors.items():
        rows = 1 if name == "lse" else 2
        axes = tensor.ndim - rows - 2
        merged = tensor.flatten(axes, axes + 1).narrow(axes, 0, count)
        flat.tensors[name] = merged.reshape(*tensor.shape[:axes], *leading, *tensor.shape[-rows:])
    for ours, whole in zip(flat.forward(kernels), case.forward(kernels), strict=True):
        assert torch.equal(ours, whole.flatten(0, 1)[:count].reshape(ours.shape))
    whole = case.tangent(kernels).flatten(1, 2)[:, :count]
    assert torch.equal(flat.tangent(kernels), whole.reshape(2, *leading, 9, 8))


@pytest.mark.parametrize(("count", "length", "keys"), [(0, 9, 20), (2, 0, 20), (2, 9, 0)])
def test_empty(count: int, length: int, keys: int, kernels: Any) -> None:
    case = make(length, keys, 8, 8, count, dtype=torch.float32)
    out, lse = case.forward(kernels)
    assert out.shape == case.tensors["out"].shape
    if keys == 0:
        assert bool((out == 0).all())
        assert bool((lse == float("-inf")).all())
    moved = case.tangent(kernels)
    assert moved.shape == (count, *out.shape)
    assert bool((moved == 0).all())
    for grad, primal in zip(case.adjoint(kernels, case.cotangent()), case.qkv, strict=True):
        assert grad is not None
        assert grad.shape == (count, *primal.shape)
        assert bool((grad == 0).all())


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse", "dq", "dk", "dv"])
def test_nan_goes_on(name: str, kernels: Any) -> None:
    """NaN in one head of an operand comes out there and nowhere else."""
    case = make(9, 20, 8, 8, 2, dtype=torch.float32)
    case.tensors[name][..., 0, 1, 3, 2 if name != "lse" else ...] = float("nan")
    results = [case.tangent(kernels)]
    if name not in ("dq", "dk", "dv"):
        results += [grad for grad in case.adjoint(kernels, case.cotangent()) if grad is not None]
    if name in ("q", "k", "v"):
        results += [result.unsqueeze(0) for result in case.forward(kernels)]
    assert bool(results[0].isnan().any())
    for result in results:
        bad = result.isnan()
        bad[:, 0, 1] = False
        assert not bool(bad.any())


def test_what_the_kernels_cannot_do_is_left_to_the_reference(kernels: Any) -> None:
    double = make(9, 20, 8, 8, 2)
    assert relative_error(double.tangent(kernels), double.tangent("reference")) < 1e-14
    wide = make(3, 5, 300, 8, 1, dtype=torch.float32)
    assert relative_error(wide.tangent(kernels), wide.as_float64().tangent("reference")) < 1e-5
    recorded = make(9, 20, 8, 8, 2, dtype=torch.float32)
    recorded.tensors["dq"].requires_grad_()
    assert recorded.tangent(kernels).requires_grad


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("k", (1, 2, 20, 7)),
        ("v", (1, 2, 19, 8)),
        ("o", (1, 2, 9, 7)),
        ("lse", (1, 2, 8)),
        ("dq", (2, 1, 2, 8, 8)),
        ("dk", (3, 1, 2, 20, 8)),
    ],
)
def test_wrong_shapes_are_refused(name: str, wrong: tuple[int, ...], kernels: Any) -> None:
    case = make(9, 20, 8, 8, 2, dtype=torch.float32)
    case.tensors["out" if name == "o" else name] = torch.ones(wrong, device=DEVICE)
    with pytest.raises(InvalidInput, match=f"^{name}: "):
        case.tangent(kernels)
    if name not in ("dq", "dk"):
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            case.adjoint(kernels, case.cotangent())


def test_wrong_masks_and_cotangents_are_refused(kernels: Any) -> None:
    case = make(9, 20, 8, 8, 2, dtype=torch.float32)
    with pytest.raises(InvalidInput, match="cotangent"):
        case.adjoint(kernels, case.cotangent()[..., :7])
    case.mask = torch.zeros(9, 19)
    with pytest.raises(InvalidInput, match="mask"):
        case.tangent(kernels)


def requests(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    architecture: int,
    *,
    configuration: int = 0,
    active: tuple[bool, bool, bool] = (True, True, True),
    masked: bool = False,
    precision: str = "tf32x3",
    of: str = "tangent",
) -> list[aot.Request]:
    """What is compiled for rows, keys, head size and tangents, of 8 heads in a batch of 2."""
    from sharpcore.kernels import attention_tangent as triton_kernels

    rows, keys, width, count = sizes

    def heads(length: int, *leading: int) -> Tensor:
        return torch.empty((*leading, 2, length, 8, width), dtype=dtype, device="meta").transpose(-2, -3)

    mask = (
        torch.empty((2, 1, 1, keys), dtype=dtype, device="meta").expand(2, 8, rows, keys) if masked else None
    )
    options: dict[str, Any] = {"mask": mask, "scale": 0.125, "precision": precision}
    primal = (heads(rows), heads(keys), heads(keys), heads(rows), torch.empty((2, 8, rows), device="meta"))
    vectors = [
        heads(n, count) if given else None for n, given in zip((rows, keys, keys), active, strict=True)
    ]
    launches = {
        "forward": lambda: triton_kernels.attention_forward(*primal, **options),
        "tangent": lambda: triton_kernels.attention_tangent(*primal, *vectors, heads(rows, count), **options),
        "adjoint": lambda: triton_kernels.attention_adjoint(*primal, heads(rows, count), *vectors, **options),
    }
    return aot.recorded(triton_kernels, launches[of], architecture, configuration=configuration)


# Rows and keys of Stable Diffusion's layers, by the width of their heads.
LAYERS = {40: 4096, 64: 9216, 80: 1024, 128: 1024, 160: 256}
KINDS = ("forward", "tangent", "cross", "adjoint")
PRECISIONS = {
    "float32": (torch.float32, "tf32x3"),
    "bfloat16": (torch.bfloat16, "tf32x3"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "tf32x3"),
}


def layer(
    width: int, kind: str, precision: str, architecture: int, masked: bool, configuration: int = 0
) -> list[aot.Request]:
    """The kernels of one layer: self-attention, or ("cross") tangents of the queries over 77 keys."""
    dtype, products = PRECISIONS[precision]
    cross = kind == "cross"
    return requests(
        (LAYERS[width], 77 if cross else LAYERS[width], width, 8),
        dtype,
        architecture,
        configuration=configuration,
        active=(True, not cross, not cross),
        masked=masked,
        precision=products,
        of="tangent" if cross else kind,
    )


# No configuration was found that holds all of it: three TF32 products need each operand twice.
SPILLED = 64  # bytes of a thread; measured: 16 to 56


def spills(request: aot.Request) -> bool:
    """Whether registers are known not to suffice: float32 tangents of wide heads on 9.0."""
    return (
        request.kernel == "tangent_kernel"
        and request.types["q"] == "*fp32"
        and request.constants["PRECISION"] == "tf32x3"
        and request.constants["WIDTH"] > 64
        and request.architecture == 90
    )


def safe() -> list[aot.Request]:
    """What runs where nothing is tuned. Each kernel at each width; precisions, cards and masks in turn, so
    that each meets each kernel and each width; and what needs most registers."""
    made = []
    for (n, width), (m, kind) in product(enumerate(LAYERS), enumerate(KINDS)):
        precision = list(PRECISIONS)[(n + m) % 4]
        made += layer(width, kind, precision, (80, 90)[(n + m // 2) % 2], (n // 2 + m) % 2 == 1)
    return made + layer(80, "adjoint", "float32", 80, True) + layer(128, "tangent", "float32", 90, True)


def chosen() -> list[aot.Request]:
    """Some of those among which the tuner chooses."""
    cases = ((40, "tangent", 4), (64, "forward", 2), (160, "tangent", 1))
    return [r for width, kind, n in cases for r in layer(width, kind, "bfloat16", 80, False, n)]


def assert_compiled(wanted: list[aot.Request], safe: bool) -> None:
    """No spills that are not known, tensor cores, and shared memory that the card has; if `safe`, that every
    card has."""
    wanted = list({str(request): request for request in wanted}.values())
    for request, compiled in zip(wanted, aot.compile_all(wanted), strict=True):
        most = SPILLED if spills(request) else 0
        compiled.assert_fits(86 if safe else request.architecture, request, spilled=most)
        assert compiled.uses_tensor_cores == (request.kernel != "along_kernel"), request


def test_compiled_ahead_of_time() -> None:
    """Layers of Stable Diffusion on data-centre cards."""
    assert_compiled(safe(), safe=True)
    assert_compiled(chosen(), safe=False)


@pytest.mark.sweep
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", LAYERS)
def test_every_configuration_compiled_ahead_of_time(width: int, kind: str, precision: str) -> None:
    for choice in range(12):
        wanted = [
            request
            for architecture, masked in product((80, 90), (False, True))
            for request in layer(width, kind, precision, architecture, masked, choice)
        ]
        assert_compiled(wanted, safe=choice == 0)
