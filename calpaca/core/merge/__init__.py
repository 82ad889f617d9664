"""Merging adapters into a base, tensor by tensor, bit for bit as PEFT would."""

from calpaca.core.merge.plan import MergeOptions, MergePlan, merge, plan_merge

__all__ = ["MergeOptions", "MergePlan", "merge", "plan_merge"]
