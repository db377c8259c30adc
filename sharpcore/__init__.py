"""sharpcore: exact curvature of diffusion score networks, and what it says about memorization."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved on first use, so that importing sharpcore stays cheap.
_EXPORTS = {
    "linearize": "sharpcore.linearization",
    "Linearization": "sharpcore.linearization",
    "ScoreFunction": "sharpcore.score",
    "ScoreJacobian": "sharpcore.operators",
    "Hessian": "sharpcore.operators",
    "HessianDifference": "sharpcore.operators",
    "SharpnessScorer": "sharpcore.pipeline",
    "SharpnessCallback": "sharpcore.callback",
    "ScoreTable": "sharpcore.table",
    "Curvature": "sharpcore.curvature",
    "curvature_at": "sharpcore.curvature",
    "curvature_along": "sharpcore.curvature",
    "spectrum": "sharpcore.spectra",
    "SpectrumTable": "sharpcore.spectra",
    "PosteriorCovariance": "sharpcore.posterior",
    "posterior_modes": "sharpcore.posterior",
    "Detector": "sharpcore.detect",
    "HeatMap": "sharpcore.localization",
    "localize": "sharpcore.localization",
    "localize_images": "sharpcore.localization",
    "Calibration": "sharpcore.calibration",
    "calibrate": "sharpcore.calibration",
    "generate": "sharpcore.repair",
    "repair_latents": "sharpcore.repair",
    "Generation": "sharpcore.repair",
    "RepairedLatents": "sharpcore.repair",
}
_ERRORS = (
    "SharpcoreError",
    "InvalidInput",
    "UnsupportedModel",
    "UnsupportedOperation",
    "NonFiniteError",
    "OutOfMemory",
    "MissingDependency",
)
_EXPORTS.update(dict.fromkeys(_ERRORS, "sharpcore.errors"))

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from sharpcore.calibration import Calibration as Calibration
    from sharpcore.calibration import calibrate as calibrate
    from sharpcore.callback import SharpnessCallback as SharpnessCallback
    from sharpcore.curvature import Curvature as Curvature
    from sharpcore.curvature import curvature_along as curvature_along
    from sharpcore.curvature import curvature_at as curvature_at
    from sharpcore.detect import Detector as Detector
    from sharpcore.errors import InvalidInput as InvalidInput
    from sharpcore.errors import MissingDependency as MissingDependency
    from sharpcore.errors import NonFiniteError as NonFiniteError
    from sharpcore.errors import OutOfMemory as OutOfMemory
    from sharpcore.errors import SharpcoreError as SharpcoreError
    from sharpcore.errors import UnsupportedModel as UnsupportedModel
    from sharpcore.errors import UnsupportedOperation as UnsupportedOperation
    from sharpcore.linearization import Linearization as Linearization
    from sharpcore.linearization import linearize as linearize
    from sharpcore.localization import HeatMap as HeatMap
    from sharpcore.localization import localize as localize
    from sharpcore.localization import localize_images as localize_images
    from sharpcore.operators import Hessian as Hessian
    from sharpcore.operators import HessianDifference as HessianDifference
    from sharpcore.operators import ScoreJacobian as ScoreJacobian
    from sharpcore.pipeline import SharpnessScorer as SharpnessScorer
    from sharpcore.posterior import PosteriorCovariance as PosteriorCovariance
    from sharpcore.posterior import posterior_modes as posterior_modes
    from sharpcore.repair import Generation as Generation
    from sharpcore.repair import RepairedLatents as RepairedLatents
    from sharpcore.repair import generate as generate
    from sharpcore.repair import repair_latents as repair_latents
    from sharpcore.score import ScoreFunction as ScoreFunction
    from sharpcore.spectra import SpectrumTable as SpectrumTable
    from sharpcore.spectra import spectrum as spectrum
    from sharpcore.table import ScoreTable as ScoreTable


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sharpcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))
