"""Tests of calibration: p-values by hand, guarantees by simulation, the recorded scores, damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sharpcore.calibration import Calibration, calibrate, calibrate_table, clopper_pearson, needed
from sharpcore.errors import InvalidInput
from sharpcore.table import ScoreTable

REFERENCE = json.loads(
    (Path(__file__).parent / "data" / "tiny-sd-eps" / "reference_scores.json").read_text(encoding="utf-8")
)
SETTINGS = {
    "version": "0.1.0",
    "model": "tiny 0123456789abcdef",
    "seeds": [42, 43],
    "steps": [0],
    "metrics": ["score_difference"],
    "guidance": 7.5,
    "columns": [],
}


def recorded(metric, memorized, seeds=4):
    return np.array(
        [
            np.mean(row["step0"][metric][:seeds])
            for row in REFERENCE["prompts"]
            if row["memorized"] is memorized
        ]
    )


def test_p_values_by_hand():
    calibration = calibrate([3.0, 1.0, 2.0, 2.0])
    assert calibration.p_value([0.0, 1.0, 2.0, 2.5, 3.0, 3.5]).tolist() == [1, 1, 0.8, 0.4, 0.4, 0.2]
    assert calibration.p_value(2.5) == 0.4
    assert calibration.decide([[2.0, 2.5], [3.0, 4.0]], fpr=0.4).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 8, 99, 250])
def test_threshold_and_p_value_decide_alike(count, ties):
    generator = np.random.default_rng(count)
    draw = (lambda n: generator.integers(0, 12, n).astype(float)) if ties else generator.normal
    negatives = draw(count) if ties else draw(size=count)
    scores = np.concatenate([negatives, draw(300) if ties else draw(size=300)])
    calibration = calibrate(negatives)
    reached = (negatives[None] >= scores[:, None]).sum(axis=1)
    np.testing.assert_array_equal(calibration.p_value(scores), (1 + reached) / (count + 1))
    for fpr in (0.004, 0.01, 0.03, 1 / 3, 0.5, 0.9):
        threshold = calibration.at().threshold(fpr)
        expected = np.zeros(len(scores), bool) if threshold is None else scores > threshold
        np.testing.assert_array_equal(calibration.decide(scores, fpr=fpr), expected)
        assert (threshold is None) == (count < 1 / fpr - 1)


def test_smallest_number_of_negatives():
    for fpr, count in ((0.01, 99), (0.03, 33), (0.5, 1), (0.05, 19), (0.001, 999), (0.9, 1)):
        assert needed(fpr) == count
        assert calibrate(np.arange(float(count))).at().threshold(fpr) is not None
        if count > 1:
            assert calibrate(np.arange(count - 1.0)).at().threshold(fpr) is None


@pytest.mark.parametrize("ties", [False, True])
def test_the_false_positive_rate_holds_on_average(ties):
    # The marginal guarantee: over many calibrations, new negatives are flagged at most as often as asked.
    generator = np.random.default_rng(11)
    flagged, fpr, rounds = [], 0.05, 3000
    for _ in range(rounds):
        scores = generator.normal(size=50)
        scores = np.floor(2 * scores) if ties else scores
        flagged.append(calibrate(scores[:49]).decide(scores[49:], fpr=fpr)[0])
    rate = np.mean(flagged)
    # 49 negatives: k = 2 of 50, so that without ties the rate is 0.04, standard error 0.0036.
    # Measured 0.035, with ties 0.018.
    assert rate <= 0.04 + 3 * 0.0036
    if not ties:
        assert rate >= 0.04 - 3 * 0.0036
        assert calibrate(np.arange(49.0)).at().expected_fpr(fpr) == 0.04


def test_the_rate_of_one_calibration_is_beta_distributed():
    # Uniform scores: the rate of a threshold q is 1 - q exactly.
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(2)
    negatives = [calibrate(generator.random(60)).at() for _ in range(2000)]
    rates = np.array([1 - found.threshold(0.05) for found in negatives])
    assert negatives[0].allowed(0.05) == 3
    assert stats.kstest(rates, stats.beta(3, 58).cdf).pvalue > 0.001
    # Binomial: at most 2 of 60 lie above the point that is exceeded with probability x.
    for x in (0.03, 0.05, 0.1):
        assert negatives[0].probability(0.05, x) == pytest.approx(1 - stats.binom.cdf(2, 60, x), abs=1e-12)
    bound = negatives[0].bound(0.05)
    assert negatives[0].probability(0.05, bound) == pytest.approx(0.95)
    # 0.95 within three standard errors; measured 0.944.
    assert 0.935 <= np.mean(rates <= bound) <= 0.965


def test_nothing_is_flagged_with_too_few_negatives():
    negatives = calibrate([1.0, 2.0]).at()
    assert negatives.threshold(0.01) is None
    assert negatives.expected_fpr(0.01) == negatives.bound(0.01) == 0
    assert negatives.probability(0.01, 0.001) == 1
    assert not calibrate([1.0, 2.0]).decide([1e9], fpr=0.01).any()


def test_clopper_pearson_is_that_of_scipy_and_covers():
    stats = pytest.importorskip("scipy.stats")
    for successes, count in ((0, 1), (0, 30), (1, 30), (17, 30), (30, 30), (3, 1000)):
        expected = stats.binomtest(successes, count).proportion_ci(0.95, method="exact")
        assert clopper_pearson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    for rate in (0.01, 0.1, 0.5):
        masses = stats.binom.pmf(np.arange(41), 40, rate)
        inside = [low <= rate <= high for low, high in (clopper_pearson(k, 40) for k in range(41))]
        assert masses[inside].sum() >= 0.95
    with pytest.raises(InvalidInput, match="successes"):
        clopper_pearson(3, 2)


def test_held_out_negatives_check_the_threshold():
    scores = np.random.default_rng(0).normal(size=300)
    calibration = calibrate(scores, validation_share=0.4, seed=3)
    negatives = calibration.at()
    assert (len(negatives.scores), len(negatives.held_out)) == (180, 120)
    np.testing.assert_array_equal(np.sort([*negatives.scores, *negatives.held_out]), np.sort(scores))
    checked = negatives.validation(0.05)
    assert checked.flagged == (negatives.held_out > negatives.threshold(0.05)).sum()
    assert checked.interval == clopper_pearson(checked.flagged, 120)
    assert calibrate(scores, validation_share=0.4, seed=3).checksum == calibration.checksum
    assert calibrate(scores, validation_share=0.4, seed=4).checksum != calibration.checksum
    assert calibrate(scores).at().validation(0.05) is None


def test_groups_are_held_out_as_a_whole():
    groups = np.repeat(np.arange(30), 4)
    calibration = calibrate(groups.astype(float), validation_share=0.3, groups=groups.tolist())
    held_out = set(calibration.at().held_out)
    assert len(held_out) == 9
    assert not held_out & set(calibration.at().scores)


@pytest.mark.parametrize("metric", ["wen", "hvp"])
def test_the_rate_holds_on_recorded_scores_that_were_not_used(metric):
    negatives, fpr = recorded(metric, False), 0.05
    generator = np.random.default_rng(1)
    rates, expected = [], []
    for _ in range(400):
        order = generator.permutation(len(negatives))
        calibration = calibrate(negatives[order[:80]])
        rates.append(calibration.decide(negatives[order[80:]], fpr=fpr).mean())
        expected.append(calibration.at().expected_fpr(fpr))
    assert expected[0] == 4 / 81
    # The mean over all splits is the expectation; measured 0.047 and 0.046 of 0.049.
    assert abs(np.mean(rates) - expected[0]) < 0.006
    flagged = calibrate(negatives).decide(recorded(metric, True), fpr=fpr)
    assert flagged.mean() > 0.15  # memorized prompts; measured 0.75 and 0.20


def test_a_file_keeps_everything(tmp_path):
    scores = {("a", 0): np.arange(40.0), ("a", 10): np.arange(40.0) ** 0.5, ("b", 0): np.ones(40)}
    calibration = calibrate(scores, settings=SETTINGS, validation_share=0.25, seed=5)
    calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded.checksum == calibration.checksum
    assert list(loaded.negatives) == list(scores)
    assert loaded.p_value(5.0, "a", 10) == calibration.p_value(5.0, "a", 10)
    assert (loaded.settings, loaded.validation_share, loaded.seed) == (SETTINGS, 0.25, 5)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "c.json").read_bytes()
    with pytest.raises(
        InvalidInput, match="out of: a at step 0, a at step 10, b at step 0; got 'a' and None"
    ):
        loaded.p_value(1.0, "a")
    with pytest.raises(InvalidInput, match="got 'c' and 0"):
        loaded.decide(1.0, fpr=0.1, metric="c", step=0)


def test_damaged_and_unknown_files(tmp_path):
    path = tmp_path / "c.json"
    calibrate(np.arange(5.0), settings=SETTINGS).save(path)
    document = json.loads(path.read_text(encoding="utf-8"))

    def message(text):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InvalidInput, match=r"c\.json") as error:
            Calibration.load(path)
        return str(error.value)

    whole = json.dumps(document)
    assert "not a calibration file, or damaged" in message(whole[:-20])
    assert "not a calibration file, or damaged" in message(whole.replace("4.0", "NaN"))
    assert "checksum" in message(whole.replace("3.0", "3.5"))
    assert "not a calibration file: it has no" in message("[]")
    assert "not a calibration file: it has no" in message('{"a": 1}')
    assert "the version 2, this sharpcore knows 1" in message(
        json.dumps(document | {"sharpcore_calibration": 2})
    )
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="damaged"):
        Calibration.load(path)
    with pytest.raises(InvalidInput, match="no such file"):
        Calibration.load(tmp_path / "missing.json")


def test_check_names_the_setting_that_differs(tmp_path):
    calibration = calibrate({("score_difference", 0): np.arange(5.0)}, settings=SETTINGS)
    calibration.check(SETTINGS)
    free = {
        "columns": ["x"],
        "backend": "reference",
        "model": "elsewhere 0123456789abcdef",
        "seeds": (42, 43),
    }
    calibration.check(SETTINGS | free)
    for name, value, said in [
        ("model", "tiny fedcba9876543210", "model"),
        ("seeds", [42], r"seeds \(there \[42, 43\], now \[42\]\)"),
        ("steps", [0, 10], r"steps \(there \[0\], now \[0, 10\]\)"),
        ("metrics", ["other"], r"metrics \(there \['score_difference'\], now \['other'\]\)"),
        ("guidance", 5.0, r"guidance \(there 7.5, now 5.0\)"),
        ("version", "0.2.0", "version"),
        ("dtype", "float16", r"dtype \(there None, now 'float16'\)"),
    ]:
        with pytest.raises(InvalidInput, match=f"made for another setting: {said}"):
            calibration.check(SETTINGS | {name: value})


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {}, "non-empty"),
        ([1.0, float("nan")], {}, "scores: expected finite numbers, got nan at index 1"),
        ([[1.0]], {}, r"shape \(1, 1\)"),
        (["a"], {}, "expected numbers"),
        ({("a", 0): [1.0], ("b", 0): [1.0, 2.0]}, {}, r"lengths \[1, 2\]"),
        ({("a", 0): [float("inf")]}, {}, "a at step 0: expected finite"),
        ([1.0], {"validation_share": 1.0}, "validation_share"),
        ([1.0], {"validation_share": 0.9}, "leaves none"),
        ([1.0], {"groups": [1, 2]}, "groups: expected 1"),
    ],
)
def test_bad_scores(scores, options, message):
    with pytest.raises(InvalidInput, match=message):
        calibrate(scores, **options)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2, float("nan"), True, "0.1"])
def test_bad_rates(rate):
    calibration = calibrate([1.0, 2.0])
    for call in (calibration.at().threshold, calibration.at().validation, needed):
        with pytest.raises(InvalidInput, match="fpr: expected a number between 0 and 1"):
            call(rate)
    with pytest.raises(InvalidInput, match="fpr: expected"):
        calibration.decide([1.0], fpr=rate)
    with pytest.raises(InvalidInput, match="expected finite numbers, got nan"):
        calibration.p_value([float("nan")])


def test_settings_must_be_json(tmp_path):
    with pytest.raises(InvalidInput, match="settings: expected what JSON can hold"):
        calibrate([1.0], settings={"a": object()}).save(tmp_path / "c.json")


def make_table(prompts, **changes):
    rows = []
    for k, prompt in enumerate(prompts):
        for step in (0, 10):
            row = {
                "prompt": prompt,
                "step": step,
                "timestep": 1.0,
                "m": k + step / 10.0,
                "m_seeds": [],
                "error": None,
            }
            rows.append(row | {"n": None if step else 2.0 * k, "n_seeds": None})
    for index, change in changes.items():
        rows[int(index[1:])].update(change)
    return ScoreTable(rows)


def test_of_a_table_without_repetitions_and_errors():
    table = make_table(
        ["a", "b", "A ", "c"], r6={"m": None, "n": None, "error": "x"}, r7={"m": None, "error": "x"}
    )
    calibration = calibrate_table(table)
    assert list(calibration.negatives) == [("m", 0), ("m", 10), ("n", 0)]
    assert calibration.at("m", 10).scores.tolist() == [1, 2]
    with pytest.raises(InvalidInput, match="m at step 0: 1 of 2 prompts without an error have no score"):
        calibrate_table(make_table(["a", "b"], r0={"m": None}))
    with pytest.raises(InvalidInput, match="no score of a negative"):
        calibrate_table(ScoreTable([]))


def test_decided_rows():
    calibration = calibrate({("m", 0): [1.0, 2.0, 3.0]})
    rows = [
        {"prompt": "a", "step": 0, "m": 2.5, "error": None},
        {"prompt": "", "step": 0, "m": None, "error": "x"},
    ]
    first, second = calibration.decided(rows, ["m"], fpr=0.5)
    assert first == {"prompt": "a", "step": 0, "m": 2.5, "m_p": 0.5, "m_flagged": True, "error": None}
    assert (second["m_p"], second["m_flagged"], list(second)) == (None, None, list(first))
    # A metric that was not measured at a step, neither here nor of the negatives.
    (row,) = calibration.decided([{"prompt": "a", "step": 7, "m": None, "error": None}], ["m"], fpr=0.5)
    assert (row["m_p"], row["m_flagged"], row["error"]) == (None, None, None)
