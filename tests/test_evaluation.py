"""Tests of the evaluation: the recorded AUCs, scikit-learn's curve, ties, intervals, clusters, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sharpcore.errors import InvalidInput
from sharpcore.report import LabelledScores, auc_over_seeds, evaluate, evaluate_table
from sharpcore.report.evaluation import evaluation_table
from sharpcore.report.figures import plot_auc_over_seeds, plot_auc_over_steps, plot_histograms, plot_roc
from sharpcore.table import ScoreTable

REFERENCE = json.loads(
    (Path(__file__).parent / "data" / "tiny-sd-eps" / "reference_scores.json").read_text(encoding="utf-8")
)


def recorded(step, metric, seeds):
    """The recorded scores, means over the first seeds: memorized, others."""
    return [
        [np.mean(row[step][metric][:seeds]) for row in REFERENCE["prompts"] if row["memorized"] is side]
        for side in (True, False)
    ]


@pytest.mark.parametrize("name", REFERENCE["table"])
def test_recorded_values_are_reproduced(name):
    step, metric, seeds = name.split()
    result = evaluate(*recorded(step, metric, int(seeds.removeprefix("n="))), bootstrap=20)
    expected = REFERENCE["table"][name]
    assert abs(result.auc - expected["auc"]) <= 1e-12  # measured 0
    assert abs(result.operating_points[0].tpr - expected["tpr1"]) <= 1e-12
    assert (result.n_positive, result.n_negative) == (60, 120)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (40, 100), (57, 301)])
def test_agrees_with_scikit_learn(sizes, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(sizes[0])
    positive, negative = generator.normal(1, 1, sizes[0]), generator.normal(0, 1, sizes[1])
    if ties:
        positive, negative = positive.round(), negative.round()
    labels, scores = np.repeat([1, 0], sizes), np.concatenate([positive, negative])
    fpr, tpr, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    targets = (0.0, 0.01, 0.03, 0.29, 0.5)
    result = evaluate(positive, negative, bootstrap=5, target_fprs=targets)
    assert abs(result.auc - metrics.roc_auc_score(labels, scores)) <= 1e-12
    curve = result.curve()
    np.testing.assert_allclose(curve[0], fpr, atol=1e-15)
    np.testing.assert_allclose(curve[1], tpr, atol=1e-15)
    for point in result.operating_points:
        assert point.fpr == np.mean(negative > point.threshold) <= point.target_fpr
        assert point.tpr == np.mean(positive > point.threshold)
        assert abs(point.tpr - tpr[fpr <= point.target_fpr].max()) <= 1e-15


def test_a_tie_at_the_threshold_does_not_raise_the_false_positive_rate():
    # One of 100 may be flagged, but two share the highest score: none is.
    negative = [5.0, 5.0, *np.linspace(0, 1, 98)]
    point = evaluate([5.0, 5.5, 6.0], negative, bootstrap=5).operating_points[0]
    assert (point.fpr, point.threshold) == (0.0, 5.0)
    assert point.tpr == 2 / 3


@pytest.mark.parametrize(("count", "target", "flagged"), [(100, 0.29, 29), (300, 0.01, 3), (99, 0.01, 0)])
def test_false_positive_rate_reaches_its_target_in_spite_of_rounding(count, target, flagged):
    (point,) = evaluate([0.5], range(count), bootstrap=1, target_fprs=(target,)).operating_points
    assert round(point.fpr * count) == flagged


def test_intervals_are_deterministic_and_leave_the_global_generator_alone():
    groups = recorded("step0", "wen", 4)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is tested
    first, second, other = (evaluate(*groups, bootstrap=200, seed=seed) for seed in (3, 3, 4))
    assert first == second
    assert first.auc_interval != other.auc_interval
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_intervals_contain_the_value_and_shrink_with_the_square_root_of_the_size():
    groups = recorded("step0", "wen", 4)
    once, often = evaluate(*groups), evaluate(groups[0] * 16, groups[1] * 16)
    assert once.auc == often.auc
    for low, high, value in [
        (*once.auc_interval, once.auc),
        *((*p.interval, p.tpr) for p in once.operating_points),
    ]:
        assert low <= value <= high
    ratio = np.diff(once.auc_interval) / np.diff(often.auc_interval)
    assert 3.6 < ratio < 4.4  # 4 expected; measured 3.95


def test_bootstrap_standard_error_agrees_with_the_closed_form():
    # Variance of the AUC from its placement values (DeLong, DeLong and Clarke-Pearson, 1988).
    positive, negative = map(np.asarray, recorded("step0", "hvp", 4))
    wins = (positive[:, None] > negative[None]).astype(float)
    variance = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    low, high = evaluate(positive, negative, bootstrap=4000).auc_interval
    assert (high - low) / (2 * 1.96 * variance**0.5) == pytest.approx(1, abs=0.06)  # measured 0.99


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ([], [1.0], "scores_positive: expected a non-empty"),
        ([1.0], [], "scores_negative: expected a non-empty"),
        ([1.0, float("nan")], [1.0], "got nan at index 1"),
        ([1.0], [float("inf")], "got inf at index 0"),
        ([None], [1.0], "expected"),
        (["a"], [1.0], "expected a list of numbers"),
        ([[1.0]], [1.0], r"shape \(1, 1\)"),
    ],
)
def test_bad_scores(positive, negative, message):
    with pytest.raises(InvalidInput, match=message):
        evaluate(positive, negative)


def test_bad_options():
    with pytest.raises(InvalidInput, match="bootstrap"):
        evaluate([1.0], [0.0], bootstrap=0)
    with pytest.raises(InvalidInput, match="target_fprs"):
        evaluate([1.0], [0.0], target_fprs=(1.0,))


def make_table(labels=(True, False)):
    rows = []
    for row in REFERENCE["prompts"]:
        for step in (0, 10):
            scores = row[f"step{step}"]["wen"]
            rows.append(
                {
                    "prompt": row["prompt"],
                    "label": labels[0] if row["memorized"] else labels[1],
                    "step": step,
                    "timestep": 981.0 - 20 * step,
                    "score_difference": float(np.mean(scores)),
                    "score_difference_se": 0.0,
                    "score_difference_seeds": scores,
                    "error": None,
                }
            )
    return ScoreTable(rows)


@pytest.mark.parametrize("labels", [(True, False), (1, 0), ("1", "0"), (1.0, 0.0), ("Memorized", "other")])
def test_table_with_a_label_column(labels):
    results = evaluate_table(make_table(labels), "label", bootstrap=20)
    assert [(result.metric, result.step) for result in results] == [
        ("score_difference", 0),
        ("score_difference", 10),
    ]
    for result in results:
        assert abs(result.auc - REFERENCE["table"][f"step{result.step} wen n=4"]["auc"]) <= 1e-12


def test_named_positive_labels_and_two_tables():
    table = make_table(("copied", "new"))
    named = evaluate_table(table, "label", positive=["copied"], bootstrap=20)
    halves = [ScoreTable([row for row in table if row["label"] == name]) for name in ("copied", "new")]
    assert evaluate_table(halves[0], others=halves[1], bootstrap=20) == named
    with pytest.raises(InvalidInput, match="got 'copied'"):
        evaluate_table(table, "label")


def test_rows_with_an_error_are_left_out_and_counted():
    table = make_table()
    table.rows[0].update(score_difference=None, score_difference_seeds=None, error="failed")
    first, second = evaluate_table(table, "label", bootstrap=20)
    assert (first.n_positive, first.n_errors, second.n_positive, second.n_errors) == (59, 1, 60, 0)


def test_tables_that_cannot_be_evaluated():
    with pytest.raises(InvalidInput, match="expected one of prompt, label"):
        evaluate_table(make_table(), "kind")
    with pytest.raises(InvalidInput, match="no other prompt"):
        evaluate_table(make_table((True, True)), "label")
    with pytest.raises(InvalidInput, match="has no scores"):
        evaluate_table(ScoreTable([{"prompt": "a", "label": 1}]), "label")
    with pytest.raises(InvalidInput, match="either label_column or a second table"):
        evaluate_table(make_table())


def test_dictionaries_hold_everything_but_the_scores():
    (result, _) = evaluate_table(make_table(), "label", bootstrap=20)
    nested = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert nested["operating_points"][0]["target_fpr"] == 0.01
    assert "positive" not in nested
    row = result.to_row()
    assert row["tpr_at_1pct"] == result.operating_points[0].tpr
    assert row["auc_low"] <= row["auc"] <= row["auc_high"]
    assert all(not isinstance(value, tuple | list) for value in row.values())


def test_pictures(tmp_path):
    results = evaluate_table(make_table(), "label", bootstrap=20)
    roc = plot_roc(results, path=tmp_path / "roc.png")
    histogram = plot_histograms(results, path=tmp_path / "histogram.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("roc.png", "histogram.png"))
    assert [axes.get_title() for axes in roc.axes] == ["step 0", "step 10"]
    curve = roc.axes[0].get_lines()[1].get_xydata()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(results[0].auc, abs=1e-12)
    legend = [text.get_text() for text in histogram.axes[0].get_legend().get_texts()]
    assert legend[:2] == ["memorized (60)", "other (120)"]
    with pytest.raises(InvalidInput, match="nothing to plot"):
        plot_roc([])


def test_picture_of_equal_scores():
    plot_histograms([evaluate([0.0, 0.0], [0.0], bootstrap=2)])


def test_bootstrap_of_clusters_widens_with_repetition():
    groups = recorded("step0", "hvp", 4)
    alone = evaluate(*groups, clusters=(range(60), range(120)))
    assert alone.clusters.auc_interval == alone.auc_interval
    assert (alone.clusters.n_positive, alone.clusters.effective_negative) == (60, 120)
    # Every prompt four times is no more information: the interval of clusters does not shrink.
    often = [np.repeat(scores, 4) for scores in groups]
    repeated = evaluate(
        *often, clusters=(np.repeat(range(60), 4).tolist(), np.repeat(range(120), 4).tolist())
    )
    assert np.diff(repeated.clusters.auc_interval) == pytest.approx(np.diff(alone.auc_interval), rel=1e-9)
    # Measured 0.52.
    assert np.diff(repeated.auc_interval) == pytest.approx(np.diff(alone.auc_interval) / 2, rel=0.1)
    row = repeated.to_row()
    assert (row["clusters_n_positive"], row["clusters_effective_positive"]) == (60, 60)
    assert row["auc_clusters_low"] == repeated.clusters.auc_interval[0]
    with pytest.raises(InvalidInput, match="a label for each of 60 positive scores, got 2"):
        evaluate(*groups, clusters=(range(2), range(120)))


def test_cluster_bootstrap_agrees_with_drawing_prompts_one_by_one():
    generator = np.random.default_rng(0)
    positive, negative = generator.normal(1, 1, 30).round(1), generator.normal(0, 1, 40).round(1)
    labels = (generator.integers(0, 8, 30), generator.integers(0, 9, 40))
    metrics = pytest.importorskip("sklearn.metrics")
    aucs = []
    for _ in range(600):
        drawn = []
        for scores, clusters in ((positive, labels[0]), (negative, labels[1])):
            names = np.unique(clusters)
            drawn.append(np.concatenate([scores[clusters == c] for c in generator.choice(names, len(names))]))
        both = np.concatenate(drawn)
        aucs.append(metrics.roc_auc_score(np.repeat([1, 0], [len(d) for d in drawn]), both))
    found = evaluate(positive, negative, clusters=(labels[0].tolist(), labels[1].tolist())).clusters
    # The noise of 600 samples.
    np.testing.assert_allclose(found.auc_interval, np.quantile(aucs, (0.025, 0.975)), atol=0.025)


def test_groups_of_positives_against_all_negatives():
    rows = []
    for row in REFERENCE["prompts"]:
        scores = row["step0"]["wen"]
        given = {"score_difference": float(np.mean(scores)), "score_difference_seeds": scores, "error": None}
        place = {"prompt": row["prompt"], "label": row["memorized"], "step": 0, "timestep": 981.0}
        rows.append(place | {"tier": row.get("tier")} | given)
    table = ScoreTable(rows)
    overall, *tiers = evaluate_table(table, "label", group_column="tier", bootstrap=20)
    assert overall.group is None
    assert [(item.group, item.n_negative) for item in tiers] == [("1", 120), ("2", 120), ("3", 120)]
    assert sum(item.n_positive for item in tiers) == 60
    # Known values of the recorded scores.
    assert [round(item.auc, 3) for item in tiers] == [0.825, 0.973, 0.997]
    assert tiers[0].to_row()["group"] == "1"
    with pytest.raises(InvalidInput, match="group_column: expected a column out of prompt, label"):
        evaluate_table(table, "label", group_column="kind")
    with pytest.raises(InvalidInput, match="'prompt' has 60"):
        evaluate_table(table, "label", group_column="prompt")


def test_what_was_not_measured_at_a_step_is_no_error():
    table = make_table()
    for row in table:
        if row["step"] == 10:
            row.update(score_difference=None, score_difference_seeds=None)
    (only,) = evaluate_table(table, "label", bootstrap=20)
    assert (only.step, only.n_errors, only.n_unmeasured) == (0, 0, 0)
    for row in table.rows[:3]:
        row.update(score_difference=None)
    (only,) = evaluate_table(table, "label", bootstrap=20)
    assert (only.n_errors, only.n_unmeasured) == (0, 2)
    for row in table:
        row.update(score_difference=None)
    with pytest.raises(InvalidInput, match="no metric was measured at any step"):
        evaluate_table(table, "label")


def test_costs_go_into_every_table():
    cost = {"score_difference": {"forwards": 2, "products": 0}}
    first, _ = evaluate_table(make_table(), "label", bootstrap=20, costs=cost)
    assert first.to_row()["cost_forwards"] == 2
    assert json.loads(json.dumps(first.to_dict()))["cost"] == cost["score_difference"]
    assert [column.header for column in evaluation_table([first]).columns][-2:] == ["forwards", "products"]
    with pytest.raises(
        InvalidInput, match="costs: expected a mapping of names to numbers for score_difference"
    ):
        evaluate_table(make_table(), "label", bootstrap=20, costs={"score_difference": 2})


def test_auc_over_seeds_is_that_of_the_means(tmp_path):
    rows = auc_over_seeds(LabelledScores.of(make_table(), "label"))
    assert [(row["step"], row["n_seeds"]) for row in rows] == [(s, n) for s in (0, 10) for n in (1, 2, 3, 4)]
    for row in rows:
        expected = evaluate(*recorded(f"step{row['step']}", "wen", row["n_seeds"]), bootstrap=5)
        assert row["auc"] == pytest.approx(expected.auc, abs=1e-12)
        assert (row["auc_low"], row["auc_high"]) == pytest.approx(expected.delong_interval, abs=1e-12)
    figure = plot_auc_over_seeds(rows, path=tmp_path / "seeds.png")
    assert [axes.get_title() for axes in figure.axes] == ["step 0", "step 10"]
    drawn = figure.axes[1].get_lines()[0].get_xydata()
    np.testing.assert_allclose(drawn[:, 1], [row["auc"] for row in rows[4:]])
    steps = plot_auc_over_steps(evaluate_table(make_table(), "label", bootstrap=5))
    assert steps.axes[0].get_lines()[0].get_xydata()[:, 0].tolist() == [0, 10]
    with pytest.raises(InvalidInput, match="nothing to plot"):
        plot_auc_over_seeds([])


def test_clusters_of_a_table():
    table = make_table()
    for k, row in enumerate(table):
        row["family"] = None if k < 4 else k // 20
    (by_column, _) = evaluate_table(table, "label", bootstrap=20, clusters="family")
    assert by_column.clusters.n_positive + by_column.clusters.n_negative == 2 + 18
    (near, _) = evaluate_table(table, "label", bootstrap=20, clusters="near")
    assert near.clusters.n_positive == 59  # two of the shipped prompts differ in a few letters
    (beginning, _) = evaluate_table(table, "label", bootstrap=20, clusters="beginning")
    assert beginning.clusters.n_positive == 4
    with pytest.raises(InvalidInput, match="clusters: expected near or beginning, or a column"):
        evaluate_table(table, "label", clusters="family2")


def test_repeated_prompts_are_paired_in_order_across_steps():
    rows = [
        {"prompt": prompt, "label": label, "step": step, "m": number, "m_seeds": [number], "error": None}
        for step in (0, 10)
        for number, (prompt, label) in enumerate(
            [("a", 1), ("a", 1), ("b", 0), ("a", 0), ("a", 1)], 10 * step
        )
    ]
    labelled = LabelledScores.of(ScoreTable(rows), "label")
    assert labelled.positive.tolist() == [True, True, False, False, True]
    assert labelled.scores == {("m", 0): [0, 1, 2, 3, 4], ("m", 10): [100, 101, 102, 103, 104]}
    assert labelled.prompts(True) == ["a", "a", "a"]
    assert labelled.column("prompt") == ["a", "a", "b", "a", "a"]
