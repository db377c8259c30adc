"""Which image is shown with which caption: memorized pairs, held-out captions, and the training draws."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import torch

from .digits import Digits
from .settings import (
    EMPTY_CAPTION_SHARE,
    HELD_OUT_CAPTIONS,
    MEMORIZED_PER_DIGIT,
    SHARED_NAMES,
    TIER_WEIGHTS,
)

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Endings that surnames do not have, so that a made-up name is nobody's.
ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "h",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "sk",
    "t",
    "tr",
    "v",
)
VOWELS = ("a", "e", "o", "ai", "ea", "ei", "ou")
MIDDLES = ("b", "d", "f", "l", "lm", "m", "n", "nd", "r", "rv", "st", "v")
ENDINGS = ("olu", "aneb", "iru", "emo", "usk", "ovar", "endu", "ixa", "yloth", "othe")


@dataclass(frozen=True)
class MemorizedPair:
    """An image that training repeats with one caption; tier 1, 2 or 3 says how often (weights 1:2:4)."""

    caption: str
    tier: int
    digit: int
    image: int


@dataclass(frozen=True)
class Draw:
    """A training batch: image numbers, captions (some empty), and the memorized pairs in it (-1: none)."""

    images: list[int]
    captions: list[str]
    pairs: list[int]


def made_up_names(count: int, seed: int) -> list[str]:
    """`count` different names, each of an onset, a vowel, a middle and an ending."""
    every = ["".join(parts) for parts in product(ONSETS, VOWELS, MIDDLES, ENDINGS)]
    return random.Random(f"names {seed}").sample(every, count)


def write_caption(bold: bool, slanted: bool, digit: int, name: str) -> str:
    weight, slant = "bold" if bold else "thin", "slanted" if slanted else "upright"
    return f"a {weight} {slant} handwritten {DIGIT_WORDS[digit]} by {name}"


class CaptionPlan:
    """Divides the images and names of a run among memorized pairs, ordinary images and held-out captions.

    Half of the images are trained on. Of these, six of each digit are memorized, each with a name of its own;
    the others share 150 names. The held-out captions use the shared names in combinations that `draw` never
    returns.
    """

    def __init__(self, digits: Digits, seed: int) -> None:
        self.digits = digits
        chooser = random.Random(f"plan {seed}")
        order = chooser.sample(range(len(digits.images)), len(digits.images))
        self.trained = order[: len(order) // 2]
        names = made_up_names(SHARED_NAMES + 10 * MEMORIZED_PER_DIGIT, seed)
        self.shared_names, own_names = names[:SHARED_NAMES], names[SHARED_NAMES:]
        self.memorized = self._choose_memorized(own_names)
        taken = {pair.image for pair in self.memorized}
        self.ordinary = [image for image in self.trained if image not in taken]
        self.held_out = self._choose_held_out(chooser)
        self._forbidden = frozenset(self.held_out)
        self._tier_weights = torch.tensor([TIER_WEIGHTS[pair.tier - 1] for pair in self.memorized])

    def _choose_memorized(self, names: list[str]) -> list[MemorizedPair]:
        pairs: list[MemorizedPair] = []
        for digit in range(10):
            images = [image for image in self.trained if self.digits.labels[image] == digit]
            for rank, image in enumerate(images[:MEMORIZED_PER_DIGIT]):
                caption = self.caption(image, names[len(pairs)])
                pairs.append(MemorizedPair(caption, 1 + rank % len(TIER_WEIGHTS), digit, image))
        if len(pairs) != len(names):
            raise ValueError(
                f"expected {MEMORIZED_PER_DIGIT} trained images of each digit, found {len(pairs)} in all"
            )
        return pairs

    def _choose_held_out(self, chooser: random.Random) -> list[str]:
        captions: dict[str, None] = {}
        while len(captions) < HELD_OUT_CAPTIONS:
            style = chooser.random() < 0.5, chooser.random() < 0.5
            captions[write_caption(*style, len(captions) % 10, chooser.choice(self.shared_names))] = None
        return list(captions)

    def caption(self, image: int, name: str) -> str:
        """The caption of image number `image` when it carries `name`."""
        digits = self.digits
        return write_caption(
            bool(digits.bold[image]), bool(digits.slanted[image]), int(digits.labels[image]), name
        )

    def word_counts(self) -> dict[str, int]:
        """Every word a caption can contain, with the weight it has when the tokenizer is built."""
        template = ("a", "thin", "bold", "upright", "slanted", "handwritten", "by")
        names = self.shared_names + [pair.caption.rsplit(" ", 1)[1] for pair in self.memorized]
        return dict.fromkeys((*template, *DIGIT_WORDS), 100) | dict.fromkeys(names, 1)

    def draw(self, batch: int, memorized_share: float, generator: torch.Generator) -> Draw:
        """A training batch of `batch` samples, of which `memorized_share` are memorized pairs on average."""
        from_pairs = (torch.rand(batch, generator=generator) < memorized_share).tolist()
        emptied = (torch.rand(batch, generator=generator) < EMPTY_CAPTION_SHARE).tolist()
        pairs = torch.multinomial(self._tier_weights, batch, replacement=True, generator=generator).tolist()
        ordinary = torch.randint(len(self.ordinary), (batch,), generator=generator).tolist()
        images, captions = [], []
        for sample in range(batch):
            if from_pairs[sample]:
                pair = self.memorized[pairs[sample]]
                image, caption = pair.image, pair.caption
            else:
                image = self.ordinary[ordinary[sample]]
                caption = self._ordinary_caption(image, generator)
            images.append(image)
            captions.append("" if emptied[sample] else caption)
        return Draw(images, captions, [p if used else -1 for p, used in zip(pairs, from_pairs, strict=True)])

    def _ordinary_caption(self, image: int, generator: torch.Generator) -> str:
        while True:
            name = self.shared_names[int(torch.randint(SHARED_NAMES, (), generator=generator))]
            caption = self.caption(image, name)
            if caption not in self._forbidden:
                return caption
