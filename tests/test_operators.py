"""Curvature operators against dense Jacobians: products, transposes, scipy, asymmetry, batches, errors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import oracle_vjp
from scipy.sparse.linalg import eigsh, svds

from sharpcore import (
    Hessian,
    HessianDifference,
    InvalidInput,
    MissingDependency,
    NonFiniteError,
    ScoreFunction,
    ScoreJacobian,
    linearize,
)
from sharpcore.conditioning import encode_prompts, encode_unconditional
from sharpcore.testing import relative_error
from sharpcore.testing.analytic import GaussianMixtureScoreNetwork

DATA = Path(__file__).parent / "data" / "tiny-sd-eps"
ALPHA, SIGMA = 0.8, 0.6
DTYPES = [torch.float64, torch.float32]
# Relative errors of products: measured 6e-16 and 2e-6.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def mixture(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64) / 4
    return GaussianMixtureScoreNetwork(
        torch.tensor([0.5, 0.3, 0.2], dtype=dtype),
        torch.randn(3, 6, generator=generator, dtype=torch.float64).to(dtype),
        (factors @ factors.mT).to(dtype),
        alpha=ALPHA,
        sigma=SIGMA,
    )


def mixture_score(network, condition=None):
    return ScoreFunction(
        network,
        prediction_type="epsilon",
        alpha=ALPHA,
        sigma=SIGMA,
        timestep=0,
        conditioning={} if condition is None else {"condition": condition},
    )


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Lopsided(torch.nn.Module):
    """A network on [B, 2, 3] whose Jacobian is dense, far from symmetric, and another for each sample."""

    def forward(self, x):
        weight = torch.linspace(-1, 1, 36, dtype=x.dtype, device=x.device).reshape(6, 6)
        return torch.tanh(x.flatten(1) @ weight + torch.linspace(0, 1, 6, dtype=x.dtype)).reshape(x.shape)


def dense_jacobian(f, x):
    """[n, n] by autograd, in float64 or whatever x has."""
    n = x.numel()
    return torch.autograd.functional.jacobian(f, x).reshape(n, n)


OPERATORS = ["jacobian", "hessian", "difference", "difference.jacobian"]


def make_operator(name, dtype=torch.float64, samples=2):
    """An operator on x [samples, 2, 3] and the dense matrix that it should be, in float64."""
    x = random(samples, 2, 3, dtype=dtype)

    def other(x):
        return torch.sin(3 * Lopsided()(x.flip(2)))

    lin, second = linearize(Lopsided(), x), linearize(other, x)
    first_dense, second_dense = dense_jacobian(Lopsided(), x.double()), dense_jacobian(other, x.double())

    def symmetric(matrix):
        return (matrix + matrix.T) / 2

    return {
        "jacobian": lambda: (ScoreJacobian(lin), first_dense),
        "hessian": lambda: (Hessian(lin), symmetric(first_dense)),
        "difference": lambda: (HessianDifference(lin, second), symmetric(first_dense - second_dense)),
        "difference.jacobian": lambda: (HessianDifference(lin, second).jacobian, first_dense - second_dense),
    }[name]()


# --- products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_products_in_every_shape(name, dtype):
    operator, dense = make_operator(name, dtype)
    n = 12
    assert operator.shape == (n, n)
    assert operator.dtype is dtype
    assert operator.device == torch.device("cpu")
    rows = random(5, n, seed=2, dtype=dtype)
    for matrix, applied in ((operator, dense), (operator.T, dense.T)):
        expected = rows.double() @ applied.T
        for vectors, result in (
            (rows[0], expected[0]),
            (rows[0].reshape(2, 2, 3), expected[0].reshape(2, 2, 3)),
            (rows, expected),
            (rows.reshape(5, 2, 2, 3), expected.reshape(5, 2, 2, 3)),
            (rows.T, expected.T),
            (rows[:1], expected[:1]),
            (rows[:1].T, expected[:1].T),
        ):
            out = matrix @ vectors
            assert out.shape == vectors.shape
            assert out.dtype is dtype
            assert relative_error(out, result) < TOLERANCE[dtype]


def test_as_many_vectors_as_entries_are_rows():
    operator, dense = make_operator("jacobian")
    assert relative_error(operator @ torch.eye(12, dtype=torch.float64), dense.T) < 1e-12


def test_transposes():
    for name in OPERATORS:
        operator, dense = make_operator(name)
        assert operator.T.shape == operator.shape
        assert operator.T.dtype is operator.dtype
        assert operator.T.T is operator
        symmetric = bool(torch.equal(dense, dense.T))
        assert symmetric == (name in ("hessian", "difference"))
        assert (operator.T is operator) == symmetric


def test_a_batch_is_block_diagonal():
    x = random(3, 2, 3)
    hessian = Hessian(linearize(Lopsided(), x))
    vectors = random(4, 3, 2, 3, seed=2)
    together = hessian @ vectors
    for sample in range(3):
        alone = Hessian(linearize(Lopsided(), x[sample : sample + 1]))
        assert relative_error(together[:, sample], (alone @ vectors[:, sample : sample + 1])[:, 0]) < 1e-12
    dense = (hessian @ torch.eye(18, dtype=torch.float64)).reshape(3, 6, 3, 6)
    for i in range(3):
        for j in range(3):
            assert bool(dense[i, :, j].any()) == (i == j)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixture_hessians_in_closed_form(dtype):
    """The symmetric part of the network's Jacobian is the Hessian of log p; the difference likewise."""
    network, exact = mixture(dtype), mixture()
    x = random(3, 6, dtype=dtype)
    condition = torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=dtype)
    conditional = linearize(mixture_score(network, condition), x)
    unconditional = linearize(mixture_score(network), x)
    vectors = random(2, 3, 6, seed=2, dtype=dtype)
    with_condition = exact.hessian(x.double(), condition=condition.double())
    without = exact.hessian(x.double())
    for operator, hessians in (
        (Hessian(conditional), with_condition),
        (Hessian(unconditional), without),
        (HessianDifference(conditional, unconditional), with_condition - without),
    ):
        expected = torch.einsum("bij,kbj->kbi", hessians, vectors.double())
        # Measured up to 2e-14 (float64) and 3e-6 (float32), for the difference.
        assert relative_error(operator @ vectors, expected) < (1e-10 if dtype is torch.float64 else 1e-5)
    assert Hessian(conditional).asymmetry().value < (1e-12 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unet_against_its_dense_jacobian(fresh_pipe, dtype):
    """A latent of 4 x 4 x 4: 64 entries, the whole matrix by autograd in float64, one row a sample."""
    n, prompt = 64, "a bold slanted handwritten zero by hounard"
    x = random(1, 4, 4, 4)
    fresh_pipe.unet.double()
    dense = {}
    for unconditional in (False, True):
        score = ScoreFunction.from_pipeline(fresh_pipe, [prompt] * n, step=10, unconditional=unconditional)
        dense[unconditional] = oracle_vjp(
            score, x.repeat(n, 1, 1, 1), torch.eye(n).double().reshape(1, n, 4, 4, 4)
        )
    dense = {which: matrix.reshape(n, n) for which, matrix in dense.items()}
    fresh_pipe.unet.to(dtype)
    conditional, unconditional = (
        linearize(ScoreFunction.from_pipeline(fresh_pipe, prompt, step=10, unconditional=which), x.to(dtype))
        for which in (False, True)
    )
    identity = torch.eye(n, dtype=dtype)
    # Measured up to 9e-15 (float64; text embeddings are float32 in both) and 5e-6 (float32), for the
    # difference.
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    difference = dense[False] - dense[True]
    for operator, expected in (
        (ScoreJacobian(conditional), dense[False]),
        (ScoreJacobian(conditional).T, dense[False].T),
        (Hessian(conditional), (dense[False] + dense[False].T) / 2),
        (HessianDifference(conditional, unconditional), (difference + difference.T) / 2),
        (HessianDifference(conditional, unconditional).jacobian, difference),
    ):
        assert relative_error((operator @ identity).T, expected) < tolerance


# --- scipy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_scipy_operator_is_the_matrix(name, dtype):
    operator, dense = make_operator(name, dtype)
    linear = operator.to_scipy()
    assert linear.shape == (12, 12)
    assert linear.dtype == (np.float64 if dtype is torch.float64 else np.float32)
    block = random(12, 3, seed=2, dtype=dtype).numpy()
    for found, expected in (
        (linear @ block[:, 0], dense.numpy() @ block[:, 0]),
        (linear @ block[:, :1], dense.numpy() @ block[:, :1]),
        (linear @ block, dense.numpy() @ block),
        (linear.T @ block[:, 0], dense.numpy().T @ block[:, 0]),
        (linear.H @ block, dense.numpy().T @ block),
    ):
        assert found.shape == expected.shape
        assert found.dtype == linear.dtype
        assert relative_error(torch.tensor(found), torch.tensor(expected)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_eigsh_and_svds(dtype):
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    for name in ("hessian", "difference"):
        operator, dense = make_operator(name, dtype, samples=3)
        exact = torch.linalg.eigvalsh(dense).numpy()
        for which, expected in (("LA", exact[-3:]), ("SA", exact[:3])):
            values, vectors = eigsh(operator.to_scipy(), k=3, which=which, v0=np.ones(18))
            np.testing.assert_allclose(
                np.sort(values), expected, rtol=0, atol=tolerance * np.abs(exact).max()
            )
            residual = operator.to_scipy() @ vectors - vectors * values
            assert np.abs(residual).max() < 10 * tolerance * np.abs(exact).max()
    for name in ("jacobian", "difference.jacobian"):
        operator, dense = make_operator(name, dtype, samples=3)
        exact = torch.linalg.svdvals(dense).numpy()
        found = svds(operator.to_scipy(), k=3, return_singular_vectors=False, v0=np.ones(18))
        np.testing.assert_allclose(np.sort(found)[::-1], exact[:3], rtol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_to_scipy(dtype):
    operator, dense = make_operator("jacobian", dtype)
    linear = operator.to_scipy()
    assert linear.dtype == np.float32
    vector = random(12, seed=2).numpy()
    found = linear @ vector
    assert found.dtype == np.float32
    # Measured 6e-3 (bfloat16) and 9e-4 (float16).
    assert relative_error(torch.tensor(found), dense @ torch.tensor(vector)) < 3e-2


def test_scipy_missing(monkeypatch):
    operator, _ = make_operator("hessian")
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(MissingDependency, match="pip install scipy"):
        operator.to_scipy()


@pytest.mark.parametrize("key", ["non7_step25"])
def test_extremal_eigenvalues_of_the_trained_network(fresh_pipe, key):
    """Three at each end of the stored spectrum (float64, full Jacobian by torch.func.jvp)."""
    stored = np.load(DATA / "spectra.npz")
    fresh_pipe.unet.double()
    score = ScoreFunction.from_pipeline(
        fresh_pipe, str(stored[f"{key}_prompt"]), timestep=int(stored[f"{key}_t"])
    )
    lin = linearize(score, torch.from_numpy(stored[f"{key}_x"]))
    # Measured 1e-9: float32 text embeddings, rounded otherwise where the spectra were made.
    assert relative_error(lin.value, torch.from_numpy(stored[f"{key}_score"])) < 1e-7
    hessian = Hessian(lin)
    exact = stored[f"{key}_eig"]
    start = np.random.default_rng(0).standard_normal(1024)
    values = eigsh(hessian.to_scipy(), k=6, which="BE", tol=1e-6, v0=start, return_eigenvectors=False)
    # 1e-6 is promised; measured 6e-9.
    np.testing.assert_allclose(np.sort(values), np.concatenate([exact[:3], exact[-3:]]), rtol=1e-6)
    asymmetry = hessian.asymmetry(probes=16)
    assert asymmetry.standard_error < 0.02
    assert abs(asymmetry.value - float(stored[f"{key}_asym"])) < 4 * asymmetry.standard_error


# --- asymmetry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_asymmetry_against_the_dense_matrix(name):
    operator, dense = make_operator(name)
    if name == "hessian":
        dense = make_operator("jacobian")[1]
    elif name == "difference":
        dense = make_operator("difference.jacobian")[1]
    exact = float((dense - dense.T).norm() / dense.norm())
    assert exact > 0.1
    found = operator.asymmetry(400)
    assert found.probes == 400
    assert 0 < found.standard_error < 0.04
    # The estimate is random, its seed is fixed.
    assert abs(found.value - exact) < 3 * found.standard_error
    assert operator.asymmetry(25) != operator.asymmetry(25, seed=1)
    assert operator.asymmetry(25) == operator.asymmetry(25)
    # It falls as one over the root of the number of probes: by 4 here, within its own noise.
    assert 2 < operator.asymmetry(25).standard_error / found.standard_error < 8


def test_the_standard_error_is_the_spread_of_the_estimates():
    operator, _ = make_operator("jacobian")
    found = [operator.asymmetry(32, seed=seed) for seed in range(60)]
    spread = float(torch.tensor([estimate.value for estimate in found]).std())
    claimed = float(torch.tensor([estimate.standard_error for estimate in found]).mean())
    # Measured 0.98; the spread of 60 estimates is itself uncertain by a tenth.
    assert 0.7 < claimed / spread < 1.4


def test_asymmetry_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    make_operator("hessian")[0].asymmetry(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_asymmetry_of_nothing_and_of_a_symmetric_network():
    zero = Hessian(linearize(lambda x: x * 0, random(1, 3)))
    assert zero.asymmetry().value == 0
    assert zero.asymmetry().standard_error == 0
    diagonal = Hessian(linearize(torch.sin, random(1, 3)))
    assert diagonal.asymmetry().value == 0


@pytest.mark.parametrize("probes", [0, 1, -3, True, 2.0, None])
def test_asymmetry_needs_two_probes(probes):
    with pytest.raises(InvalidInput, match=r"^probes: "):
        make_operator("hessian")[0].asymmetry(probes)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "shape", [(), (5,), (2, 3), (5, 7), (2, 3, 2), (1, 1, 2, 2, 3), (0, 12), (12, 0), (0, 2, 2, 3)]
)
def test_vectors_of_a_wrong_shape(name, shape):
    operator, _ = make_operator(name)
    with pytest.raises(InvalidInput, match=r"(vectors|tangents): expected"):
        operator @ torch.zeros(shape, dtype=torch.float64)


def test_vectors_of_a_wrong_kind():
    operator, _ = make_operator("hessian")
    with pytest.raises(InvalidInput, match="float64"):
        operator @ torch.zeros(12)
    with pytest.raises(InvalidInput, match=r"^vectors: expected a tensor"):
        operator @ np.zeros(12)
    with pytest.raises(InvalidInput, match="meta"):
        operator @ torch.zeros(12, dtype=torch.float64, device="meta")
    with pytest.raises(NonFiniteError):
        operator @ torch.full((12,), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize("operator", [ScoreJacobian, Hessian])
def test_only_linearizations_of_scores(operator):
    with pytest.raises(InvalidInput, match=r"^linearization: expected a Linearization"):
        operator(torch.sin)
    with pytest.raises(InvalidInput, match=r"^linearization: .* shape and dtype of x"):
        operator(linearize(lambda x: x[:, :2], random(1, 3)))
    with pytest.raises(InvalidInput, match=r"^linearization: .* shape and dtype of x"):
        operator(linearize(lambda x: x.float(), random(1, 3)))


def test_a_difference_needs_one_point():
    here, there = linearize(torch.sin, random(1, 3)), linearize(torch.sin, random(1, 3, seed=2))
    other_shape = linearize(torch.sin, random(2, 3))
    other_dtype = linearize(torch.sin, random(1, 3).round().float())
    for first, second in (
        (here, there),
        (here, other_shape),
        (linearize(torch.sin, random(1, 3).round()), other_dtype),
    ):
        with pytest.raises(InvalidInput, match="same x"):
            HessianDifference(first, second)


def test_the_pair_of_branches_of_a_pipeline(tiny_pipe):
    """H_D s_D by operators at one latent is what the metric is made of: the unsymmetrized product."""
    from sharpcore import SharpnessScorer

    prompt = "a bold slanted handwritten zero by hounard"
    x = torch.randn((1, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(42))
    lins = [
        linearize(ScoreFunction.from_scheduler(tiny_pipe.unet, tiny_pipe.scheduler, 981, condition), x)
        for condition in (encode_prompts(tiny_pipe, [prompt]), encode_unconditional(tiny_pipe))
    ]
    difference = lins[0].value - lins[1].value
    row = SharpnessScorer(tiny_pipe)([prompt], seeds=1, squared=False).rows[0]
    product = HessianDifference(*lins).jacobian @ difference
    # Measured 5e-8 (float32).
    assert row["score_difference"] == pytest.approx(float(difference.norm()), rel=1e-5)
    assert row["hessian_score_difference"] == pytest.approx(float(product.norm()), rel=2e-5)
