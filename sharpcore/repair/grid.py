"""A picture of generations side by side: a line for each prompt, a group of images for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sharpcore.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches of an image's height, and those kept for the prompts beside and the titles above.
_INCHES, _BESIDE, _ABOVE = 0.5, 2.6, 0.5


def plot_grid(
    rows: Sequence[tuple[str, Mapping[str, Sequence[Tensor]]]], *, path: str | Path | None = None
) -> Figure:
    """Draw `rows` of (prompt, {title: images}), images [3, H, W] in [0, 1] of one size.

    The titles are those of the first row; a group without images stays empty. Returns the figure and saves it
    as PNG if `path` is given. Raises InvalidInput without images or for several sizes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("pictures need matplotlib: pip install matplotlib") from None
    sizes = {tuple(image.shape) for _, groups in rows for images in groups.values() for image in images}
    if len(sizes) != 1:
        raise InvalidInput(f"rows: expected images of one size; got sizes {sorted(sizes)}")
    _, height, width = sizes.pop()
    margin, gap = max(1, width // 16), max(2, width // 4)
    starts, centres, left = {}, [], 0
    for title in rows[0][1]:
        columns = max(1, *(len(groups.get(title, ())) for _, groups in rows))
        starts[title] = left
        centres.append(left + columns * (width + margin) / 2)
        left += columns * (width + margin) + gap
    canvas = np.ones((len(rows) * (height + margin), left - gap, 3), dtype=np.float32)
    for line, (_, groups) in enumerate(rows):
        top = line * (height + margin)
        for title, start in starts.items():
            for column, image in enumerate(groups.get(title, ())):
                at = start + column * (width + margin)
                canvas[top : top + height, at : at + width] = image.permute(1, 2, 0).numpy()
    scale = _INCHES / height
    figure = Figure(
        (canvas.shape[1] * scale + _BESIDE, canvas.shape[0] * scale + _ABOVE), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks(centres, list(starts), fontsize=7)
    lines = [line * (height + margin) + height / 2 for line in range(len(rows))]
    axes.set_yticks(lines, [_short(prompt) for prompt, _ in rows], fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    if path is not None:
        figure.savefig(path, format="png", dpi=150)
    return figure


def _short(prompt: str) -> str:
    words = " ".join(prompt.split())
    return words if len(words) <= 48 else words[:47] + "…"
