"""The command `sharpcore evaluate`: how well scores separate memorized prompts, and what else does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sharpcore.cli_run import (
    LABEL,
    Column,
    Format,
    command_line,
    labelled_prompts,
    model_folder,
    say,
    with_options,
)
from sharpcore.cli_score import Scoring, write_scores
from sharpcore.errors import InvalidInput, MissingDependency
from sharpcore.table import ScoreTable, parquet_metadata, write_rows

if TYPE_CHECKING:
    from sharpcore.report.comparison import Comparison
    from sharpcore.report.confounds import Confounds
    from sharpcore.report.evaluation import Evaluation


# What decides on the numbers of an evaluation.
_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "scikit-learn")


@with_options
def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for scores, evaluation and pictures.")],
    input: Annotated[str | None, typer.Argument(help="Prompts of both kinds, with --label-column.")] = None,
    memorized: Annotated[str | None, typer.Option(help="Prompts that are memorized.")] = None,
    others: Annotated[str | None, typer.Option(help="Prompts that are not.")] = None,
    from_scores: Annotated[
        Path | None, typer.Option(help="A table of scores; nothing is scored anew.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column that says which prompts are memorized.")] = LABEL,
    positive: Annotated[
        list[str] | None, typer.Option(help="Label of the memorized ones; may be repeated.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Evaluate each group of memorized prompts too.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help='"METRIC,METRIC" (or METRIC@STEP); may be repeated. Default: all with the first.'),
    ] = None,
    clusters: Annotated[
        str, typer.Option(help="Prompts drawn together: near(-duplicates), beginning, a column, or none.")
    ] = "near",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id, for the rarity of tokens; default: the model's.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=1, help="Samples for the 95 % intervals.")] = 2000,
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of these samples.")] = 0,
    column: Column = "prompt",
    format: Format = None,
    *,
    options: Scoring,
) -> None:
    """How well each metric separates memorized prompts from others: AUC, TPR at low FPR, intervals, paired
    comparisons, and what the text of the prompts alone achieves.

    report.html in the folder has all of it on one page.
    """
    from sharpcore import doctor
    from sharpcore.report.comparison import compare_labelled
    from sharpcore.report.confounds import check_confounds
    from sharpcore.report.duplicates import compare_lists
    from sharpcore.report.evaluation import CLUSTERS, auc_over_seeds, evaluate_labelled
    from sharpcore.report.html import write_report
    from sharpcore.report.labels import LabelledScores, is_positive

    if (memorized is None) != (others is None):
        raise InvalidInput("--memorized and --others belong together")
    if sum(source is not None for source in (input, memorized, from_scores)) != 1:
        raise InvalidInput(
            "expected one source: INPUT with --label-column, --memorized and --others, or --from-scores"
        )
    pairs = None if not compare else [_pair(text) for text in compare]
    scores = from_scores or out / "scores.parquet"
    if (out / "evaluation.json").exists() and not (options.resume or options.overwrite):
        raise InvalidInput(f"{out / 'evaluation.json'}: it exists already; --overwrite replaces it")
    if from_scores is None:
        prompts = labelled_prompts(input, memorized, others, label_column, column, format)
        for row in prompts:
            is_positive(row.columns[label_column], label_column, positive)
        there = {name for row in prompts for name in row.columns}
        if group_column is not None and group_column not in there:
            raise InvalidInput(f"--group-column: the prompts have no column {group_column!r}")
        if clusters not in (*CLUSTERS, "none") and clusters not in there:
            raise InvalidInput(
                f"--clusters: expected {', '.join(CLUSTERS)}, none or a column; got {clusters!r}"
            )
        own = model_folder(options.model)[0] / "tokenizer"
        tokenizer = str(own) if tokenizer is None and own.is_dir() else tokenizer
        out.mkdir(parents=True, exist_ok=True)
        write_scores(prompts, scores, options)
    settings = parquet_metadata(scores).get("settings") if _is_parquet(scores) else None
    labelled = LabelledScores.of(ScoreTable.read(scores), label_column, positive=positive)
    evaluations = evaluate_labelled(
        labelled,
        bootstrap=bootstrap,
        seed=bootstrap_seed,
        group_column=group_column,
        clusters=None if clusters == "none" else clusters,
        costs=(settings or {}).get("costs"),
    )
    comparisons = compare_labelled(labelled, pairs=pairs, bootstrap=bootstrap, seed=bootstrap_seed)
    sides = labelled.prompts(True), labelled.prompts(False)
    lists, confounds, warnings = None, None, ["the table has no prompts: their text was not checked"]
    if all(sides):
        lists, confounds = compare_lists(*sides), check_confounds(*sides, tokenize=_tokenize(tokenizer))
        warnings = [*lists.warnings, *confounds.warnings, *confounds.notes]
    over_seeds = auc_over_seeds(labelled)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "command": command_line(context),
        "made_with": {"versions": doctor.versions(_PACKAGES), "machine": doctor.machine()},
        "scores": os.path.relpath(scores, out),
        "labels": {"column": label_column, "positive": positive, "group_column": group_column},
        "settings": settings,
        "evaluations": [item.to_dict() for item in evaluations],
        "comparisons": [item.to_dict() for item in comparisons],
        "auc_over_seeds": over_seeds,
        "confounds": None if confounds is None else confounds.to_dict(),
        "duplicates": None if lists is None else lists.to_dict(),
        "warnings": warnings,
    }
    (out / "evaluation.json").write_text(
        json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    lines = [item.to_row() for item in evaluations] + (confounds.to_rows() if confounds else [])
    _write_csv(out / "evaluation.csv", lines)
    _write_csv(out / "comparisons.csv", [item.to_row() for item in comparisons])
    _write_csv(out / "auc_over_seeds.csv", over_seeds)
    _draw(out, [item for item in evaluations if item.group is None], over_seeds)
    write_report(out, out / "report.html")
    _show(evaluations, confounds, comparisons)
    for warning in warnings:
        say(f"warning: {warning}")


def _draw(out: Path, evaluations: Sequence[Evaluation], over_seeds: Sequence[Mapping[str, Any]]) -> None:
    from sharpcore.report.figures import plot_auc_over_seeds, plot_auc_over_steps, plot_histograms, plot_roc

    plot_roc(evaluations, path=out / "roc.png")
    plot_histograms(evaluations, path=out / "histogram.png")
    if any(row["n_seeds"] > 1 for row in over_seeds):
        plot_auc_over_seeds(over_seeds, path=out / "auc_over_seeds.png")
    if len({item.step for item in evaluations}) > 1:
        plot_auc_over_steps(evaluations, path=out / "auc_over_steps.png")


def _show(
    evaluations: Sequence[Evaluation], confounds: Confounds | None, comparisons: Sequence[Comparison]
) -> None:
    from rich.console import Console

    from sharpcore.report.comparison import comparison_table
    from sharpcore.report.evaluation import evaluation_table

    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(evaluation_table(evaluations, confounds))
    if comparisons:
        console.print(comparison_table(comparisons))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows, or remove what an earlier run left where there are none."""
    if rows:
        write_rows(path, rows, dict.fromkeys((name for row in rows for name in row), "text"))
    else:
        path.unlink(missing_ok=True)


def _pair(text: str) -> tuple[str, str]:
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise InvalidInput(f'--compare: expected two different metrics like "a,b", got {text!r}')
    return names[0], names[1]


def _tokenize(tokenizer: str | None) -> Callable[[str], Sequence[int]] | None:
    """What gives the token numbers of a text, without those that every text has; None without a tokenizer."""
    if tokenizer is None:
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependency(
            'a tokenizer needs transformers: pip install "sharpcore[diffusers]"'
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInput(f"--tokenizer {tokenizer}: it cannot be loaded: {reason}") from None
    return lambda text: loaded.encode(text, add_special_tokens=False, verbose=False)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")
