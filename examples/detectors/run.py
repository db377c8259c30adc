"""Every detector on the shipped model: AUC by tier, cost, a cross-validated ensemble, a cascade.

    python examples/detectors/run.py --out detectors-output

scores the 60 memorized and 120 other prompts of the model with all detectors, and writes the scores and a
table detectors.csv to the folder. It can be stopped and run again with --resume.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from sharpcore import ScoreTable
from sharpcore.cli import app
from sharpcore.cli_run import print_table
from sharpcore.detect import Cost, cost_of, make_detectors
from sharpcore.detect.ensemble import Features, cross_validated, features_of, fit_cascade
from sharpcore.report.comparison import compare
from sharpcore.report.evaluation import Evaluation, evaluate

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "sharpcore" / "models" / "tiny-sd-eps"
TRUTH = ROOT / "tests" / "data" / "tiny-sd-eps" / "ground_truth.json"
# Entries of a latent of the shipped model.
DIMENSION = 4 * 16 * 16
SPECTRUM = (
    "negative_fraction",
    "least_curvature",
    "greatest_curvature",
    "codimension_flipd",
    "codimension_lhsd",
)
# Along one trajectory, four seeds; probes as few as the number of prompts allows.
ALONG = (
    "score_difference", "hessian_score_difference", "anisotropy", "attention_entropy",
    "attention_entropy_layer", "bright_ending", "curvature_difference:probes=8", "curvature_proxy",
    "condition_jacobian:probes=4", "p_laplace:probes=8",
)  # fmt: skip
# In the middle of the trajectory, where spectra of the two kinds of prompts differ most; one seed.
RUNS = {
    "trajectory": (ALONG, "0,10,25,40", 4),
    "spectrum": (SPECTRUM, "25", 1),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="only so many prompts of either kind")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    prompts = _prompts(asked.out / "prompts.csv", asked.limit)
    tables = {name: _score(prompts, asked.out / f"{name}.parquet", *RUNS[name], asked) for name in RUNS}
    parts = [features_of(table, "memorized") for table in tables.values()]
    features = Features(
        sum((part.names for part in parts), ()),
        parts[0].prompts,
        np.hstack([part.values for part in parts]),
        parts[0].labels,
    )
    if len({part.prompts for part in parts}) != 1:
        raise SystemExit("some prompts lack scores; see the error column of the tables")
    first = tables["trajectory"].steps[0]
    tiers = np.array([int(row["tier"]) for row in tables["trajectory"] if row["step"] == first])
    rows = _rows(features, tiers)
    _write(asked.out / "detectors.csv", rows)
    _print(rows)
    return 0


def _prompts(path: Path, limit: int | None) -> Path:
    truth = json.loads(TRUTH.read_text(encoding="utf-8"))
    tiers = {item["caption"]: item["tier"] for item in truth["memorized"]}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "memorized", "tier"))
        for name, label in (("prompts_mem.txt", 1), ("prompts_nonmem.txt", 0)):
            lines = (MODEL / name).read_text(encoding="utf-8").splitlines()
            # Spread over the file, whose digits and tiers follow each other.
            chosen = lines if limit is None else lines[:: max(1, len(lines) // limit)][:limit]
            writer.writerows((prompt, label, tiers.get(prompt, 0)) for prompt in chosen)
    return path


def _score(
    prompts: Path,
    output: Path,
    metrics: Sequence[str],
    steps: str,
    seeds: int,
    asked: argparse.Namespace,
) -> ScoreTable:
    options = ["--metrics", ",".join(metrics), "--steps", steps, "--seeds", str(seeds)]
    options += ["--resume" if asked.resume else "--overwrite"]
    app(["score", str(prompts), "-o", str(output), *options], standalone_mode=False)
    return ScoreTable.read(output)


def _costs(names: Sequence[str]) -> dict[str, Cost]:
    """Of each detector alone at its step, the way there included, for one prompt and seed."""
    found = {}
    for metric in (*ALONG, *SPECTRUM):
        (detector,) = make_detectors([metric])
        for name in names:
            if name.partition("@")[0] == detector.name:
                step = int(name.partition("@")[2])
                found[name] = cost_of([detector], dimension=DIMENSION, steps=(step,))
    return found


def _rows(features: Features, tiers: np.ndarray) -> list[dict[str, object]]:
    labels, costs = features.labels, _costs(features.names)
    scores = dict(zip(features.names, features.values.T, strict=True))
    differences = [
        n for n in features.names if n.startswith(("score_difference", "hessian_score_difference"))
    ]
    ensembles = {
        "ensemble of the first step": [name for name in features.names if name.endswith("@0")],
        "ensemble of score and Hessian differences": differences,
        "ensemble of all": list(features.names),
    }
    for name, columns in ensembles.items():
        chosen = Features(tuple(columns), features.prompts, np.stack([scores[c] for c in columns], 1), labels)
        scores[name] = cross_validated(chosen)
    rows = []
    for name, values in scores.items():
        row = _row(name, evaluate(values[labels], values[~labels]), costs.get(name))
        for tier in sorted(set(tiers[tiers > 0].tolist())):
            row[f"auc_tier_{tier}"] = evaluate(values[tiers == tier], values[~labels], bootstrap=1).auc
        rows.append(row)
    # Each against the best single one of its own columns, which was chosen by looking at the results.
    areas = {str(row["detector"]): row["auc"] for row in rows}
    pairs = [(name, max(columns, key=areas.__getitem__)) for name, columns in ensembles.items()]
    for pair in compare(
        {name: column.tolist() for name, column in scores.items()}, labels.tolist(), pairs=pairs
    ):
        row = next(row for row in rows if row["detector"] == pair.first)
        row |= {"compared_with": pair.second, "difference": pair.difference, "p_value": pair.p_value}
    return rows + [_cascade(features, scores, costs, second) for second in differences if "hessian" in second]


def _cascade(
    features: Features, scores: dict[str, np.ndarray], costs: dict[str, Cost], expensive: str
) -> dict[str, object]:
    """Limits from one half of the prompts, decisions on the other."""
    # At random: neighbours in the files differ in one word.
    half = np.random.default_rng(0).permutation(len(features.labels)) % 2 == 0
    fitted = Features(
        features.names,
        tuple(p for p, chosen in zip(features.prompts, half, strict=True) if chosen),
        features.values[half],
        features.labels[half],
    )
    cheap = "score_difference@0"
    cascade = fit_cascade(fitted, cheap, expensive, fpr=0.05)
    labels = features.labels[~half]
    flagged = cascade.flagged(scores[cheap][~half], scores[expensive][~half])
    return {
        "detector": f"cascade: {cheap}, then {expensive}",
        "passes": cascade.expected_cost(scores[cheap][~half], costs),
        "tpr": float(flagged[labels].mean()),
        "fpr": float(flagged[~labels].mean()),
    }


def _row(name: str, found: Evaluation, cost: Cost | None) -> dict[str, object]:
    point = found.operating_points[0]
    row: dict[str, object] = {"detector": name}
    if cost is not None:
        row |= {"passes": cost.passes, "products": cost.products}
        row |= {"shared_passes": cost.shared_passes, "shared_products": cost.shared_products}
    low, high = found.auc_interval
    return row | {"auc": found.auc, "auc_low": low, "auc_high": high, "tpr_at_1pct": point.tpr}


def _write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def _print(rows: Sequence[dict[str, object]]) -> None:
    table = Table(title="shipped model: memorized against other prompts")
    names = ("detector", "passes", "products", "auc", "tpr_at_1pct", "tiers")
    for name in names:
        table.add_column(name)
    for row in rows:
        if "auc" not in row:
            continue
        tiers = ", ".join(f"{value:.3f}" for name, value in row.items() if name.startswith("auc_tier"))
        auc = "{auc:.3f} ({auc_low:.3f} to {auc_high:.3f})".format(**row)
        cost = [str(row.get(name, "")) for name in ("passes", "products")]
        table.add_row(str(row["detector"]), *cost, auc, f"{row['tpr_at_1pct']:.3f}", tiers)
    print_table(table)
    for row in rows:
        if "compared_with" in row:
            print("{detector}: {difference:+.3f} against {compared_with}, p = {p_value}".format(**row))
        if "fpr" in row:
            print(
                "{detector}: TPR {tpr:.3f} at FPR {fpr:.3f}, {passes:.1f} passes and products".format(**row)
            )


if __name__ == "__main__":
    sys.exit(main())
