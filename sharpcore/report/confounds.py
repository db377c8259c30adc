"""What the text of the prompts alone tells: features that separate two lists without any model."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpcore.errors import InvalidInput, MissingDependency
from sharpcore.report.delong import delong_interval
from sharpcore.report.duplicates import find_duplicates, numbered
from sharpcore.report.resampling import Counts, Floats, Interval, Tally, areas

#: A text feature from here on is warned of. From 0.8 discrimination is called excellent (Hosmer, Lemeshow and
#: Sturdivant, Applied Logistic Regression, 2013, section 5.2.4): a detector could owe its own to the text.
SEPARATES = 0.8
FOLDS = 5

Tokenize = Callable[[str], Sequence[int]]

#: Features of one prompt, in words, as they are named in reports.
FEATURES = {
    "characters": "the length in characters",
    "words": "the number of words",
    "capitalized_words": "the share of capitalized words",
    "capitals": "the share of capitals",
    "digits": "the share of digits",
    "punctuation": "the share of punctuation",
    "non_ascii": "the share of characters outside ASCII",
    "repeated_words": "the share of words that repeat an earlier one",
    "word_rarity_mean": "the mean rarity of words",
    "word_rarity_max": "the rarity of the rarest word",
    "tokens": "the number of tokens",
    "token_id_mean": "the mean token number (a proxy of rarity)",
    "token_id_max": "the largest token number (a proxy of rarity)",
}


@dataclass(frozen=True)
class Confound:
    """How well one feature of the text separates memorized prompts from others.

    `auc` is that of the better direction, at least 0.5, so that chance alone puts it a little above;
    `direction` says whether memorized prompts have the "higher" or the "lower" values, or "neither" at 0.5.
    `interval` is DeLong's
    (95 %), None where it says nothing.
    """

    feature: str
    auc: float
    direction: str
    interval: Interval | None


@dataclass(frozen=True)
class Confounds:
    """What the features of the text achieve, one by one and together.

    `regression_auc` is that of a logistic regression on all of them, each prompt predicted by a model that
    saw neither it nor a near-duplicate of it; its interval takes the predictions as given. None with the
    reason in `notes` where there is none.
    """

    features: tuple[Confound, ...]
    regression_auc: float | None
    regression_interval: Interval | None
    n_positive: int
    n_negative: int
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """In words, what separates the lists with an AUC of at least SEPARATES; the strongest first."""
        strong = sorted((f for f in self.features if f.auc >= SEPARATES), key=lambda f: -f.auc)
        said = [
            f"{FEATURES[found.feature]} alone separates the lists with an AUC of {found.auc:.3f} "
            f"({found.direction} for memorized prompts): a detector may owe its own to the text"
            for found in strong
        ]
        if self.regression_auc is not None and self.regression_auc >= SEPARATES:
            said.append(
                f"all text features together separate the lists with an AUC of {self.regression_auc:.3f} "
                "(cross-validated logistic regression, no model seen)"
            )
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """As a nested object that JSON can hold."""
        return asdict(self) | {"warnings": list(self.warnings)}

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each feature and for the regression, with the columns of an evaluation's row."""
        found = [(f"text: {f.feature}", f.auc, f.direction, f.interval) for f in self.features]
        if self.regression_auc is not None:
            found.append(("text: all (regression)", self.regression_auc, "", self.regression_interval))
        return [
            {
                "metric": name,
                "n_positive": self.n_positive,
                "n_negative": self.n_negative,
                "auc": auc,
                "auc_delong_low": (interval or (None, None))[0],
                "auc_delong_high": (interval or (None, None))[1],
                "direction": direction,
            }
            for name, auc, direction, interval in found
        ]


def check_confounds(
    memorized: Sequence[str],
    others: Sequence[str],
    *,
    tokenize: Tokenize | None = None,
    folds: int = FOLDS,
    seed: int = 0,
) -> Confounds:
    """How well features of the text alone separate two lists of prompts.

    `tokenize` (text to token numbers) adds the features of tokens. `folds` and `seed` are those of the
    regression. Raises InvalidInput for an empty list or anything but strings.
    """
    for name, prompts in (("memorized", memorized), ("others", others)):
        if isinstance(prompts, str) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise InvalidInput(f"{name}: expected a non-empty list of strings")
    if folds < 2:
        raise InvalidInput(f"folds: expected at least 2, got {folds!r}")
    features = text_features([*memorized, *others], tokenize=tokenize)
    count = len(memorized)
    found = [_separation(name, values[:count], values[count:]) for name, values in features.items()]
    notes = []
    auc, interval = None, None
    try:
        scores = _predictions(features, [*memorized, *others], count, folds, seed)
    except MissingDependency as error:
        notes.append(f"the text features together were not tried: {error}")
    else:
        if scores is None:
            notes.append(
                "the text features together were not tried: there are too few prompts that are no "
                "near-duplicates to hold some of each kind out"
            )
        else:
            auc = float(areas(*Tally(scores[:count], scores[count:]).count_once())[0])
            interval = delong_interval(scores[:count], scores[count:])[1]
    return Confounds(tuple(found), auc, interval, count, len(others), tuple(notes))


def text_features(prompts: Sequence[str], *, tokenize: Tokenize | None = None) -> dict[str, Floats]:
    """Features of each prompt that need no model, by name (see FEATURES), each [n].

    The rarity of a word is log(n / (1 + m)), with m the number of other prompts that have it: the prompt
    itself does not count, and labels are not used. Token numbers stand for rarity, because a byte pair
    encoding numbers its tokens in the order in which they were merged, the most frequent first.
    """
    split = [text.split() for text in prompts]
    known = [Counter(word for word in map(_bare, words) if word) for words in split]
    having = Counter(word for words in known for word in words)
    total = len(prompts)
    rarity = [[math.log(total / having[word]) for word in words] or [0.0] for words in known]
    features = {
        "characters": [len(text) for text in prompts],
        "words": [len(words) for words in split],
        "capitalized_words": [_share(words, lambda word: word[:1].isupper()) for words in split],
        "capitals": [_share(text, str.isupper) for text in prompts],
        "digits": [_share(text, str.isdigit) for text in prompts],
        "punctuation": [_share(text, _is_punctuation) for text in prompts],
        "non_ascii": [_share(text, lambda character: not character.isascii()) for text in prompts],
        "repeated_words": [1 - len(words) / max(1, words.total()) if words else 0.0 for words in known],
        "word_rarity_mean": [float(np.mean(values)) for values in rarity],
        "word_rarity_max": [max(values) for values in rarity],
    }
    if tokenize is not None:
        tokens = [list(tokenize(text)) or [0] for text in prompts]
        features |= {
            "tokens": [len(ids) for ids in tokens],
            "token_id_mean": [float(np.mean(ids)) for ids in tokens],
            "token_id_max": [max(ids) for ids in tokens],
        }
    return {name: np.array(values, dtype=np.float64) for name, values in features.items()}


def _separation(feature: str, memorized: Floats, others: Floats) -> Confound:
    auc = float(areas(*Tally(memorized, others).count_once())[0])
    higher = auc >= 0.5
    values = (memorized, others) if higher else (-memorized, -others)
    interval = delong_interval(*values)[1]
    direction = "neither" if auc == 0.5 else "higher" if higher else "lower"
    return Confound(feature, max(auc, 1 - auc), direction, interval)


def _predictions(
    features: dict[str, Floats], prompts: Sequence[str], count: int, folds: int, seed: int
) -> Floats | None:
    """What a logistic regression of the other folds says of each prompt, [n]; None without such folds."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise _no_scikit_learn() from None
    labels = np.arange(len(prompts)) < count
    parts = split_folds(labels, numbered(find_duplicates(prompts).clusters), folds, seed)
    table = np.stack(list(features.values()), axis=1)
    scores = np.empty(len(prompts))
    for train, test in parts:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        scores[test] = model.fit(table[train], labels[train]).decision_function(table[test])
    return scores if parts else None


def split_folds(
    labels: NDArray[np.bool_], clusters: Counts, folds: int, seed: int
) -> list[tuple[Counts, Counts]]:
    """Indices of prompts to learn from and to predict, for each of at most `folds` folds.

    Clusters [n] are never divided, and both kinds, `labels` [n], are there to learn from; empty where that
    cannot be.
    """
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError:
        raise _no_scikit_learn() from None
    folds = min(folds, *(len(np.unique(clusters[labels == side])) for side in (True, False)))
    if folds < 2:
        return []
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [part for part in splitter.split(labels, labels, clusters) if len(part[1])]
    return parts if all(0 < labels[train].sum() < len(train) for train, _ in parts) else []


def _no_scikit_learn() -> MissingDependency:
    return MissingDependency('the logistic regression needs scikit-learn: pip install "sharpcore[report]"')


def _share(items: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, items)) / max(1, len(items))


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def _bare(word: str) -> str:
    """A word without case and the punctuation around it."""
    start, end = 0, len(word)
    while start < end and not word[start].isalnum():
        start += 1
    while end > start and not word[end - 1].isalnum():
        end -= 1
    return word[start:end].casefold()
