"""Pictures of spectra as PNG: densities, eigenvalues over steps, memorized prompts against others, modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpcore.errors import InvalidInput
from sharpcore.report.evaluation import POSITIVE_LABELS
from sharpcore.report.figures import _COLORS, _panels, _saved, _step, plot_distributions
from sharpcore.table import Row, ScoreTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sharpcore.posterior import PosteriorModes

# More curves than this in one panel are told apart by nothing.
_MOST_NAMED = 6
_MOST_GROUPS = 6
#: What `plot_groups` compares.
GROUPED = ("largest_eigenvalue", "smallest_eigenvalue", "nonnegative", "nonnegative_mass", "trace", "flipd")


def plot_densities(
    table: ScoreTable, *, path: str | Path | None = None, label_column: str | None = None
) -> Figure:
    """The density of the eigenvalues of each prompt, a panel per step; zero is marked.

    A band shows two standard errors where the density was estimated. With a label column (default:
    `memorized` or `label`, if there is one) its values are the colours. Returns the figure and saves it as
    PNG if `path` is given. Raises InvalidInput for a table without spectra or with more than 6 labels.
    """
    rows, steps = _with(table, "density")
    style = _styles(table, rows, label_column)
    figure, grid = _panels(1, len(steps), width=5.2, height=3.8)
    for axes, step in zip(grid[0], steps, strict=True):
        shown: set[str] = set()
        for row in rows:
            if row["step"] != step:
                continue
            name, color = style(row)
            x, y = np.asarray(row["density_grid"]), np.asarray(row["density"])
            error = 2 * np.asarray(row["density_se"])
            axes.plot(x, y, color=color, linewidth=1.2, alpha=0.85, label=None if name in shown else name)
            if error.any():
                axes.fill_between(
                    x, np.maximum(y - error, 0), y + error, color=color, alpha=0.15, linewidth=0
                )
            shown.add(name)
        axes.axvline(0, color="0.25", linewidth=0.9, linestyle="--")
        axes.set(title=_step(step), xlabel="eigenvalue of the Hessian", ylabel="density")
        # The few eigenvalues outside of the bulk are what one looks for.
        axes.set_yscale("symlog", linthresh=_smallest_step(axes))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="upper left")
    return _saved(figure, path)


def plot_steps(
    table: ScoreTable, *, path: str | Path | None = None, label_column: str | None = None
) -> Figure:
    """The largest and the smallest eigenvalue, and how many are not negative, over the steps.

    One line per prompt and seed, coloured as in `plot_densities`; returns, saves and raises as that.
    """
    rows, steps = _with(table, "largest_eigenvalue")
    style = _styles(table, rows, label_column)
    panels = {
        "largest_eigenvalue": "largest eigenvalue",
        "smallest_eigenvalue": "smallest eigenvalue",
        "nonnegative": "eigenvalues that are not negative",
    }
    figure, grid = _panels(1, len(panels), width=4.8, height=3.8)
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["prompt"], row["seed"], *style(row)), []).append(row)
    for axes, (column, title) in zip(grid[0], panels.items(), strict=True):
        shown: set[str] = set()
        for (_, _, name, color), several in lines.items():
            line = sorted((row for row in several if row[column] is not None), key=lambda row: row["step"])
            axes.errorbar(
                [row["step"] for row in line],
                [row[column] for row in line],
                yerr=[row.get(f"{column}_se") or 0.0 for row in line],
                color=color,
                marker="o",
                markersize=4,
                linewidth=1.2,
                alpha=0.8,
                label=None if name in shown else name,
            )
            shown.add(name)
        if column == "nonnegative":
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=-0.05)
        else:
            axes.set_yscale("symlog", linthresh=0.1)
            values = [row[column] for row in rows]
            if min(values) < 0 < max(values):
                axes.axhline(0, color="0.25", linewidth=0.9, linestyle="--")
        axes.set(title=title, xlabel="step", xticks=steps)
    grid[0][0].legend(fontsize=8, framealpha=0.85, edgecolor="none")
    return _saved(figure, path)


def plot_groups(
    table: ScoreTable,
    *,
    path: str | Path | None = None,
    label_column: str | None = None,
    columns: Sequence[str] = GROUPED,
) -> Figure:
    """Distributions of numbers of the spectra, memorized prompts against others: a row per column, steps
    across.

    Groups are the values of the label column (default: `memorized` or `label`). Returns, saves and raises as
    `plot_densities`; InvalidInput also for a table without labels.
    """
    label = _label_column(table, label_column)
    if label is None:
        raise InvalidInput("label_column: expected a column that says which prompts are memorized")
    rows, steps = _with(table, "largest_eigenvalue")
    groups = _groups(rows, label)
    panels = {
        (column, step): {
            name: [
                row[column]
                for row in rows
                if row["step"] == step and str(row.get(label)) == value and row[column] is not None
            ]
            for value, name in groups.items()
        }
        for column in columns
        if any(row.get(column) is not None for row in rows)
        for step in steps
    }
    return plot_distributions(panels, path=path)


def plot_modes(
    modes: PosteriorModes,
    pipe: Any,
    *,
    sample: int = 0,
    scales: Sequence[float] = (-2, -1, 0, 1, 2),
    path: str | Path | None = None,
) -> Figure:
    """What the clean image of one state may be: mean + c standard deviations along each mode, a row per mode.

    Returns the figure and saves it as PNG if `path` is given. Raises InvalidInput for a sample that is not
    there, and as `PosteriorModes.images`.
    """
    count = len(modes.variances)
    if not 0 <= sample < count:
        raise InvalidInput(f"sample: expected 0 to {count - 1}; got {sample}")
    pictures = modes.images(pipe, scales)[sample]
    deviations = modes.standard_deviations[sample].tolist()
    figure, grid = _panels(len(pictures), len(scales), width=1.5, height=1.6)
    for row, line, deviation in zip(grid, pictures, deviations, strict=True):
        for axes, picture, scale in zip(row, line, scales, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.grid(False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(f"{scale:+g} s.d." if scale else "mean", fontsize=8)
        row[0].set_ylabel(f"s.d. {deviation:.2g}", fontsize=8)
    return _saved(figure, path)


def _with(table: ScoreTable, column: str) -> tuple[list[Row], list[int]]:
    """The rows that have a value in a column, and their steps."""
    rows = [row for row in table if row.get(column) is not None]
    if not rows:
        raise InvalidInput(f"the table has no spectra to plot: no row has a {column}")
    return rows, sorted({row["step"] for row in rows})


def _label_column(table: ScoreTable, label_column: str | None) -> str | None:
    if label_column is None:
        return next((name for name in ("memorized", "label") if name in table.columns), None)
    if label_column not in table.columns:
        there = ", ".join(table.columns)
        raise InvalidInput(f"label_column: expected one of {there}; got {label_column!r}")
    return label_column


def _groups(rows: Sequence[Row], label: str) -> dict[str, str]:
    """Names of the groups by the label's text, the memorized ones first."""
    values = {str(row.get(label)) for row in rows}
    if len(values) > _MOST_GROUPS:
        raise InvalidInput(
            f"label_column: expected at most {_MOST_GROUPS} distinct labels; {label!r} has {len(values)}"
        )
    ordered = sorted(values, key=lambda value: (value.lower() not in POSITIVE_LABELS, value))
    return {value: f"{label}: {value}" for value in ordered}


def _styles(table: ScoreTable, rows: list[Row], label_column: str | None) -> Callable[[Row], tuple[str, str]]:
    """What gives a row's curve its name and colour: its label or, without labels, its prompt."""
    label = _label_column(table, label_column)
    if label is not None:
        groups = _groups(rows, label)
        by_label = dict(zip(groups, zip(groups.values(), _COLORS, strict=False), strict=False))
        return lambda row: by_label[str(row.get(label))]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    if len(prompts) > _MOST_NAMED:
        return lambda row: (f"{len(prompts)} prompts", _COLORS[1])
    by_prompt = dict(zip(prompts, zip(map(_short, prompts), _COLORS, strict=False), strict=False))
    return lambda row: by_prompt[row["prompt"]]


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else prompt[:39] + "…"


def _smallest_step(axes: Any) -> float:
    """Where a logarithmic axis of densities becomes linear: a thousandth of the highest."""
    return max(axes.get_ylim()[1] * 1e-3, 1e-12)
