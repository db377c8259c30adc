"""How well a score separates two groups of prompts, in numbers and pictures."""

from __future__ import annotations

from sharpcore.report.evaluation import Evaluation, OperatingPoint, evaluate, evaluate_table

__all__ = ["Evaluation", "OperatingPoint", "evaluate", "evaluate_table"]
