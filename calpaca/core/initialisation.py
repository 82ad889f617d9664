"""How an adapter was initialised, as far as it matters to those who only run it: whether the base was changed with it.

PiSSA, CorDA, OLoRA and LoRA-GA take the initial A and B out of the base's weights, LoftQ quantizes them; the adapter
then fits that other base only. Source: PEFT's `tuners/lora/layer.py` (what each does to the base) and `tuners/lora/model.py`
(which it converts), version 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calpaca.core.errors import UnsupportedError

_KEEP_BASE = {"gaussian", "eva", "orthogonal", "mica"}
_CONVERTED_BY_PEFT = ("pissa", "corda", "olora", "lora_ga")  # beginnings: there is pissa_niter_16 too


def check_initialisation(name: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for an adapter whose initialisation changed the base, with the way to an ordinary one."""
    kind = config.get("init_lora_weights", True)
    if not isinstance(kind, str) or kind.lower() in _KEEP_BASE:
        return
    known = kind.lower().startswith((*_CONVERTED_BY_PEFT, "loftq"))
    effect = "changes the base's weights too" if known else "is not known to leave the base's weights as they are"
    raise UnsupportedError(f"Adapter {name} was initialised by {kind}, which {effect}.", _way_out(config, kind.lower()))


def _way_out(config: Mapping[str, Any], kind: str) -> str:
    """Conversion where PEFT offers it, which doubles the rank; else the changed base, saved as a model of its own."""
    patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    if kind.startswith(_CONVERTED_BY_PEFT) and not (config.get("use_rslora") and patterns):
        return (
            "Make it an ordinary adapter in PEFT, where it was trained: save_pretrained(OUTPUT,"
            " path_initial_model_for_weight_conversion=START), where START is the adapter as it was saved before training."
        )
    return (
        "PEFT cannot convert it. Save the base that it changed, where it was trained: unload().save_pretrained(BASE)."
        ' Then name BASE as the model, and set "init_lora_weights": true in adapter_config.json.'
    )
