"""Bootstrap samples of positives and negatives, held as counts over their distinct scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_CELLS_PER_CHUNK = 2**22


class Tally:
    """Both groups as counts over the distinct scores, ascending."""

    def __init__(self, positive: Floats, negative: Floats) -> None:
        values, place = np.unique(np.concatenate([positive, negative]), return_inverse=True)
        self.size = len(values)
        places = np.split(place, [len(positive)])
        self._orders = [np.argsort(group, kind="stable") for group in places]
        self._filled, self._starts = zip(
            *(
                np.unique(group[order], return_index=True)
                for group, order in zip(places, self._orders, strict=True)
            ),
            strict=True,
        )

    def count(self, *drawn: Counts) -> tuple[Counts, Counts]:
        """How often each distinct score occurs, 2 x [B, D], where item i of a group was drawn `drawn[b, i]`
        times."""
        counts = []
        for weights, order, filled, starts in zip(
            drawn, self._orders, self._filled, self._starts, strict=True
        ):
            group = np.zeros((len(weights), self.size), dtype=np.int64)
            group[:, filled] = np.add.reduceat(weights[:, order], starts, axis=1)
            counts.append(group)
        return counts[0], counts[1]

    def count_once(self) -> tuple[Counts, Counts]:
        """As `count`, of the groups themselves: [1, D]."""
        return self.count(*(np.ones((1, len(order)), dtype=np.int64) for order in self._orders))


def draws(
    samples: int, generator: np.random.Generator, groups: tuple[Counts, Counts], width: int
) -> Iterator[tuple[Counts, Counts]]:
    """Bootstrap samples in blocks: how often each item of the two groups was drawn, [block, items].

    `groups` says for each item of a group to which of its clusters, 0 to C - 1, it belongs; C clusters are
    drawn with replacement, and all items of a cluster come with it. Where every item is its own cluster this
    is the usual stratified bootstrap. `width` is the number of columns that the caller makes of a sample.
    """
    block = max(1, _CELLS_PER_CHUNK // width)
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        yield _draw(rows, generator, groups[0]), _draw(rows, generator, groups[1])


def _draw(rows: int, generator: np.random.Generator, clusters: Counts) -> Counts:
    count = int(clusters.max()) + 1
    cells = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
    return np.bincount(cells.ravel(), minlength=rows * count).reshape(rows, count)[:, clusters]


def from_top(counts: Counts) -> Counts:
    """[B, D] counts over ascending scores -> [B, D + 1]: how many lie among the j highest distinct scores."""
    summed = np.cumsum(counts[:, ::-1], axis=1)
    return np.concatenate([np.zeros_like(summed[:, :1]), summed], axis=1)


def areas(positive: Counts, negative: Counts) -> Floats:
    """[B] areas: the share of pairs where the positive scores higher, ties counting half (Mann-Whitney)."""
    below = np.cumsum(negative, axis=1) - negative
    pairs = (positive * (2 * below + negative)).sum(axis=1)
    return pairs / (2.0 * positive.sum(axis=1) * negative.sum(axis=1))


def middle(samples: Floats) -> list[Interval]:
    """The 2.5 and 97.5 % quantiles of each column of [samples, columns]."""
    low_high = np.quantile(samples, (0.025, 0.975), axis=0)
    return [(float(low), float(high)) for low, high in low_high.T]


def allowed(target: float, count: Counts) -> Counts:
    """The largest k with k / count <= target, safe against the rounding of target * count."""
    k = (target * count).astype(np.int64)
    return k + ((k + 1) / count <= target) - (k / count > target)
