"""How far a model's rotary positions reach when the keys of many texts are kept side by side.

Linear scaling, NTK with a fixed base, YaRN and Llama 3's scaling turn each position by the same angles in every text, and
are left to the model. Two kinds change the angles once a text is longer than the model was trained for: keys that were
kept before then have the old ones, and those of shorter texts in the same step would get the new ones. Up to the trained
length they are exact, so that is how far they go here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("calpaca")

CHANGING = ("dynamic", "longrope")


def scaling(config: Mapping[str, Any]) -> str | None:
    """The kind of scaling that a `config.json` states, by the keys of transformers 5 or of older versions."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = stated.get("rope_type") or stated.get("type")
    return None if kind in {None, "default"} else str(kind)


def usable_context(config: Any, context_length: int) -> int:
    """Tokens of a text for which the angles stay the same; says so where that is less than the model's context."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type")
    if kind not in CHANGING:
        return context_length
    trained = (
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )
    log.warning(
        "RoPE scaling of the type '%s' changes with the length of a text, which kept keys do not allow: the context is"
        " %d tokens. For longer texts set the type 'yarn' or 'linear' in the model's config.json.",
        kind,
        trained,
    )
    return min(int(trained), context_length)
