"""Where a picture is memorized: overlap of heat maps with the memorized half of pictures made for it.

    python examples/detectors/localize.py --out localization-output

Each picture is a memorized training image of the shipped model on one half, and on the other half a digit of
the same data that was never paired with the prompt. Left, right, upper and lower halves take turns. The table
has, for each map and noise level, the overlap (intersection over union) of the half of the pixels where the
map is highest with the memorized half: 1/3 by chance, 1 at best; and the area under the ROC curve of pixels.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_sd.digits import mnist_table

import sharpcore
from sharpcore import HeatMap, localize_images
from sharpcore.report import evaluate

MODEL = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
TRUTH = Path(__file__).resolve().parents[2] / "tests" / "data" / "tiny-sd-eps" / "ground_truth.json"
METRICS = ("curvature_difference:probes=32", "curvature_proxy", "score_difference", "bright_ending")
TIMESTEPS = (101, 301, 501, 701, 901)
COPIES = 6  # of 8 generations: prompts that the model copies for certain


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the pictures, map them, print the overlaps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--timesteps", type=int, nargs="+", default=list(TIMESTEPS))
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    prompts, images, masks = pictures(asked.pictures)
    rows = []
    for timestep in asked.timesteps:
        maps = localize_images(pipe, images, prompts, timestep=timestep, metrics=METRICS, seeds=asked.seeds)
        for metric in dict.fromkeys(part.metric for part in maps):
            own = [part for part in maps if part.metric == metric]
            overlaps, areas = zip(*map(overlap, own, masks), strict=True)
            rows.append(
                {
                    "map": metric,
                    "timestep": timestep,
                    "iou": float(np.mean(overlaps)),
                    "iou_se": float(np.std(overlaps, ddof=1) / len(overlaps) ** 0.5),
                    "pixel_auc": float(np.mean(areas)),
                    "pictures": len(own),
                }
            )
            own[0].plot(asked.out / f"{metric}_{timestep}.png")
    with (asked.out / "localization.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    for row in rows:
        words = "{map:22} t={timestep:4d}  IoU {iou:.3f} +- {iou_se:.3f}  pixel AUC {pixel_auc:.3f}"
        print(words.format(**row))
    return 0


def pictures(count: int) -> tuple[list[str], Tensor, list[Tensor]]:
    """Prompts, pictures [B, 3, 32, 32] in 0 to 1, and bool masks [32, 32] of their memorized halves."""
    memorized = [
        item
        for item in json.loads(TRUTH.read_text(encoding="utf-8"))["memorized"]
        if item["copies"] >= COPIES
    ][:count]
    table, labels = mnist_table()
    digits = np.pad(table.reshape(-1, 28, 28) / 255.0, ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    used = {item["mnist_index"] for item in memorized}
    images, masks = [], []
    for index, item in enumerate(memorized):
        # Another image of the same digit, so that the halves differ in what was memorized and not in kind.
        others = [i for i in np.flatnonzero(labels == item["digit"]).tolist() if i not in used]
        half = torch.zeros(32, 32, dtype=torch.bool)
        first, along = index % 2 == 0, index // 2 % 2
        half.narrow(1 - along, 0 if first else 16, 16).fill_(True)
        pair = [torch.from_numpy(digits[i]) for i in (item["mnist_index"], others[index % len(others)])]
        images.append(torch.where(half, *pair).expand(3, 32, 32))
        masks.append(half)
    return [item["caption"] for item in memorized], torch.stack(images), masks


def overlap(part: HeatMap, mask: Tensor) -> tuple[float, float]:
    """The overlap of the higher half of the map with the mask, and the area under the curve of pixels."""
    values = part.pixels()
    threshold = float(values.median())
    area = evaluate(values[mask].numpy(), values[~mask].numpy(), bootstrap=1).auc
    return part.iou(mask, threshold), area


if __name__ == "__main__":
    sys.exit(main())
