"""Repair: the interface of every method that keeps a pipeline from reproducing training images."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sharpcore.arguments import is_integer, is_number
from sharpcore.errors import InvalidInput
from sharpcore.repair.samples import Samples

#: The guidance of one step: called with its index and s_D of the step in eps units, [B, C, H, W]; returns the
#: scale of every sample, a number or [B].
Guide = Callable[[int, Tensor], "float | Tensor"]


@dataclass(frozen=True)
class Repair:
    """A way to generate from memorized prompts without reproducing their training images.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters, and override what they change;
    an instance keeps no state of a generation, so one may serve many threads. The defaults here change
    nothing.

    Class attributes: `name`, by which it is asked for; `source`, the publication; `changes`, what of a
    generation is different ("noise", "prompt embeddings", "cross-attention", "guidance", "nothing"); `cost`,
    in words, beside a plain generation.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    changes: ClassVar[tuple[str, ...]]
    cost: ClassVar[str]

    def prepare(self, samples: Samples) -> None:
        """Change noise or conditionings of the samples, before the first step."""

    def running(self, samples: Samples) -> AbstractContextManager[Any]:
        """What holds while the samples are generated; it is left on errors, too."""
        return nullcontext()

    def guide(self, samples: Samples) -> Guide:
        """The guidance of one generation of the samples."""
        return lambda step, difference: samples.guidance_scale


def check_positive(**values: Any) -> None:
    """Raise InvalidInput for a hyper-parameter that is no positive number."""
    for name, value in values.items():
        if not is_number(value) or not 0 < value < math.inf:
            raise InvalidInput(f"{name}: expected a positive number; got {value!r}")


def check_not_negative(**values: Any) -> None:
    """Raise InvalidInput for a hyper-parameter that is no number of at least 0."""
    for name, value in values.items():
        if not is_number(value) or not 0 <= value < math.inf:
            raise InvalidInput(f"{name}: expected a number of at least 0; got {value!r}")


def check_count(**values: Any) -> None:
    """Raise InvalidInput for a hyper-parameter that is no integer of at least 1."""
    for name, value in values.items():
        if not is_integer(value) or value < 1:
            raise InvalidInput(f"{name}: expected an integer of at least 1; got {value!r}")


def check_threshold(**values: Any) -> None:
    """Raise InvalidInput for a threshold that is neither None nor a number of at least 0."""
    check_not_negative(**{name: value for name, value in values.items() if value is not None})
