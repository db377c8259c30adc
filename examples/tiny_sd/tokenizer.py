"""A CLIP tokenizer whose byte pairs are learnt from the words of the captions."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .settings import CAPTION_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def learn_merges(word_counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word (ASCII letters) is a single token.

    Ties go to the pair that is last in alphabetical order, so the result does not depend on the words' order.
    """
    words = {(*word[:-1], word[-1] + WORD_END): count for word, count in word_counts.items()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merge(symbols, best): count for symbols, count in words.items()}


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in symbols:
        return symbols
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        width = 2 if symbols[position : position + 2] == pair else 1
        merged.append("".join(symbols[position : position + width]))
        position += width
    return tuple(merged)


def build_tokenizer(word_counts: Mapping[str, int], folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer with a window of 32 tokens, for any text, with one token for each given word.

    Its vocab.json, merges.txt and tokenizer_config.json are left in `folder`: recent versions of transformers
    save a tokenizer as tokenizer.json alone, which not all older ones read.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = learn_merges(word_counts)
    alphabet = sorted(ByteLevel.alphabet())
    merged = ["".join(pair) for pair in merges]
    # Two different pairs can spell the same token, which then has one number.
    tokens = dict.fromkeys([*alphabet, *(letter + WORD_END for letter in alphabet), *merged, START, END])
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CAPTION_TOKENS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
