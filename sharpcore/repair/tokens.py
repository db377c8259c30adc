"""Where a prompt's tokens end in its embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sharpcore import conditioning as text


def prompt_lengths(pipe: Any, prompts: Sequence[str]) -> list[int]:
    """How many tokens each prompt has, those that begin and end it included; what follows is padding.

    An XL pipeline's first tokenizer counts: the second splits words the same.
    """
    tokenizer, _ = text._pairs(pipe)[0]
    convert = getattr(pipe, "maybe_convert_prompt", None)
    lengths = []
    for prompt in prompts:
        words = convert(prompt, tokenizer) if convert is not None else prompt
        with text._TOKENIZING:
            found = tokenizer(words, truncation=True, max_length=tokenizer.model_max_length, padding=False)
        lengths.append(len(found.input_ids))
    return lengths
