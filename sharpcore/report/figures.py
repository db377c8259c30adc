"""Pictures of scores as PNG: ROC curves, distributions, AUC over seeds and steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpcore.errors import InvalidInput, MissingDependency
from sharpcore.report.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#c0392b", "#2c6fa6", "#3d8b53", "#8e5ba6", "#b07d2b", "#4d4d4d")
# Where the colours begin again, lines of another kind tell curves apart.
_LINES = ("-", "--", ":", "-.")
_STYLES = tuple((color, line) for line in _LINES for color in _COLORS)
# A legend of more curves than this hides them: it goes below.
_MOST_INSIDE = 4
_GRID = {"color": "0.9", "linewidth": 0.8}


def plot_roc(evaluations: Sequence[Evaluation], *, path: str | Path | None = None) -> Figure:
    """ROC curves, one panel per step and one curve per metric, with the points at the target false positive
    rates.

    Returns the figure and saves it as PNG if `path` is given. Raises InvalidInput without evaluations.
    """
    steps = list(dict.fromkeys(item.step for item in evaluations))
    most = max((sum(item.step == step for item in evaluations) for step in steps), default=0)
    below = 0.19 * most if most > _MOST_INSIDE else 0.0
    figure, panels = _panels(1, len(steps), width=4.6, height=4.9 + below)
    for axes, step in zip(panels[0], steps, strict=True):
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=1, linestyle="--", zorder=1)
        for item, (color, line) in zip(
            (e for e in evaluations if e.step == step), _STYLES * len(evaluations), strict=False
        ):
            low, high = item.auc_interval
            label = f"{_words(item.metric or 'score')}\nAUC {item.auc:.3f} ({low:.3f} to {high:.3f})"
            axes.plot(
                *item.curve(),
                color=color,
                linestyle=line,
                linewidth=1.8,
                label=label,
                solid_joinstyle="miter",
            )
            points = item.operating_points
            axes.plot([p.fpr for p in points], [p.tpr for p in points], "o", color=color, markersize=5)
        axes.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), aspect="equal", title=_step(step))
        targets = " and ".join(f"{100 * point.target_fpr:g} %" for point in evaluations[0].operating_points)
        note = f" (dots: at most {targets})" if targets else ""
        axes.set(xlabel=f"false positive rate{note}", ylabel="true positive rate")
        _legend(axes, most)
    first = evaluations[0]
    figure.suptitle(
        f"{first.n_positive} memorized and {first.n_negative} other prompts", fontsize=10, color="0.3"
    )
    return _saved(figure, path)


def plot_histograms(evaluations: Sequence[Evaluation], *, path: str | Path | None = None) -> Figure:
    """Distributions of the memorized and the other prompts, a row per metric and a column per step, with
    thresholds.

    Returns the figure and saves it as PNG if `path` is given. Raises InvalidInput without evaluations.
    """
    panels = {
        (item.metric or "score", item.step): {"memorized": item.positive, "other": item.negative}
        for item in evaluations
    }
    thresholds = {
        (item.metric or "score", item.step): {
            f"{100 * point.target_fpr:g} % FPR": point.threshold for point in item.operating_points
        }
        for item in evaluations
    }
    return plot_distributions(panels, thresholds=thresholds, path=path)


def plot_distributions(
    panels: Mapping[tuple[str, Any], Mapping[str, Any]],
    *,
    thresholds: Mapping[tuple[str, int | None], Mapping[str, float]] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Histograms of groups of scores in one panel per (metric, step); `thresholds` are drawn as vertical
    lines.

    A group is a list of finite numbers. Returns the figure and saves it as PNG if `path` is given. Raises
    InvalidInput if there is no score to draw.
    """
    metrics = list(dict.fromkeys(metric for metric, _ in panels))
    steps = list(dict.fromkeys(step for _, step in panels))
    if not any(len(scores) for groups in panels.values() for scores in groups.values()):
        raise InvalidInput("there is no score to plot")
    figure, grid = _panels(len(metrics), len(steps), width=5.2, height=3.3)
    for axes in grid.flat:
        axes.set_visible(False)
    for (metric, step), groups in panels.items():
        axes = grid[metrics.index(metric)][steps.index(step)]
        filled = {
            name: np.asarray(scores, dtype=np.float64) for name, scores in groups.items() if len(scores)
        }
        if not filled:
            continue
        axes.set_visible(True)
        axes.set(title=_step(step), xlabel=_words(metric), ylabel="share of the group")
        edges = _edges(np.concatenate(list(filled.values())))
        for (name, scores), color in zip(filled.items(), _COLORS * len(filled), strict=False):
            weights = np.full(len(scores), 1 / len(scores))
            style = {"bins": edges, "weights": weights, "color": color}
            axes.hist(scores, **style, alpha=0.3)
            axes.hist(scores, **style, histtype="step", linewidth=1.4, label=f"{name} ({len(scores)})")
        axes.margins(x=0.02)
        styles = ((0, (5, 2)), (0, (1, 1.5)), "-.")
        lines = (thresholds or {}).get((metric, step), {}).items()
        for (name, value), line in zip(lines, styles, strict=False):
            axes.axvline(value, color="0.25", linewidth=1.2, linestyle=line, label=f"threshold at {name}")
        # Room for the legend above the bars.
        axes.set_ylim(top=(1.1 + 0.1 * len(axes.get_legend_handles_labels()[0])) * axes.get_ylim()[1])
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="upper right")
    return _saved(figure, path)


def plot_auc_over_seeds(rows: Sequence[Mapping[str, Any]], *, path: str | Path | None = None) -> Figure:
    """AUC over the number of seeds whose scores are averaged, a panel per step and a curve per metric, with
    DeLong's 95 % intervals as bands.

    `rows` are those of `auc_over_seeds`. Returns the figure and saves it as PNG if `path` is given. Raises
    InvalidInput without rows.
    """
    return _plot_auc(rows, "n_seeds", "seeds averaged", [row["step"] for row in rows], path)


def plot_auc_over_steps(evaluations: Sequence[Evaluation], *, path: str | Path | None = None) -> Figure:
    """AUC over denoising steps, a curve per metric, with DeLong's 95 % intervals as bands.

    Returns the figure and saves it as PNG if `path` is given. Raises InvalidInput without evaluations.
    """
    rows = []
    for item in evaluations:
        low, high = item.delong_interval or (None, None)
        rows.append(
            {"metric": item.metric, "step": item.step, "auc": item.auc, "auc_low": low, "auc_high": high}
        )
    return _plot_auc(rows, "step", "denoising step", [None] * len(rows), path)


def _plot_auc(
    rows: Sequence[Mapping[str, Any]],
    over: str,
    words: str,
    panels: Sequence[int | None],
    path: str | Path | None,
) -> Figure:
    """Curves of the AUC over a column of the rows, in the panel that each row belongs to."""
    titles = list(dict.fromkeys(panels))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    below = 0.1 * len(metrics) if len(metrics) > _MOST_INSIDE else 0.0
    figure, grid = _panels(1, len(titles), width=5.2, height=3.8 + below)
    for axes, title in zip(grid[0], titles, strict=True):
        for metric, (color, line) in zip(metrics, _STYLES * len(metrics), strict=False):
            here = [
                row
                for row, panel in zip(rows, panels, strict=True)
                if panel == title and row["metric"] == metric
            ]
            if not here:
                continue
            here.sort(key=lambda row: row[over])
            places = [row[over] for row in here]
            low, high = (
                [math.nan if row[end] is None else row[end] for row in here]
                for end in ("auc_low", "auc_high")
            )
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
            label = _words(metric or "score")
            aucs = [row["auc"] for row in here]
            axes.plot(places, aucs, "o", linestyle=line, color=color, markersize=4, label=label)
        axes.axhline(0.5, color="0.75", linewidth=1, linestyle="--", zorder=1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=_step(title), xlabel=words, ylabel="AUC")
        _legend(axes, len(metrics))
    return _saved(figure, path)


def _legend(axes: Any, most: int) -> None:
    """In the corner, or below the axes where it would hide what `most` curves show."""
    style = {"fontsize": 8, "framealpha": 0.85, "edgecolor": "none"}
    if most > _MOST_INSIDE:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, **style)
    else:
        axes.legend(loc="lower right", **style)


def _edges(scores: np.ndarray) -> np.ndarray:
    """Histogram edges shared by the groups: the Freedman-Diaconis width, halved, between 16 and 60 bins."""
    low, high = float(scores.min()), float(scores.max())
    if not high > low:
        margin = abs(low) / 2 or 0.5
        return np.linspace(low - margin, low + margin, 17)
    spread = float(np.subtract(*np.quantile(scores, (0.75, 0.25))))
    width = spread / len(scores) ** (1 / 3)
    bins = int(np.ceil((high - low) / width)) if width > 0 else 16
    return np.linspace(low, high, min(max(bins, 16), 60) + 1)


def _panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("pictures need matplotlib: pip install matplotlib") from None
    if rows * columns == 0:
        raise InvalidInput("there is nothing to plot: no evaluations or no scores were given")
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(**_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    return figure, grid


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("hessian", "Hessian")


def _step(step: int | None) -> str:
    return "" if step is None else f"step {step}"


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, format="png", dpi=150)
    return figure
