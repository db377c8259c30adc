"""Testing tools: score networks whose scores and Hessians are known in closed form, and accuracy rules."""

from .analytic import GaussianMixtureScoreNetwork, GaussianScoreNetwork
from .tolerance import assert_error_at_most, relative_error

__all__ = ["GaussianMixtureScoreNetwork", "GaussianScoreNetwork", "assert_error_at_most", "relative_error"]
