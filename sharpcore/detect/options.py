"""Checks of detectors' options, which come from Python or as text from the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sharpcore.arguments import is_integer, is_number
from sharpcore.errors import InvalidInput


def check_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise InvalidInput(f"{name}: expected True or False; got {value!r}")
    return value


def check_integer(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`."""
    if not is_integer(value) or value < least:
        raise InvalidInput(f"{name}: expected an integer of at least {least}; got {value!r}")
    return int(value)


def check_float(name: str, value: Any, *, above: float = -math.inf) -> float:
    """A finite number greater than `above`."""
    if not is_number(value) or not above < value < math.inf:
        limit = "" if above == -math.inf else f" greater than {above:g}"
        raise InvalidInput(f"{name}: expected a finite number{limit}; got {value!r}")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some names."""
    if value not in choices:
        raise InvalidInput(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
    return str(value)
