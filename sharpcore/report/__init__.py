"""How well a score separates two groups of prompts, in numbers and pictures, and what else separates them."""

from __future__ import annotations

from sharpcore.report.comparison import Comparison, compare
from sharpcore.report.confounds import Confounds, check_confounds
from sharpcore.report.duplicates import Duplicates, compare_lists, deduplicate, find_duplicates
from sharpcore.report.evaluation import Evaluation, OperatingPoint, auc_over_seeds, evaluate, evaluate_table
from sharpcore.report.labels import LabelledScores

__all__ = [
    "Comparison",
    "Confounds",
    "Duplicates",
    "Evaluation",
    "LabelledScores",
    "OperatingPoint",
    "auc_over_seeds",
    "check_confounds",
    "compare",
    "compare_lists",
    "deduplicate",
    "evaluate",
    "evaluate_table",
    "find_duplicates",
]
