"""The examples with the shipped model: what they make of scores, and the pictures that are half memorized."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import detectors.localize as localize
import detectors.run as run

from sharpcore.detect.ensemble import Features


def test_rows_of_all_detectors():
    """Scores of which some separate the prompts and others do not."""
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3 == 0
    tiers = np.where(labels, np.arange(90) % 2 + 1, 0)
    names = ("score_difference@0", "hessian_score_difference@0", "p_laplace@25", "bright_ending@49")
    strengths = np.array([1.5, 1.0, 0.0, -1.0])
    values = generator.normal(size=(90, 4)) + np.outer(labels, strengths)
    rows = run._rows(Features(names, tuple(map(str, range(90))), values, labels), tiers)
    by_name = {row["detector"]: row for row in rows}
    assert by_name["score_difference@0"]["auc"] > 0.8
    assert by_name["bright_ending@49"]["auc"] < 0.4
    assert by_name["ensemble of all"]["auc"] > by_name["score_difference@0"]["auc"]
    assert by_name["ensemble of all"]["compared_with"] == "score_difference@0"
    assert 0 <= by_name["ensemble of all"]["p_value"] <= 1
    assert (by_name["score_difference@0"]["passes"], by_name["bright_ending@49"]["passes"]) == (2, 99)
    assert by_name["p_laplace@25"]["passes"] == 2 * 25 + 8
    assert {"auc_tier_1", "auc_tier_2"} <= set(by_name["score_difference@0"])
    cascade = by_name["cascade: score_difference@0, then hessian_score_difference@0"]
    assert 2 <= cascade["passes"] <= 4
    assert cascade["fpr"] < 0.2


def test_pictures_that_are_half_memorized(tmp_path):
    prompts, images, masks = localize.pictures(6)
    assert len(prompts) == len(images) == len(masks) == 6
    assert all(int(mask.sum()) == 32 * 16 for mask in masks)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 4
    for image, mask in zip(images, masks, strict=True):
        assert float(image.min()) >= 0
        assert not torch.equal(image[0] * mask, image[0])
    localize.main(["--out", str(tmp_path), "--pictures", "2", "--seeds", "1", "--timesteps", "501"])
    with (tmp_path / "localization.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["map"] for row in rows] == [name.partition(":")[0] for name in localize.METRICS]
    assert all(0 <= float(row["iou"]) <= 1 for row in rows)
    assert len(list(tmp_path.glob("*.png"))) == len(rows)


def test_the_examples_say_what_they_do(capsys):
    for module in (run, localize):
        with pytest.raises(SystemExit) as caught:
            module.main(["--help"])
        assert caught.value.code == 0
        assert "python examples/detectors/" in capsys.readouterr().out
