"""Decoding methods that no engine offers, under the names by which users of other libraries ask for them.

A field that is merely unknown may be a typing error; one of these is a wish, and is answered with what comes nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calpaca.core.errors import UnsupportedError


@dataclass(frozen=True)
class _Method:
    title: str
    instead: str


_BEAMS = _Method("beam search", "Use temperature 0, which takes the likeliest token, or several answers by seed.")
_GUIDANCE = _Method("classifier-free guidance", "Say in the prompt what is wanted and what is not.")
_DRAFT = _Method(
    "a draft model", "Leave it out: the transformers engine guesses from the prompt, which needs no second model."
)
_CONTRASTIVE = _Method("contrastive search", "Use repetition_penalty, or temperature with min_p.")

NOT_OFFERED: Mapping[str, _Method] = {
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "use_beam_search": _BEAMS,
    "diversity_penalty": _BEAMS,
    "guidance_scale": _GUIDANCE,
    "negative_prompt": _GUIDANCE,
    "negative_prompt_ids": _GUIDANCE,
    "draft_model": _DRAFT,
    "assistant_model": _DRAFT,
    "speculative_model": _DRAFT,
    "penalty_alpha": _CONTRASTIVE,
}
"""By name of a field. Names are those of transformers' `GenerationConfig`, vLLM and llama.cpp."""

_SWITCHED_OFF = (None, False, 0, 1)
"""Values with which a field asks for nothing: one beam, a guidance scale of 1."""


def instead_of(name: str) -> tuple[str, str] | None:
    """Message and hint for a field or flag that asks for such a method; None for any other."""
    field = name.lstrip("-").replace("-", "_")
    method = NOT_OFFERED.get(field)
    return (f"No engine of calpaca offers {method.title} ({name}).", method.instead) if method is not None else None


def refuse_not_offered(fields: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for the first of `fields` that asks for a method that no engine offers."""
    for name, value in fields.items():
        refusal = instead_of(name)
        if refusal is not None and value not in _SWITCHED_OFF:
            raise UnsupportedError(*refusal)
