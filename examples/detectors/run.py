"""Every detector on the shipped model: AUC by tier, cost, a cross-validated ensemble, a cascade.

    python examples/detectors/run.py --out detectors-output

scores the 60 memorized and 120 other prompts of the model with all detectors, and writes the scores, a table
detectors.csv and what limits the ensemble to the folder. It can be stopped and run again with --resume.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sharpcore import ScoreTable
from sharpcore.cli import app
from sharpcore.detect import DETECTORS, Cost
from sharpcore.detect.ensemble import Features, cross_validated, features_of, fit_cascade
from sharpcore.report.comparison import compare
from sharpcore.report.evaluation import Evaluation, evaluate
from sharpcore.table import parquet_metadata

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "sharpcore" / "models" / "tiny-sd-eps"
TRUTH = ROOT / "tests" / "data" / "tiny-sd-eps" / "ground_truth.json"
STEPS = "0,10,25,40"
# At more than the first step only those that need no more than a product.
EARLY = [name for name in DETECTORS if name not in ("score_difference", "hessian_score_difference")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="only so many prompts of either kind")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    prompts = _prompts(asked.out / "prompts.csv", asked.limit)
    whole = asked.out / "first_step.parquet", asked.out / "trajectory.parquet"
    _score(prompts, whole[0], ",".join(EARLY), "0", asked)
    _score(prompts, whole[1], "score_difference,hessian_score_difference,curvature_proxy", STEPS, asked)
    tables = [ScoreTable.read(path) for path in whole]
    parts = [features_of(table, "memorized") for table in tables]
    features = Features(
        parts[0].names + parts[1].names,
        parts[0].prompts,
        np.hstack([part.values for part in parts]),
        parts[0].labels,
    )
    assert parts[0].prompts == parts[1].prompts
    tiers = np.array([int(row["tier"]) for row in tables[0] if row["step"] == 0])
    costs = _costs(whole)
    rows = _rows(features, tiers, costs)
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


def _score(prompts: Path, output: Path, metrics: str, steps: str, asked: argparse.Namespace) -> None:
    options = ["--metrics", metrics, "--steps", steps, "--seeds", str(asked.seeds)]
    options += ["--resume" if asked.resume else "--overwrite"]
    app(["score", str(prompts), "-o", str(output), *options], standalone_mode=False)


def _costs(paths: Sequence[Path]) -> dict[str, Cost]:
    found: dict[str, Cost] = {}
    for path in reversed(paths):
        settings = parquet_metadata(path)["settings"]
        found |= {name: Cost(**cost) for name, cost in settings["costs"].items()}
    return found


def _rows(features: Features, tiers: np.ndarray, costs: dict[str, Cost]) -> list[dict[str, object]]:
    labels = features.labels
    scores = dict(zip(features.names, features.values.T, strict=True))
    first = [name for name in features.names if name.endswith("@0") or name.startswith("bright_ending")]
    cheap = [n for n in features.names if n.startswith(("score_difference", "hessian_score_difference"))]
    ensembles = {
        "ensemble, first step": first,
        "ensemble, score and Hessian differences at four steps": cheap,
        "ensemble, everything": list(features.names),
    }
    for name, columns in ensembles.items():
        chosen = Features(tuple(columns), features.prompts, np.stack([scores[c] for c in columns], 1), labels)
        scores[name] = cross_validated(chosen)
    rows = []
    for name, values in scores.items():
        whole = evaluate(values[labels], values[~labels])
        row = _row(name, whole, costs.get(name.partition("@")[0]))
        for tier in sorted(set(tiers[tiers > 0].tolist())):
            row[f"auc_tier_{tier}"] = evaluate(values[tiers == tier], values[~labels], bootstrap=1).auc
        rows.append(row)
    best = max(
        features.names,
        key=lambda name: evaluate(scores[name][labels], scores[name][~labels], bootstrap=1).auc,
    )
    for pair in compare(
        {name: scores[name].tolist() for name in (*ensembles, best)},
        labels.tolist(),
        pairs=[(name, best) for name in ensembles],
    ):
        row = next(row for row in rows if row["detector"] == pair.first)
        row |= {"better_than": best, "difference": pair.difference, "p_value": pair.p_value}
    for second in ("hessian_score_difference@0", "curvature_difference@0"):
        if second in features.names:
            cascade = fit_cascade(features, "score_difference@0", second, fpr=0.02)
            first_scores, second_scores = scores["score_difference@0"], scores[second]
            flagged = cascade.flagged(first_scores, second_scores)
            rows.append(
                {
                    "detector": f"cascade, score_difference@0 then {second}",
                    "passes": cascade.expected_cost(first_scores, costs),
                    "tpr": float(flagged[labels].mean()),
                    "fpr": float(flagged[~labels].mean()),
                }
            )
    return rows


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
    from rich.table import Table

    from sharpcore.cli_run import print_table

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title="shipped model: 60 memorized against 120 other prompts")
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(
            *(f"{row[n]:.3f}" if isinstance(row.get(n), float) else str(row.get(n, "")) for n in names)
        )
    print_table(table)


if __name__ == "__main__":
    sys.exit(main())
