"""Tests of finding repeated prompts: normal forms, similarity by its definition, clusters, two lists."""

from __future__ import annotations

import json
import random

import pytest

from sharpcore.errors import InvalidInput
from sharpcore.report import compare_lists, deduplicate, duplicates, find_duplicates
from sharpcore.report.duplicates import beginnings, effective_number, normalize

PROMPTS = [
    "A red bicycle leaning on a stone wall beside the old harbour of the town",
    "a  red bicycle leaning\ton a stone wall beside the old harbour of the town ",
    "A red bicycle leaning on the stone wall beside the old harbour of the town",
    "Mountains at dawn",
    "Ｍountains at dawn",
    "A bowl of soup",
]


def jaccard(one, other, shingle=5):
    parts = [
        {text[k : k + shingle] for k in range(max(1, len(text) - shingle + 1))}
        for text in (normalize(one), normalize(other))
    ]
    return len(parts[0] & parts[1]) / len(parts[0] | parts[1])


def test_clusters_of_a_list():
    found = find_duplicates(PROMPTS)
    assert found.exact == ((0, 1), (3, 4))
    assert found.clusters == (0, 0, 0, 1, 1, 2)
    assert [pair[:2] for pair in found.near] == [(0, 2)]
    assert found.near[0][2] == pytest.approx(jaccard(PROMPTS[0], PROMPTS[2]))
    assert (found.n_distinct, found.n_clusters) == (4, 3)
    assert found.effective_number == 36 / 14
    assert json.loads(json.dumps(found.to_dict()))["largest_clusters"] == [[0, 1, 2], [3, 4]]
    assert find_duplicates(PROMPTS, threshold=1.0).n_clusters == 4


def test_similarity_agrees_with_its_definition_for_all_pairs():
    generator = random.Random(4)
    words = ["red", "blue", "house", "tree", "by the sea", "é", "x"]
    prompts = [" ".join(generator.choices(words, k=generator.randint(1, 6))) for _ in range(600)]
    texts = list(dict.fromkeys(prompts))
    found = find_duplicates(texts, threshold=0.5)
    sampled = [(i, j) for i in range(0, len(texts), 7) for j in range(i + 1, len(texts))]
    expected = {(i, j): jaccard(texts[i], texts[j]) for i, j in sampled}
    near = {pair[:2]: pair[2] for pair in found.near if pair[:2] in expected}
    assert near == pytest.approx({pair: value for pair, value in expected.items() if value >= 0.5})
    assert len(near) > 100
    assert list(found.near) == sorted(found.near)


def test_a_list_too_long_to_compare_is_searched_for_equal_prompts(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_COMPARED", 3)
    found = find_duplicates(PROMPTS)
    assert (found.compared, found.near, found.n_clusters) == (False, (), 4)
    assert found.to_dict()["near_duplicates_compared"] is False


def test_deduplicate_keeps_the_first():
    assert deduplicate(PROMPTS) == [PROMPTS[k] for k in (0, 2, 3, 5)]
    assert deduplicate(PROMPTS, near=True) == [PROMPTS[k] for k in (0, 3, 5)]
    assert deduplicate(["a", "b", "a"]) == ["a", "b"]


def test_short_and_odd_texts():
    assert find_duplicates(["", " ", "a", "ab"]).clusters == (0, 0, 1, 2)
    assert normalize("  Straße\u00a0X\n") == "strasse x"


def test_beginnings_join_what_one_template_made():
    prompts = ["Shop Floors alpha 12", "shop floors beta", "The red house", "red house of Ann", "x", "the a"]
    assert beginnings(prompts) == [0, 0, 1, 1, 2, 3]


def test_effective_number():
    assert effective_number("abcd") == 4
    assert effective_number("aaaa") == 1
    assert effective_number([1] * 158 + list(range(2, 63))) == pytest.approx(219**2 / (158**2 + 61))
    with pytest.raises(InvalidInput, match="at least one"):
        effective_number([])


def test_two_lists():
    memorized = [
        f"Shop Floors {word} carpet" for word in ("alpha", "beta", "gamma", "delta", "chi", "zeta", "eta")
    ]
    memorized += ["A cat on a mat", "Poster of the old harbour at night, 1920"]
    others = [
        "a cat on a MAT",
        "Poster of the old harbour at night, 1921",
        "Two dogs",
        "Rain",
        "Snow",
        "Wind",
    ]
    report = compare_lists(memorized, others)
    assert report.shared == ((7, 0),)
    assert [pair[:2] for pair in report.shared_near] == [(8, 1)]
    text = " / ".join(report.warnings)
    assert "1 memorized prompts are also among the others, e.g. 'A cat on a mat'" in text
    assert "have a near-duplicate among the others" in text
    assert "7 of 9 memorized prompts begin with 'shop floors' (effective number of beginnings: 1.6)" in text
    assert json.loads(json.dumps(report.to_dict()))["shared"] == [[7, 0]]
    assert compare_lists(["one thing", "two"], ["three", "four"]).warnings == ()


def test_repetitions_are_warned_of():
    report = compare_lists(["the same prompt"] * 5 + ["another"], ["three", "four"])
    assert "the 6 memorized prompts are 2 clusters of near-duplicates" in report.warnings[0]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "non-empty list of strings"),
        ("text", {}, "non-empty list of strings"),
        (["a", None], {}, "non-empty list of strings"),
        (["a"], {"threshold": 0.0}, "threshold"),
        (["a"], {"shingle": 0}, "shingle"),
    ],
)
def test_bad_input(prompts, options, message):
    with pytest.raises(InvalidInput, match=message):
        find_duplicates(prompts, **options)
