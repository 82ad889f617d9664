"""How byte-level BPE tokenizers cut a text before they merge, by the names that llama.cpp has for it.

A GGUF file holds tokens and merges but only a name for the cutting (`tokenizer.ggml.pre`). It is found here by what the
tokenizer does, not by which model it belongs to, so a vocabulary that was extended keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calpaca.core.convert.llama3_tokenizer import PATTERN as _LLAMA3

Step = tuple[str, str | bool]
"""`split` and a regular expression, `digits` and whether each stands alone, `bytes` and whether GPT-2's pattern cuts."""

_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # one digit at a time
_CJK = "[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True)
class PreTokenizer:
    """`ignore_merges`: a word that is a token as a whole is taken whole, whatever the merges say."""

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False

    def to_json(self) -> dict[str, Any]:
        """The section of a `tokenizer.json`."""
        return {"type": "Sequence", "pretokenizers": [_to_json(*step) for step in self.steps]}


_KNOWN = (
    PreTokenizer("llama-bpe", (("split", _LLAMA3), ("bytes", False)), ignore_merges=True),
    PreTokenizer("smaug-bpe", (("split", _LLAMA3), ("bytes", False))),
    PreTokenizer("qwen2", (("split", _QWEN2), ("bytes", False))),
    PreTokenizer("smollm", (("digits", True), ("bytes", True))),
    PreTokenizer("gpt-2", (("bytes", True),)),
    PreTokenizer(
        "deepseek-coder",
        (
            ("split", "[\r\n]"), ("split", r"\s?\p{L}+"), ("split", r"\s?\p{P}+"), ("split", _CJK), ("digits", True),
            ("bytes", False),
        ),
    ),
)  # fmt: skip

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {each.name: each for each in _KNOWN}


def find_pre_tokenizer(content: Mapping[str, Any]) -> PreTokenizer | None:
    """The one that a `tokenizer.json` describes; None when it is not known."""
    steps = _steps(content.get("pre_tokenizer"))
    merges = bool(content["model"].get("ignore_merges"))
    return next((each for each in _KNOWN if each.steps == steps and each.ignore_merges == merges), None)


def _steps(section: Any) -> tuple[Step, ...] | None:
    """The steps of a section; None for anything that no known tokenizer has."""
    entries = section.get("pretokenizers", [section]) if isinstance(section, Mapping) else []
    steps = [_step(entry) for entry in entries]
    known = tuple(step for step in steps if step is not None)
    return known if len(known) == len(steps) else None


def _step(entry: Mapping[str, Any]) -> Step | None:
    if entry["type"] == "Split" and entry["behavior"] == "Isolated" and not entry["invert"]:
        pattern = entry["pattern"].get("Regex")
        return ("split", pattern) if pattern is not None else None
    if entry["type"] == "Digits":
        return "digits", bool(entry["individual_digits"])
    if entry["type"] == "ByteLevel" and not entry["add_prefix_space"]:
        return "bytes", bool(entry.get("use_regex", True))
    return None


def _to_json(kind: str, value: str | bool) -> dict[str, Any]:
    if kind == "split":
        return {"type": "Split", "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False}
    if kind == "digits":
        return {"type": "Digits", "individual_digits": value}
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": value}
