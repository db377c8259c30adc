"""Tests of what the text alone tells: features by hand, synthetic lists, the lists of the literature."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from sharpcore.errors import InvalidInput
from sharpcore.report import check_confounds, compare_lists, confounds
from sharpcore.report.confounds import FEATURES, split_folds, text_features

WORDS = [
    "river",
    "stone",
    "cloud",
    "lamp",
    "paper",
    "forest",
    "window",
    "garden",
    "silver",
    "bridge",
    "harbour",
]


def sentences(seed, count, change=lambda words, generator: words):
    generator = random.Random(seed)
    return [
        " ".join(change(generator.choices(WORDS, k=generator.randint(5, 12)), generator))
        for _ in range(count)
    ]


def some_capitals(words, generator):
    return [word.title() if generator.random() < 0.6 else word for word in words]


def test_features_by_hand():
    found = text_features(
        ["Big Big dog, 7!", "café dog"], tokenize=lambda text: [len(word) for word in text.split()]
    )
    assert set(found) == set(FEATURES)
    expected = {
        "characters": [15, 8],
        "words": [4, 2],
        "capitalized_words": [0.5, 0],
        "capitals": [2 / 15, 0],
        "digits": [1 / 15, 0],
        "punctuation": [2 / 15, 0],
        "non_ascii": [0, 1 / 8],
        "repeated_words": [1 / 4, 0],
        # dog is in both prompts, every other word in one of two.
        "word_rarity_mean": [2 * math.log(2) / 3, math.log(2) / 2],
        "word_rarity_max": [math.log(2), math.log(2)],
        "tokens": [4, 2],
        "token_id_mean": [3, 3.5],
        "token_id_max": [4, 4],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)


def test_rarity_does_not_count_the_prompt_itself_and_does_not_see_labels():
    prompts = ["alpha beta", "alpha gamma", "alpha delta"]
    rarity = text_features(prompts)["word_rarity_mean"]
    for k, prompt in enumerate(prompts):
        others = [set(other.split()) for place, other in enumerate(prompts) if place != k]
        values = [math.log(3 / (1 + sum(word in other for other in others))) for word in prompt.split()]
        assert rarity[k] == pytest.approx(np.mean(values))


def test_texts_without_words():
    found = text_features(["", "…", "a"], tokenize=lambda text: [])
    assert all(np.isfinite(values).all() for values in found.values())


def test_lists_of_one_kind_are_not_separated():
    found = check_confounds(sentences(1, 120), sentences(2, 150))
    assert found.warnings == ()
    assert all(0.5 <= feature.auc < 0.65 for feature in found.features)
    assert 0.38 < found.regression_auc < 0.62


@pytest.mark.parametrize("swapped", [False, True])
def test_capitals_are_found_and_warned_of(swapped):
    metrics = pytest.importorskip("sklearn.metrics")
    lists = [sentences(1, 60, some_capitals), sentences(2, 80)]
    lists = lists[::-1] if swapped else lists
    found = check_confounds(*lists)
    feature = next(item for item in found.features if item.feature == "capitalized_words")
    values = [
        sum(word[0].isupper() for word in text.split()) / len(text.split()) for part in lists for text in part
    ]
    auc = metrics.roc_auc_score(np.repeat([1, 0], [len(part) for part in lists]), values)
    assert feature.auc == pytest.approx(max(auc, 1 - auc), abs=1e-12)
    assert feature.auc > 0.95
    assert feature.direction == ("lower" if swapped else "higher")
    assert feature.interval[0] <= feature.auc <= feature.interval[1]
    assert found.regression_auc > 0.95
    warning = next(text for text in found.warnings if "capitalized words" in text)
    assert f"AUC of {feature.auc:.3f} ({feature.direction} for memorized prompts)" in warning
    assert json.loads(json.dumps(found.to_dict()))["warnings"] == list(found.warnings)
    rows = {row["metric"]: row for row in found.to_rows()}
    assert rows["text: capitalized_words"]["auc"] == feature.auc
    assert rows["text: all (regression)"]["n_positive"] == len(lists[0])


def test_features_that_only_matter_together():
    # As many marks as digits, two more, or two fewer: neither number tells much, their difference tells all.
    generator = random.Random(2)
    lists = []
    for seed, more in ((1, 2), (2, -2)):
        counts = [generator.randint(5, 25) for _ in range(80)]
        texts = sentences(seed, 80)
        lists.append([text + "7" * n + "!" * (n + more) for text, n in zip(texts, counts, strict=True)])
    found = check_confounds(*lists)
    assert max(feature.auc for feature in found.features) < 0.8
    assert found.regression_auc > 0.95  # measured 1


@pytest.mark.parametrize("seed", range(5))
def test_folds_divide_no_cluster_and_hold_both_kinds(seed):
    generator = np.random.default_rng(seed)
    clusters = generator.integers(0, 25, 90)
    labels = generator.random(90) < 0.4
    parts = split_folds(labels, clusters, 5, seed)
    assert len(parts) == 5
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in parts])), np.arange(90))
    for train, test in parts:
        assert not set(clusters[train]) & set(clusters[test])
        assert 0 < labels[train].sum() < len(train)
    assert split_folds(np.array([True, True, False]), np.array([0, 0, 1]), 5, seed) == []


def test_near_duplicates_are_one_cluster_for_the_folds(monkeypatch):
    seen = []
    monkeypatch.setattr(confounds, "split_folds", lambda labels, clusters, *rest: seen.append(clusters) or [])
    texts = sentences(5, 10)
    found = check_confounds([*texts[:5], texts[0].upper()], [*texts[5:], texts[1] + "."])
    assert seen[0].tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 9, 1]
    assert found.regression_auc is None


def test_a_feature_that_does_not_vary_has_no_direction():
    found = {item.feature: item for item in check_confounds(["one", "two"], ["three", "four"]).features}
    assert (found["digits"].auc, found["digits"].direction) == (0.5, "neither")


def test_too_few_clusters_and_a_missing_package(monkeypatch):
    found = check_confounds(["the same text"] * 5, ["one", "other things"])
    assert (found.regression_auc, found.regression_interval) == (None, None)
    assert "too few prompts that are no near-duplicates" in found.notes[0]
    assert len(found.to_rows()) == len(found.features)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    found = check_confounds(sentences(1, 20), sentences(2, 20))
    assert "sharpcore[report]" in found.notes[0]
    assert len(found.features) == 10


def test_bad_input():
    for lists in (([], ["a"]), (["a"], []), ("a", ["b"]), (["a"], [None])):
        with pytest.raises(InvalidInput, match="non-empty list of strings"):
            check_confounds(*lists)
    with pytest.raises(InvalidInput, match="folds"):
        check_confounds(["a"], ["b"], folds=1)


def read_list(name):
    folder = os.environ.get("SHARPCORE_PROMPT_LISTS")
    if not folder:
        pytest.skip("SHARPCORE_PROMPT_LISTS names no folder with the prompt lists of the literature")
    return (Path(folder) / f"{name}.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "auc"), [("sd1_mem", 0.989), ("sd2_mem", 0.994)])
def test_lists_of_the_literature(name, auc):
    memorized, others = read_list(name), read_list("sd1_nmem")
    found = check_confounds(memorized, others)
    feature = next(item for item in found.features if item.feature == "capitalized_words")
    assert feature.auc == pytest.approx(auc, abs=5e-4)
    assert feature.direction == "higher"
    assert found.regression_auc >= feature.auc - 0.01
    assert any("capitalized words" in warning for warning in found.warnings)


def test_one_company_in_a_list_of_the_literature():
    report = compare_lists(read_list("sd2_mem"), read_list("sd1_nmem"))
    assert any("158 of 219 memorized prompts begin with" in warning for warning in report.warnings)
