"""Finds prompts that repeat each other, within a list and across two."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpcore.errors import InvalidInput, MissingDependency

#: Prompts whose sets of shingles overlap by this much of their union are near-duplicates: the usual value of
#: text de-duplication (Lee et al., Deduplicating Training Data Makes Language Models Better, ACL 2022).
NEAR = 0.8
#: Characters of a shingle.
SHINGLE = 5
#: All pairs are compared, so that longer lists are searched for exact duplicates alone.
MOST_COMPARED = 20_000
#: One beginning that so large a share of a list has in common is worth a warning.
COMMON_BEGINNING = 0.5
#: So is an effective number of clusters below this share of the prompts.
INDEPENDENT = 0.9
_SMALLEST_LIST = 8
_ROWS_PER_BLOCK = 512
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Duplicates:
    """Which prompts of a list repeat each other.

    `clusters` [n] numbers the clusters, in order of first appearance: prompts that are linked by a chain of
    duplicates or near-duplicates. `exact` are the groups of prompts that are equal but for Unicode form, case
    and space; `near` the pairs (i, j, Jaccard similarity) of different texts, i < j, by the first prompt of
    each text. `compared` is False where the list was too long to compare all pairs.
    """

    clusters: tuple[int, ...]
    exact: tuple[tuple[int, ...], ...]
    near: tuple[tuple[int, int, float], ...]
    compared: bool = True

    @property
    def n_distinct(self) -> int:
        """How many texts differ."""
        return len(self.clusters) - sum(len(group) - 1 for group in self.exact)

    @property
    def n_clusters(self) -> int:
        """How many clusters there are."""
        return max(self.clusters) + 1

    @property
    def effective_number(self) -> float:
        """The effective number of clusters, as `effective_number`."""
        return effective_number(self.clusters)

    def to_dict(self) -> dict[str, Any]:
        """The counts and the largest clusters (prompts' indices), as JSON can hold them."""
        members: dict[int, list[int]] = {}
        for index, cluster in enumerate(self.clusters):
            members.setdefault(cluster, []).append(index)
        largest = sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)
        return {
            "prompts": len(self.clusters),
            "distinct": self.n_distinct,
            "clusters": self.n_clusters,
            "effective_clusters": self.effective_number,
            "near_duplicates_compared": self.compared,
            "largest_clusters": largest[:10],
        }


@dataclass(frozen=True)
class ListReport:
    """Duplicates of two lists: within each, and across them.

    `shared` are pairs (i, j) of equal prompts i of the memorized and j of the others, `shared_near` pairs
    (i, j, similarity) that are near-duplicates; `warnings` says in words what to mind.
    """

    memorized: Duplicates
    others: Duplicates
    shared: tuple[tuple[int, int], ...]
    shared_near: tuple[tuple[int, int, float], ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a nested object that JSON can hold."""
        return {
            "memorized": self.memorized.to_dict(),
            "others": self.others.to_dict(),
            "shared": [list(pair) for pair in self.shared],
            "shared_near": [list(pair) for pair in self.shared_near],
        }


def normalize(prompt: str) -> str:
    """The text without differences of Unicode form (NFKC), case and space."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def find_duplicates(prompts: Sequence[str], *, threshold: float = NEAR, shingle: int = SHINGLE) -> Duplicates:
    """Exact and near-duplicates of a list of prompts.

    Near-duplicates are texts whose sets of shingles (runs of `shingle` characters of the normalized text)
    have a Jaccard similarity |A and B| / |A or B| of at least `threshold` (Broder, On the resemblance and
    containment of documents, 1997), computed exactly for all pairs. Raises InvalidInput for an empty list,
    anything but strings, or a threshold outside (0, 1].
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidInput("prompts: expected a non-empty list of strings")
    if not 0 < threshold <= 1:
        raise InvalidInput(f"threshold: expected a number in (0, 1], got {threshold!r}")
    if shingle < 1:
        raise InvalidInput(f"shingle: expected at least 1 character, got {shingle!r}")
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(normalize(prompt), []).append(index)
    groups = list(members.values())
    compared = len(groups) <= MOST_COMPARED
    pairs = list(_near(list(members), threshold, shingle)) if compared else []
    cluster = list(range(len(groups)))

    def root(i: int) -> int:
        while cluster[i] != i:
            cluster[i] = cluster[cluster[i]]
            i = cluster[i]
        return i

    for i, j, _ in pairs:
        cluster[root(j)] = root(i)
    of_prompt = {index: root(number) for number, group in enumerate(groups) for index in group}
    return Duplicates(
        tuple(numbered([of_prompt[index] for index in range(len(prompts))]).tolist()),
        tuple(tuple(group) for group in groups if len(group) > 1),
        tuple((groups[i][0], groups[j][0], similarity) for i, j, similarity in pairs),
        compared,
    )


def _near(texts: Sequence[str], threshold: float, shingle: int) -> Iterator[tuple[int, int, float]]:
    """Pairs i < j of texts with their similarity, where it is at least `threshold`."""
    try:
        from scipy import sparse
    except ImportError:
        raise MissingDependency("near-duplicates need scipy: pip install scipy") from None
    number: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for part in {text[k : k + shingle] for k in range(max(1, len(text) - shingle + 1))}:
            rows.append(row)
            columns.append(number.setdefault(part, len(number)))
    shape = (len(texts), len(number))
    matrix = sparse.csr_array((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=shape)
    sizes = np.asarray(matrix.sum(axis=1)).ravel()
    transposed = matrix.T.tocsr()
    for start in range(0, len(texts), _ROWS_PER_BLOCK):
        common = (matrix[start : start + _ROWS_PER_BLOCK] @ transposed).tocoo()
        first, second = common.row.astype(np.int64) + start, common.col.astype(np.int64)
        similarity = common.data / (sizes[first] + sizes[second] - common.data)
        keep = np.flatnonzero((first < second) & (similarity >= threshold))
        for k in keep[np.lexsort((second[keep], first[keep]))]:
            yield int(first[k]), int(second[k]), float(similarity[k])


def deduplicate(prompts: Sequence[str], *, near: bool = False, threshold: float = NEAR) -> list[str]:
    """The prompts without repetitions, in order: the first of each text, or with `near` of each cluster.

    Raises InvalidInput as `find_duplicates`.
    """
    if near:
        labels: Sequence[Hashable] = find_duplicates(prompts, threshold=threshold).clusters
    else:
        labels = [normalize(prompt) for prompt in prompts]
    first: dict[Hashable, str] = {}
    for label, prompt in zip(labels, prompts, strict=True):
        first.setdefault(label, prompt)
    return list(first.values())


def compare_lists(memorized: Sequence[str], others: Sequence[str], *, threshold: float = NEAR) -> ListReport:
    """Duplicates within and across two lists, with warnings in words.

    A prompt in both lists is wrong in one of them; prompts that repeat each other count as fewer than they
    are. Raises InvalidInput as `find_duplicates`.
    """
    within = (find_duplicates(memorized, threshold=threshold), find_duplicates(others, threshold=threshold))
    both = find_duplicates([*memorized, *others], threshold=threshold)
    count = len(memorized)
    shared = [(i, j - count) for group in both.exact for i in group if i < count for j in group if j >= count]
    near = [(i, j - count, similarity) for i, j, similarity in both.near if i < count <= j]
    warnings = []
    if shared:
        warnings.append(
            f"{len({i for i, _ in shared})} memorized prompts are also among the others, "
            f"e.g. {_short(memorized[shared[0][0]])}; no detector can tell those apart"
        )
    if near:
        warnings.append(
            f"{len({i for i, *_ in near})} memorized prompts have a near-duplicate among the others, "
            f"e.g. {_short(memorized[near[0][0]])} and {_short(others[near[0][1]])}"
        )
    for name, prompts, found in zip(("memorized", "other"), (memorized, others), within, strict=True):
        if found.effective_number < INDEPENDENT * len(prompts):
            warnings.append(
                f"the {len(prompts)} {name} prompts are {found.n_clusters} clusters of near-duplicates, with "
                f"an effective number of {found.effective_number:.1f}; take the interval by clusters"
            )
        if (said := _beginning(prompts, name)) is not None:
            warnings.append(said)
    return ListReport(*within, tuple(shared), tuple(near), tuple(warnings))


def _beginning(prompts: Sequence[str], name: str) -> str | None:
    (words, count), *_ = Counter(_first_words(prompt) for prompt in prompts).most_common(1)
    if count < COMMON_BEGINNING * len(prompts) or len(prompts) < _SMALLEST_LIST or not words:
        return None
    effective = effective_number(beginnings(prompts))
    return (
        f"{count} of {len(prompts)} {name} prompts begin with {' '.join(words)!r} (effective number of "
        f"beginnings: {effective:.1f}); take the interval by beginnings"
    )


def beginnings(prompts: Sequence[str]) -> list[int]:
    """Number the clusters of prompts that share their first two words (articles skipped) or are
    near-duplicates, [n].

    Lists of captions of one shop or one template are dependent without being near-duplicates.
    """
    near = find_duplicates(prompts).clusters
    cluster: dict[Hashable, Hashable] = {}

    def root(label: Hashable) -> Hashable:
        while cluster.setdefault(label, label) != label:
            label = cluster[label]
        return label

    for prompt, number in zip(prompts, near, strict=True):
        words = _first_words(prompt)
        if words:
            cluster[root(words)] = root(number)
    return numbered([root(number) for number in near]).tolist()


def _first_words(prompt: str) -> tuple[str, ...]:
    words = [word for word in re.findall(r"\w+", normalize(prompt)) if word not in _ARTICLES]
    return tuple(words[:2])


def effective_number(labels: Sequence[Hashable]) -> float:
    """n^2 / (sum of squared cluster sizes): the number of equal clusters that would be as concentrated.

    Raises InvalidInput for an empty list.
    """
    if not len(labels):
        raise InvalidInput("labels: expected at least one")
    return len(labels) ** 2 / sum(count**2 for count in Counter(labels).values())


def numbered(labels: Sequence[Hashable]) -> NDArray[np.int64]:
    """Labels as numbers from 0, in order of first appearance, [n]."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:59] + "…")
