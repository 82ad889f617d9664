"""Comparing two models by what they compute: logits, greedy answers and tensors."""

from calpaca.core.compare.comparison import CompareOptions, Comparison, changes_logits, compare

__all__ = ["CompareOptions", "Comparison", "changes_logits", "compare"]
