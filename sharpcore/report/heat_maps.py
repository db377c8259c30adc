"""Pictures of heat maps: a detector's map over the decoded image, with the outline of its mask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sharpcore.report.figures import _panels, _saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sharpcore.localization import HeatMap


def plot_heat_map(part: HeatMap, *, path: str | Path | None = None) -> Figure:
    """The image, and the map over it with the outline of its mask; only the map where there is no image.

    Returns the figure and saves it as PNG if `path` is given.
    """
    values, image = part.pixels().numpy(), part.image
    figure, panels = _panels(1, 1 if image is None else 2, width=3.6, height=3.9)
    axes = panels[0][-1]
    if image is not None:
        picture = image.movedim(0, -1).numpy()
        panels[0][0].imshow(picture)
        panels[0][0].set(title="image", xticks=[], yticks=[])
        axes.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
    shown = axes.imshow(values, cmap="inferno", alpha=1.0 if image is None else 0.7)
    mask = part.mask().numpy()
    if mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors="white", linewidths=1)
    step = "" if part.step is None else f", step {part.step}"
    axes.set(title=f"{part.metric}{step}", xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, shrink=0.75)
    if part.prompt is not None:
        figure.suptitle(part.prompt, fontsize=8, color="0.3")
    return _saved(figure, path)
