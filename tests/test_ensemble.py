"""Ensembles and cascades: fits, cross-validation without leaks, files, costs, errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from sharpcore import InvalidInput, ScoreTable, SharpnessScorer
from sharpcore.detect import Cost
from sharpcore.detect.ensemble import (
    Cascade,
    Ensemble,
    Features,
    cross_validated,
    features_of,
    fit_cascade,
    fit_ensemble,
)


def made_features(n=200, separation=(1.0, 1.0, 0.0), seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3 == 0
    values = generator.normal(size=(n, len(separation))) + np.outer(labels, separation)
    names = tuple(f"m{i}@0" for i in range(len(separation)))
    return Features(names, tuple(f"prompt {i}" for i in range(n)), values, labels)


def table_of(features, steps=(0,)):
    rows = []
    for prompt, values, label in zip(features.prompts, features.values, features.labels, strict=True):
        for step in steps:
            row = {"prompt": prompt, "step": step, "timestep": 1.0, "memorized": bool(label)}
            for i, value in enumerate(values):
                row |= {f"m{i}": float(value) + step, f"m{i}_se": None, f"m{i}_seeds": [float(value)]}
            rows.append(row | {"error": None})
    return ScoreTable(rows)


def test_features_of_a_table():
    features = made_features(9)
    table = table_of(features, (0, 3))
    found = features_of(table, "memorized")
    assert found.names == ("m0@0", "m0@3", "m1@0", "m1@3", "m2@0", "m2@3")
    assert found.prompts == features.prompts
    assert found.labels.tolist() == features.labels.tolist()
    np.testing.assert_array_equal(found.values[:, 2], features.values[:, 1])
    np.testing.assert_array_equal(found.values[:, 3], features.values[:, 1] + 3)
    # One score missing, one row failed: two prompts less.
    table.rows[0]["m1"] = None
    table.rows[3] |= {"m0": None, "m1": None, "m2": None, "error": "no"}
    chosen = features_of(table, "memorized", names=["m1@0", "m1@3"])
    assert chosen.prompts == features.prompts[2:]
    with pytest.raises(InvalidInput, match="names: expected columns out of m0@0"):
        features_of(table, "memorized", names=["m9@0"])
    with pytest.raises(InvalidInput, match="expected prompts with all scores"):
        features_of(ScoreTable(table.rows[:4]), "memorized")


def test_a_fit_is_the_penalized_maximum_of_the_likelihood():
    features = made_features()
    ensemble = fit_ensemble(features)
    standard = (features.values - features.values.mean(0)) / features.values.std(0)
    model = LogisticRegression(C=ensemble.strength, max_iter=5000, tol=1e-10).fit(standard, features.labels)
    np.testing.assert_allclose(
        ensemble.log_odds(features.values), model.decision_function(standard), atol=1e-3
    )
    np.testing.assert_allclose(
        ensemble.probability(features.values), model.predict_proba(standard)[:, 1], atol=1e-3
    )
    constant = dataclasses.replace(features, values=np.c_[features.values, np.full(200, 3.0)])
    wider = dataclasses.replace(constant, names=(*features.names, "same@0"))
    np.testing.assert_allclose(
        fit_ensemble(wider).log_odds(wider.values), ensemble.log_odds(features.values), atol=1e-2
    )


def test_it_beats_its_parts_and_knows_when_there_is_nothing():
    features = made_features(600)
    odds = cross_validated(features)
    alone = [roc_auc_score(features.labels, column) for column in features.values.T]
    assert roc_auc_score(features.labels, odds) > max(alone) + 0.03
    # Labels that have nothing to do with many features: fitted to all prompts they seem separable.
    generator = np.random.default_rng(1)
    noise = Features(
        tuple(f"n{i}@0" for i in range(40)),
        features.prompts[:120],
        generator.normal(size=(120, 40)),
        np.arange(120) % 2 == 0,
    )
    assert 0.3 < roc_auc_score(noise.labels, cross_validated(noise)) < 0.7


def test_the_same_seed_gives_the_same_numbers():
    features = made_features(90)
    np.testing.assert_array_equal(cross_validated(features, seed=3), cross_validated(features, seed=3))
    assert fit_ensemble(features, seed=3) == fit_ensemble(features, seed=3)


def test_files(tmp_path):
    ensemble = fit_ensemble(made_features(60))
    path = tmp_path / "ensemble.json"
    ensemble.save(path)
    assert Ensemble.load(path) == ensemble
    for text in ("", "{}", '{"sharpcore_ensemble": 9}', '{"sharpcore_ensemble": 1, "names": []}', "[]"):
        path.write_text(text)
        with pytest.raises(InvalidInput, match="expected an ensemble that `save` wrote"):
            Ensemble.load(path)


def test_groups_that_are_too_small():
    features = made_features(30)
    one_kind = dataclasses.replace(features, labels=np.ones(30, bool))
    few = dataclasses.replace(features, labels=np.arange(30) < 3)
    with pytest.raises(InvalidInput, match="one kind is missing"):
        fit_ensemble(one_kind)
    with pytest.raises(InvalidInput, match="at least 5 prompts of either kind"):
        fit_ensemble(few)
    with pytest.raises(InvalidInput, match="folds: expected at most"):
        cross_validated(features, folds=11)
    with pytest.raises(InvalidInput, match="folds: expected an integer of at least 2"):
        cross_validated(features, folds=1)


def test_a_cascade_spends_on_the_undecided():
    """The second score is better; the first clears most prompts."""
    features = made_features(3000, (2.0, 4.0))
    cheap, expensive = features.values.T
    cascade = fit_cascade(features, "m0@0", "m1@0", fpr=0.02, undecided=0.3)
    undecided = cascade.undecided(cheap)
    assert undecided.mean() <= 0.3
    unseen = made_features(3000, (2.0, 4.0), seed=1)
    flagged = cascade.flagged(*unseen.values.T)
    positive = unseen.labels
    assert flagged[~positive].mean() < 0.03
    alone = unseen.values[:, 0] > np.quantile(unseen.values[~positive, 0], 0.98)
    assert flagged[positive].mean() > alone[positive].mean() + 0.1
    # What is not looked at may be unknown.
    hidden = np.where(undecided, expensive, np.nan)
    np.testing.assert_array_equal(cascade.flagged(cheap, hidden), cascade.flagged(cheap, expensive))
    costs = {"m0@0": Cost(passes=2), "m1@0": Cost(passes=2, products=10)}
    assert cascade.expected_cost(cheap, costs) == pytest.approx(2 + 10 * undecided.mean())


def test_a_cascade_runs_the_expensive_detector_where_it_must(sd2_pipe, work):
    """Three prompts, of which the limits leave one undecided."""
    prompts = ["a thin zero", "a bold three", "a slanted seven"]
    scorer = SharpnessScorer(sd2_pipe)
    rows = scorer(prompts, seeds=2).rows
    cheap = np.array([row["score_difference"] for row in rows])
    middle = float(np.sort(cheap)[1])
    threshold = next(row["hessian_score_difference"] for row in rows if row["score_difference"] == middle) / 2
    cascade = Cascade(
        "score_difference@0", "hessian_score_difference@0", 0.999 * middle, 1.001 * middle, threshold
    )
    work.reset()
    found = cascade.decide(scorer, prompts, seeds=2)
    assert work.products == 2 * 2  # of one prompt: both branches, two seeds
    assert [decision.prompt for decision in found] == prompts
    for decision, row in zip(found, rows, strict=True):
        assert decision.cheap == pytest.approx(row["score_difference"], rel=1e-5)
        assert (decision.expensive is not None) == (row["score_difference"] == middle)
        assert decision.flagged == (row["score_difference"] >= middle)


def test_a_cascade_of_ties_or_of_nobody():
    features = made_features(40)
    few = fit_cascade(features, "m0@0", "m1@0", undecided=0.01)
    assert not few.undecided(features.values[:, 0]).any()
    tied = dataclasses.replace(
        features, values=np.c_[np.round(features.values[:, 0]), features.values[:, 1:]]
    )
    assert fit_cascade(tied, "m0@0", "m1@0", undecided=0.3).undecided(tied.values[:, 0]).mean() <= 0.3


def test_limits_of_a_cascade():
    features = made_features(60)
    for options, message in (
        ({"fpr": 0.0}, "fpr: expected a number between 0 and 1"),
        ({"undecided": 1.5}, "undecided: expected a number between 0 and 1"),
    ):
        with pytest.raises(InvalidInput, match=message):
            fit_cascade(features, "m0@0", "m1@0", **options)
    with pytest.raises(InvalidInput, match="names: expected columns"):
        fit_cascade(features, "m0@0", "other@0")
    cascade = Cascade("a", "b", 0.0, 1.0, 5.0)
    flagged = cascade.flagged(np.array([-1.0, 0.5, 0.5, 2.0]), np.array([9.0, 9.0, 1.0, 0.0]))
    assert flagged.tolist() == [False, True, False, True]
