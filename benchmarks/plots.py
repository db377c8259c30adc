"""The charts of README and docs, from the saved rows.

python benchmarks/plots.py
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results import FOLDER, load

IMAGES = Path(__file__).parents[1] / "docs" / "images"
OURS_COLOR, RIVAL_COLOR = "#1b7f79", "#b8b8b8"
LINES = {
    "product": ("sharpcore", OURS_COLOR, "o"),
    "central difference": ("central difference", "#8a6d3b", "s"),
    "torch.func.jvp": ("torch.func.jvp", "#a23b3b", "^"),
    "vmap(jvp)": ("vmap(torch.func.jvp)", "#5b5b9a", "v"),
}
AXES = {
    "tangents": "tangents K in one product",
    "size": "latent height and width",
    "width": "channels, in those of mid",
    "batch": "batch",
}
# Not products: the unit, set-up, compilation.
OTHERS = ("forward", "forward, compiled", "linearize (trace)", "relinearize", "bfloat16 network, forward")
OURS = ("product", "bfloat16 product", "transposed product", "bfloat16 transposed product", "one-off product")
TITLES = {"mid": "mid: 35 M parameters, 32x32 latent", "sd14": "Stable Diffusion 1.4's UNet, 64x64 latent"}


def bars(folder: Path = FOLDER) -> dict[str, list[tuple[str, float]]]:
    """For each network that was measured, the products and what each takes, quickest first."""
    found = {}
    for network in TITLES:
        rows = load(folder / f"{network}.csv") + load(folder / f"{network}_bfloat16.csv")
        products = {
            row["what"]: float(row["ratio"]) for row in rows if row["ratio"] and _is_product(row["what"])
        }
        if products:
            found[network] = sorted(products.items(), key=lambda item: item[1])
    return found


def _is_product(what: str) -> bool:
    return what not in OTHERS and not what.endswith(("set-up", "(compilation)"))


def draw_baselines(found: Mapping[str, Sequence[tuple[str, float]]], path: Path) -> None:
    """Horizontal bars on a logarithmic scale, ours in colour."""
    import matplotlib.pyplot as plt

    heights = [len(rows) for rows in found.values()]
    slowest = max(rows[-1][1] for rows in found.values())
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(8, 0.24 * sum(heights) + 1.1 * len(found)),
        height_ratios=heights,
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, (network, rows) in zip(axes[:, 0], found.items(), strict=True):
        names, ratios = zip(*reversed(rows), strict=True)
        colors = [OURS_COLOR if name.startswith(OURS) else RIVAL_COLOR for name in names]
        labels = [f"sharpcore: {name}" if name.startswith(OURS) else name for name in names]
        drawn = axis.barh(labels, ratios, color=colors)
        axis.bar_label(drawn, [f"{ratio:.2g}" for ratio in ratios], padding=3, fontsize=7)
        axis.set_xscale("log")
        axis.margins(y=0.01)
        axis.set_xlim(0.2, 2 * slowest)
        ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if tick <= 2 * slowest]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.tick_params(labelsize=7)
        axis.set_title(TITLES[network], fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time of a product, in forward passes without gradients (logarithmic)", fontsize=8)
    _write(figure, path)


def draw_scaling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each axis: forward passes per tangent."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
    for axis, (name, label) in zip(axes.flat, AXES.items(), strict=True):
        for what, (text, color, marker) in LINES.items():
            points = [
                (float(row["point"]), float(row["ratio"]))
                for row in rows
                if row["axis"] == name and row["what"] == what and row["ratio"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, color=color, label=text, markersize=4)
        ticks = sorted({float(row["point"]) for row in rows if row["axis"] == name})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_yscale("log")
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("time per tangent, in forward passes", fontsize=8)
    handles = {
        text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as drawn:
        figure.savefig(drawn, dpi=110)
        plt.close(figure)
        # A palette makes the file a third, and without matplotlib's version the same rows give the same file.
        Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
    print(f"wrote {path.name}, {path.stat().st_size / 1000:.0f} kB")


def main(folder: Path = FOLDER, images: Path = IMAGES) -> None:
    """Draw what has been measured."""
    import matplotlib

    matplotlib.use("Agg")
    found, scaling = bars(folder), load(folder / "scaling.csv")
    if found:
        draw_baselines(found, images / "against_baselines.png")
    if scaling:
        draw_scaling(scaling, images / "scaling.png")
    for name, rows in (("mid", found), ("scaling", scaling)):
        if not rows:
            print(f"no rows in {name}.csv: python benchmarks/run.py {name} --save-results")


if __name__ == "__main__":
    main()
