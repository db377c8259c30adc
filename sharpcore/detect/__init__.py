"""Detectors of memorization: one file a method, functions of what the two guidance branches show."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.detect.anisotropy import Anisotropy
from sharpcore.detect.attention_entropy import AttentionEntropy, LayerAttentionEntropy
from sharpcore.detect.bright_ending import BrightEnding
from sharpcore.detect.condition_jacobian import ConditionJacobian
from sharpcore.detect.curvature_difference import CurvatureDifference, CurvatureProxy
from sharpcore.detect.detector import Cost as Cost
from sharpcore.detect.detector import Detector as Detector
from sharpcore.detect.detector import check_units as check_units
from sharpcore.detect.detector import cost_of as cost_of
from sharpcore.detect.evidence import Evidence as Evidence
from sharpcore.detect.evidence import State as State
from sharpcore.detect.hessian_score_difference import HessianScoreDifference
from sharpcore.detect.p_laplace import PLaplace
from sharpcore.detect.score_difference import ScoreDifference
from sharpcore.detect.spectrum import FEATURES
from sharpcore.errors import InvalidInput, NonFiniteError

ENTRY_POINTS = "sharpcore.detectors"

#: The detectors of this package; `detectors()` has those of others too.
DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector
    for detector in (
        ScoreDifference,
        HessianScoreDifference,
        Anisotropy,
        AttentionEntropy,
        LayerAttentionEntropy,
        BrightEnding,
        CurvatureDifference,
        CurvatureProxy,
        ConditionJacobian,
        PLaplace,
        *FEATURES,
    )
}


@functools.cache
def _entry_points() -> Mapping[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def detectors() -> list[str]:
    """The names of all detectors, those that other packages registered included."""
    return [*DETECTORS, *(name for name in _entry_points() if name not in DETECTORS)]


def find_detector(name: str) -> type[Detector]:
    """The class of a detector. Raises InvalidInput for an unknown name, or one registered for no detector."""
    if name in DETECTORS:
        return DETECTORS[name]
    if name not in _entry_points():
        raise InvalidInput(f"metrics: expected names out of {', '.join(detectors())}; got {name!r}")
    found = _entry_points()[name].load()
    if not (isinstance(found, type) and issubclass(found, Detector)) or found.name != name:
        raise InvalidInput(f"metrics: the entry point {name!r} is no Detector of this name; got {found!r}")
    return found


def make_detectors(metrics: Sequence[str | Detector], *, squared: bool = True) -> list[Detector]:
    """Detectors from their names, such as "score_difference", or with options: "p_laplace:p=2:probes=8".

    Detectors that are made already are taken as they are. `squared` is the default of those that have an
    option of this name. Raises InvalidInput for an empty list, an unknown name or option, or a name twice.
    """
    given = [metrics] if isinstance(metrics, str | Detector) else metrics
    known = ", ".join(detectors())
    if (
        not isinstance(given, Sequence)
        or not given
        or not all(isinstance(item, str | Detector) for item in given)
    ):
        raise InvalidInput(f"metrics: expected different names out of {known}; got {metrics!r}")
    made = [item if isinstance(item, Detector) else _make(item, squared) for item in given]
    if len({detector.name for detector in made}) != len(made):
        raise InvalidInput(f"metrics: expected different names out of {known}; got {metrics!r}")
    return made


def _make(text: str, squared: bool) -> Detector:
    name, *pairs = text.split(":")
    kind = find_detector(name)
    accepted = inspect.signature(kind).parameters
    options: dict[str, Any] = {"squared": squared} if "squared" in accepted else {}
    for pair in pairs:
        option, _, value = pair.partition("=")
        if option not in accepted:
            raise InvalidInput(
                f"metrics: {name} has the options {', '.join(accepted) or 'none'}; got {pair!r}"
            )
        options[option] = _value(value)
    return kind(**options)


def _value(text: str) -> Any:
    if text in ("True", "true", "False", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def compute_detectors(made: Sequence[Detector], evidence: Evidence) -> Tensor:
    """The detectors of B samples, [len(made), B], float64. Raises NonFiniteError for NaN or infinity."""
    values = torch.stack([detector.compute(evidence).double().cpu() for detector in made])
    for detector, row in zip(made, values, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise NonFiniteError(
                f"{detector.name}: NaN or infinity; the network's prediction or derivative is not finite here"
            )
    return values
