"""Calls of kernels that can be made again as they are: what a repeated product runs in the place of checks
and views."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Launch = tuple[Callable[[], Any], Sequence["Tensor | None"]]

_recording = threading.local()


def launch(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], *arguments: Any, **keywords: Any
) -> None:
    """Call a function that writes into memory which it is given.

    `tensors` are all that it reads and writes. A kernel launches everything that it does, or nothing: a
    repeated product makes its launches again, where they touch no other memory than the map's, the operands'
    and the result's.
    """
    function(*arguments, **keywords)
    made: list[Launch] | None = getattr(_recording, "made", None)
    if made is not None:
        made.append((functools.partial(function, *arguments, **keywords), tensors))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """The launches that this thread makes meanwhile."""
    made: list[Launch] = []
    _recording.made = made
    try:
        yield made
    finally:
        _recording.made = None
