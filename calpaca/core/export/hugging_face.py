"""A model as a Hugging Face folder of its own: whole, verifiable, with a tokenizer that gives the same ids."""

from __future__ import annotations

from pathlib import Path

from calpaca.core.checkpoint.plan import SHARD_SIZE, ModelPlan
from calpaca.core.convert.conversion import Target, plan_conversion


def plan_hugging_face(path: Path, *, shard_size: int = SHARD_SIZE, dtype: str | None = None) -> ModelPlan:
    """Plan a Hugging Face folder of safetensors from a model of any form; a GGUF file is dequantized once.

    Unlike a conversion this also writes a model that has the form already: as one checked copy with a manifest.
    Raises what `plan_conversion` raises.
    """
    conversion = plan_conversion(path, Target(form="hf", shard_size=shard_size, dtype=dtype))
    assert conversion.plan is not None  # a shard size was asked for
    return conversion.plan
