"""The model in a GGUF file, by transformers, which is told what it does not look for there.

It takes no notice of biases, of stretched rotary embeddings and of Llama 3's frequency factors, and takes a LLaMA whose
name has "mistral" in it for an architecture that it then cannot read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calpaca.core.errors import UnsupportedError
from calpaca.core.gguf import Header, read_header, spans

_FACTORS = "rope_freqs.weight"
_KINDS = {"llama": ("LlamaConfig", "LlamaForCausalLM")}
_TOLERANCE = 1e-3  # between the factors in the file and those that the found numbers give, which are rounded


def load_model(path: Path, dtype: Any) -> Any:
    """The dequantized model. Raises UnsupportedError for a stretching that is not understood, and what transformers
    raises for a file that it cannot read (OSError, ValueError, KeyError, NotImplementedError)."""
    import transformers

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # older versions know no other way than to dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    header = read_header(path)
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    kind: Any = transformers.AutoModelForCausalLM
    if header.metadata.get("general.architecture") in _KINDS:
        config_class, model_class = _KINDS[str(header.metadata["general.architecture"])]
        kind = getattr(transformers, model_class)
        told = {key: value for key, value in config.to_dict().items() if key not in {"model_type", "architectures"}}
        names = {tensor.name for tensor in header.tensors}
        told["attention_bias"], told["mlp_bias"] = "blk.0.attn_q.bias" in names, "blk.0.ffn_up.bias" in names
        config = getattr(transformers, config_class)(**told)
    if (rope := _rope(path, header)) is not None:
        config.rope_parameters = rope
    return kind.from_pretrained(path.parent, config=config, **options)


def _rope(path: Path, header: Header) -> dict[str, Any] | None:
    """The rotary embedding as `config.json` has it; None for one that is not stretched."""
    base = {"rope_theta": float(header.of_architecture("rope.freq_base") or 10_000.0)}
    kind = header.of_architecture("rope.scaling.type")
    if kind in {"linear", "yarn"}:
        stretched = base | {"rope_type": kind, "factor": float(header.of_architecture("rope.scaling.factor") or 1.0)}
        original = header.of_architecture("rope.scaling.original_context_length")
        return stretched | ({"original_max_position_embeddings": int(original)} if original else {})
    if not any(tensor.name == _FACTORS for tensor in header.tensors):
        return None
    start, size = spans(path)[_FACTORS]
    factors = np.fromfile(path, "<f4", size // 4, offset=start).astype(np.float64)
    found = find_llama3(factors, base["rope_theta"])
    if found is None:
        raise UnsupportedError(
            f"{path.name} stretches its rotary embedding by factors that are not Llama 3's.",
            "Use the model's Hugging Face folder instead.",
        )
    return {"rope_type": "llama3", **base, **found.parameters}


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretching: frequencies with wavelengths beyond `original / low` are divided by `factor`, those below
    `original / high` are kept, and between them it goes over. Only the proportions of the last three matter."""

    factor: float
    low: float
    high: float
    original: float

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": round(self.original),
        }

    def factors(self, theta: float, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """What each of the `count` frequencies is divided by. Formula: transformers' `_compute_llama3_parameters`."""
        smooth = np.clip((self.original / _wavelengths(theta, count) - self.low) / (self.high - self.low), 0.0, 1.0)
        made: np.ndarray[Any, np.dtype[np.float64]] = 1 / ((1 - smooth) / self.factor + smooth)
        return made


def find_llama3(factors: np.ndarray[Any, np.dtype[np.float64]], theta: float) -> Llama3Rope | None:
    """The stretching that gives these factors, with `low` = 1 as in every published model; None when none does.

    Between its two ends the smoothing is linear in the frequency: two points of that line tell where it begins and ends.
    """
    largest = float(factors.max())
    between = (factors > 1 + _TOLERANCE) & (factors < largest * (1 - _TOLERANCE))
    if largest <= 1 or between.sum() < 2:
        return None
    smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    slope, offset = np.polyfit(1 / _wavelengths(theta, len(factors))[between], smooth, 1)
    high = round(1 - 1 / float(offset), 3)
    found = Llama3Rope(round(largest, 3), 1.0, high, round(float(slope) * (high - 1)))
    return found if np.allclose(found.factors(theta, len(factors)), factors, rtol=_TOLERANCE) else None


def _wavelengths(theta: float, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    wavelengths: np.ndarray[Any, np.dtype[np.float64]] = 2 * math.pi * np.power(theta, np.arange(count) / count)
    return wavelengths
