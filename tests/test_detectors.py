"""Each detector against a formula of a few lines in plain PyTorch, and what it says that it costs."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from pipelines import latent, load_tiny_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpcore import InvalidInput, SharpnessScorer
from sharpcore.detect import DETECTORS, Cost, cost_of, detectors, make_detectors
from sharpcore.krylov import probes
from sharpcore.linearization import Linearization

PROMPTS = (
    "a thin upright handwritten zero by jackova",
    "a bold slanted handwritten three",
    "a thin slanted handwritten seven by nobody",
)
SHAPE = (4, 8, 8)
D = 256


@pytest.fixture(scope="module")
def pipe(sd2_pipe):
    """v-prediction, 256 entries, in float64."""
    pipe = copy.copy(sd2_pipe)
    pipe.unet = copy.deepcopy(sd2_pipe.unet).double()
    return pipe


class Oracle:
    """The scores of one prompt at one seed's first state, by the formula, and what autograd makes of them."""

    def __init__(self, pipe, prompt, seed, step=0, steps=50, guidance=7.5):
        self.pipe = pipe
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.scheduler.set_timesteps(steps)
        pair = pipe.encode_prompt(prompt, "cpu", 1, True)
        self.prompt, self.empty = (part.double() for part in pair)
        x = latent(seed, SHAPE).double()
        for t in self.scheduler.timesteps[:step]:
            abar, before = self.abar(t), self.abar(t - self.scheduler.config.num_train_timesteps // steps)
            v_c, v_u = self.v(x, t, self.prompt), self.v(x, t, self.empty)
            v = v_u + guidance * (v_c - v_u)
            x0 = abar**0.5 * x - (1 - abar) ** 0.5 * v
            x = before**0.5 * x0 + (1 - before) ** 0.5 * (abar**0.5 * v + (1 - abar) ** 0.5 * x)
        self.x, self.t = x, int(self.scheduler.timesteps[step])

    def abar(self, t):
        table = self.scheduler.alphas_cumprod.double()
        return table[int(t)] if t >= 0 else self.scheduler.final_alpha_cumprod.double()

    def v(self, x, t, condition):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return self.pipe.unet(x, t, encoder_hidden_states=condition).sample

    def score(self, x, condition, t=None):
        t = self.t if t is None else t
        abar = self.abar(t)
        with sdpa_kernel(SDPBackend.MATH):
            v = self.pipe.unet(x, t, encoder_hidden_states=condition).sample
        return -(abar**0.5 * v + (1 - abar) ** 0.5 * x) / (1 - abar) ** 0.5

    def jacobian(self, condition):
        """[d, d], row by row."""
        x = self.x.clone().requires_grad_()
        score = self.score(x, condition).flatten()
        eye = torch.eye(D, dtype=torch.float64).unflatten(1, (1, *SHAPE))
        rows = [torch.autograd.grad(score, x, row.flatten(), retain_graph=True)[0] for row in eye]
        return torch.stack(rows).reshape(D, D)


def values_of(pipe, name, prompts=PROMPTS[:2], seeds=(3, 4), **options):
    row_of = SharpnessScorer(pipe)(prompts, seeds=list(seeds), metrics=[name], **options)
    return [row[f"{name.split(':')[0]}_seeds"] for row in row_of]


def test_anisotropy(pipe):
    found = values_of(pipe, "anisotropy:timestep=1:cosine_weight=2:norm_weight=0.5")
    for prompt, row in zip(PROMPTS, found, strict=False):
        for seed, value in zip((3, 4), row, strict=True):
            o = Oracle(pipe, prompt, seed)
            with torch.no_grad():
                low = o.score(o.x, o.empty, 1)
                pull = o.score(o.x, o.prompt, 1) - low
                cosine = torch.nn.functional.cosine_similarity(pull, low, dim=1).mean()
                norm = (o.score(o.x, o.prompt) - o.score(o.x, o.empty)).norm()
            assert value == pytest.approx(float(2 * cosine + 0.5 * norm), rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_p_laplace(pipe, p):
    ((value,),) = values_of(pipe, f"p_laplace:p={p}:probes=4:radius=0.1", PROMPTS[:1], [3])
    o = Oracle(pipe, PROMPTS[0], 3)
    u = probes("sphere", 2, samples=[3], count=2, dimension=D).reshape(2, *SHAPE) / D**0.5
    total = 0.0
    with torch.no_grad():
        for point in (*u, *(-u)):
            s = o.score(o.x + 0.1 * D**0.5 * point, o.empty)
            total += float((s.norm() ** (p - 2) * s * point).sum()) / 4
    assert value == pytest.approx(-D / (0.1 * D**0.5) * total, rel=1e-9)


def test_the_flux_through_a_small_sphere_is_minus_the_trace(pipe):
    """p = 2 is the Laplacian."""
    ((value,),) = values_of(pipe, "p_laplace:p=2:probes=64:radius=0.001", PROMPTS[:1], [3])
    o = Oracle(pipe, PROMPTS[0], 3)
    jacobian = o.jacobian(o.empty)
    u = probes("sphere", 2, samples=[3], count=32, dimension=D)[:, 0] / D**0.5
    estimate = -D * torch.einsum("ki,ij,kj->k", u, jacobian, u).mean()
    assert value == pytest.approx(float(estimate), rel=1e-5)
    assert value == pytest.approx(-float(jacobian.trace()), rel=0.05)


def test_curvature_difference(pipe):
    o = Oracle(pipe, PROMPTS[0], 3)
    difference = o.jacobian(o.prompt) - o.jacobian(o.empty)
    z = probes("rademacher", 0, samples=[3], count=6, dimension=D)[:, 0]
    expected = -(z * (z @ difference.T)).mean()
    ((value,),) = values_of(pipe, "curvature_difference:probes=6", PROMPTS[:1], [3])
    assert value == pytest.approx(float(expected), rel=1e-8)
    # As many probes as entries: exact.
    ((value,),) = values_of(pipe, f"curvature_difference:method=xdiag:probes={D}", PROMPTS[:1], [3])
    assert value == pytest.approx(-float(difference.trace()) / D, rel=1e-8)
    ((value,),) = values_of(pipe, "curvature_proxy", PROMPTS[:1], [3])
    with torch.no_grad():
        square = (o.score(o.x, o.prompt) - o.score(o.x, o.empty)).square().mean()
    assert value == pytest.approx(float(square), rel=1e-9)


def test_condition_jacobian(pipe):
    ((value,),) = values_of(pipe, "condition_jacobian:probes=3", PROMPTS[:1], [3])
    o = Oracle(pipe, PROMPTS[0], 3)
    embedding = o.prompt.clone().requires_grad_()
    score = o.score(o.x, embedding)
    z = probes("rademacher", 1, samples=[3], count=3, dimension=D).reshape(3, 1, *SHAPE)
    squares = [torch.autograd.grad(score, embedding, part, retain_graph=True)[0].square().sum() for part in z]
    assert value == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-8)


class Keeping(AttnProcessor):
    """The processor of diffusers that forms the probabilities, keeping them."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **rest):
        if encoder_hidden_states is not None:
            q = attn.head_to_batch_dim(attn.to_q(hidden_states))
            k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            self.kept.append(attn.get_attention_scores(q, k).double())  # [heads, places, tokens]
        return super().__call__(attn, hidden_states, encoder_hidden_states, **rest)


def probabilities(pipe, oracle):
    """Those of each cross-attention layer, [heads, places, tokens], for one prompt."""
    unet, kept = copy.deepcopy(pipe.unet), []
    unet.set_attn_processor(Keeping(kept))
    with torch.no_grad():
        unet(oracle.x, oracle.t, encoder_hidden_states=oracle.prompt)
    return kept


def test_attention_entropy(pipe):
    found = values_of(pipe, "attention_entropy")
    one_layer = values_of(pipe, "attention_entropy_layer:layer=1")
    for prompt, row, one in zip(PROMPTS, found, one_layer, strict=False):
        for seed, value, layer in zip((3, 4), row, one, strict=True):
            masses = [p.mean((0, 1)) for p in probabilities(pipe, Oracle(pipe, prompt, seed))]
            entropies = [float(-(mass * mass.log()).sum()) for mass in masses]
            assert len(entropies) > 2
            assert value == pytest.approx(sum(entropies) / len(entropies), rel=1e-6)
            assert layer == pytest.approx(entropies[1], rel=1e-6)
    with pytest.raises(InvalidInput, match="layer: expected less than"):
        values_of(pipe, "attention_entropy_layer:layer=99")


def test_bright_ending(pipe):
    """At the last step of the trajectory, whatever steps are asked for."""
    table = SharpnessScorer(pipe, num_inference_steps=4)(
        PROMPTS[:2], seeds=[3], metrics=["bright_ending", "score_difference"], steps=(1,)
    )
    assert [row["step"] for row in table] == [1, 3, 1, 3]
    for prompt, (early, late) in zip(
        PROMPTS, zip(table.rows[::2], table.rows[1::2], strict=True), strict=False
    ):
        assert early["bright_ending"] is None
        assert early["score_difference"] is not None
        assert late["score_difference"] is None
        end = len(pipe.tokenizer(prompt).input_ids) - 1
        kept = probabilities(pipe, Oracle(pipe, prompt, 3, step=3, steps=4))
        places = max(p.shape[1] for p in kept)
        share = torch.stack([p[:, :, end].mean(0) for p in kept if p.shape[1] == places]).mean(0)
        picture = torch.nn.functional.interpolate(
            share.reshape(1, 1, 4, 4), (8, 8), mode="bilinear", align_corners=False
        )
        assert late["bright_ending"] == pytest.approx(float(picture.mean()), rel=1e-6)


def test_features_of_the_spectrum(pipe):
    names = [name for name in DETECTORS if hasattr(DETECTORS[name], "column")]
    assert len(names) == 5
    metrics = [f"{name}:method=dense" for name in names]
    (row,) = SharpnessScorer(pipe)(PROMPTS[:1], seeds=[3], metrics=metrics)
    o = Oracle(pipe, PROMPTS[0], 3)
    jacobian = o.jacobian(o.prompt)
    values = torch.linalg.eigvalsh((jacobian + jacobian.T) / 2)
    with torch.no_grad():
        square = float(o.score(o.x, o.prompt).square().sum())
    sigma2 = float(1 - o.abar(o.t))
    assert row["negative_fraction"] == pytest.approx(float((values < 0).double().mean()))
    assert row["least_curvature"] == pytest.approx(-float(values[-1]), rel=1e-8)
    assert row["greatest_curvature"] == pytest.approx(-float(values[0]), rel=1e-8)
    assert row["codimension_flipd"] == pytest.approx(-sigma2 * (float(values.sum()) + square), rel=1e-8)
    assert 0 <= row["codimension_lhsd"] <= D
    lanczos = [f"{name}:max_products=200:tolerance=1e-6:probes=8:depth=24" for name in names]
    (estimated,) = SharpnessScorer(pipe)(PROMPTS[:1], seeds=[3], metrics=lanczos)
    assert estimated["least_curvature"] == pytest.approx(row["least_curvature"], rel=1e-5)
    assert estimated["greatest_curvature"] == pytest.approx(row["greatest_curvature"], rel=1e-5)
    assert estimated["codimension_flipd"] == pytest.approx(row["codimension_flipd"], abs=0.1 * D)


# --- costs --------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(work, monkeypatch):
    """`work`, with products of the transposed Jacobian counted too."""

    def counting(original):
        def run(linearization, vectors):
            work.products += vectors.shape[0] * vectors.shape[1]
            return original(linearization, vectors)

        return run

    monkeypatch.setattr(Linearization, "vjp", counting(Linearization.vjp))
    return work


def expected(cost, prompts, seeds):
    own = Cost(cost.passes - cost.shared_passes, cost.products - cost.shared_products)
    passes = seeds * (cost.shared_passes + prompts * own.passes)
    return passes, seeds * (cost.shared_products + prompts * own.products)


# Of the features of the spectrum, which share everything, one.
ALONE = [name for name in DETECTORS if not hasattr(DETECTORS[name], "column")] + ["negative_fraction"]


@pytest.mark.parametrize("name", [*ALONE, "curvature_difference:method=xdiag:probes=6"])
def test_a_detector_costs_what_it_says(sd2_pipe, counted, name):
    prompts, seeds = 3, 2
    steps = {"num_inference_steps": 3} if name == "bright_ending" else {}
    scorer = SharpnessScorer(sd2_pipe, **steps)
    counted.reset()
    scorer(PROMPTS, seeds=seeds, metrics=[name])
    passes, products = expected(scorer.cost([name]), prompts, seeds)
    if hasattr(DETECTORS.get(name), "column"):
        # An upper bound of products; the unconditional branch is linearized once to learn its memory.
        assert counted.products <= products
        assert passes <= counted.forwards <= passes + 1
    elif name == "condition_jacobian":
        assert (counted.forwards, counted.products) == (passes + 1, products)
    else:
        assert (counted.forwards, counted.products) == (passes, products)
    # Of further prompts only their own part.
    counted.reset()
    scorer([PROMPTS[0]], seeds=seeds, metrics=[name])
    own = scorer.cost([name])
    assert counted.forwards == seeds * (own.passes - own.shared_passes)


def test_detectors_share_what_they_have_in_common(sd2_pipe, counted):
    """All that need no spectrum at two steps, for less than the sum of their costs."""
    names = [name for name in DETECTORS if not hasattr(DETECTORS[name], "column")]
    scorer = SharpnessScorer(sd2_pipe, num_inference_steps=4)
    counted.reset()
    scorer(PROMPTS, seeds=2, metrics=names, steps=(0, 2))
    together = scorer.cost(names, steps=(0, 2))
    assert (counted.forwards, counted.products) == expected(together, 3, 2)
    alone = [scorer.cost([name], steps=(0, 2)) for name in names]
    assert together.passes < sum(cost.passes for cost in alone)
    assert together.products == sum(cost.products for cost in alone)


def test_a_number_does_not_depend_on_what_else_is_asked_for(pipe):
    """Nor on the other prompts of the batch."""
    names = [name for name in DETECTORS if not hasattr(DETECTORS[name], "column")]
    scorer = SharpnessScorer(pipe, num_inference_steps=3)
    together = scorer(PROMPTS, seeds=2, metrics=names, steps=(0, 1)).rows
    for name in names:
        alone = SharpnessScorer(pipe, num_inference_steps=3)
        rows = alone(PROMPTS[1:2], seeds=2, metrics=[name], steps=(0, 1)).rows
        for row in rows:
            same = next(r for r in together if (r["prompt"], r["step"]) == (row["prompt"], row["step"]))
            assert row[name] == pytest.approx(same[name], rel=1e-9)


def test_units(pipe):
    """Differences and Jacobians scale with sigma; spectra are in score units alone."""
    names = ["score_difference", "curvature_difference", "condition_jacobian", "curvature_proxy"]
    score, eps = (
        SharpnessScorer(pipe)(PROMPTS[:1], seeds=1, metrics=names, units=units).rows[0]
        for units in ("score", "eps")
    )
    sigma = float(1 - Oracle(pipe, PROMPTS[0], 3).abar(981)) ** 0.5
    for name, power in zip(names, (1, 1, 1, 2), strict=True):
        sign = -1 if name == "curvature_difference" else 1
        assert score[name] * sigma**power == pytest.approx(sign * eps[name], rel=1e-9)
    with pytest.raises(InvalidInput, match='units: negative_fraction is defined in "score" units'):
        SharpnessScorer(pipe)(PROMPTS[:1], seeds=1, metrics=["negative_fraction"], units="eps")


def test_the_cost_of_a_trajectory():
    """Steps that are only passed through cost both branches."""
    (difference,) = make_detectors(["score_difference"])
    (ending,) = make_detectors(["bright_ending"])
    assert cost_of([difference], dimension=8) == Cost(2, 0, 1, 0)
    assert cost_of([difference], dimension=8, steps=(0, 5)) == Cost(12, 0, 1, 0)
    assert cost_of([ending], dimension=8, count=50) == Cost(99, 0, 1, 0)
    assert cost_of(make_detectors(["attention_entropy"]), dimension=8) == Cost(1, 0, 0, 0)
    both = make_detectors(["attention_entropy", "hessian_score_difference"])
    assert cost_of(both, dimension=8) == Cost(3, 2, 1, 0)
    assert set(detectors()) >= set(DETECTORS)


def test_on_the_shipped_model_in_float32():
    """Every detector gives finite numbers, the same in another batch."""
    pipe = load_tiny_pipeline()
    names = ["anisotropy", "attention_entropy", "curvature_difference", "condition_jacobian", "p_laplace"]
    scorer = SharpnessScorer(pipe)
    rows = scorer(PROMPTS, seeds=1, metrics=names).rows
    again = SharpnessScorer(pipe)(PROMPTS[:1], seeds=1, metrics=names).rows[0]
    for name in names:
        assert again[name] == pytest.approx(rows[0][name], rel=1e-4)


def live_bytes():
    """Of all tensors that Python holds, each memory once."""
    gc.collect()
    held = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and not found.is_mkldnn:
            storage = found.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def test_memory_does_not_grow_with_the_prompts(sd2_pipe):
    """All detectors but the spectrum's: what is kept depends on the seeds, not on the number of prompts."""
    names = [name for name in DETECTORS if not hasattr(DETECTORS[name], "column")]
    scorer = SharpnessScorer(sd2_pipe, num_inference_steps=2)
    prompts = [f"{prompt}, number {i}" for i in range(4) for prompt in PROMPTS]
    sizes = []
    for rows in scorer.iterate(prompts, seeds=1, metrics=names, steps=(0, 1)):
        assert all(row["error"] is None for row in rows)
        sizes.append(live_bytes())
    assert len(sizes) > 2
    assert max(sizes[1:]) <= sizes[0] * 1.01
