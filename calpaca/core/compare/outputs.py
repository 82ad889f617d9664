"""What a model makes of probe prompts: the logits at every position, and the tokens it would go on with."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calpaca.core.compare.finite import first_not_finite
from calpaca.core.errors import MissingExtraError, ModelError
from calpaca.core.files import ModelFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Outputs:
    """`logits` float32 [positions, rows] for each prompt, `greedy` the likeliest tokens after each, up to its end.

    `without` has the logits once more, by an adapter's number, with it left out while the others stay (its low-rank part:
    whole tensors that it replaces stay too). `dtype` is what was computed in.
    """

    logits: tuple[Tensor, ...]
    greedy: tuple[Ids, ...]
    without: Mapping[int, tuple[Tensor, ...]]
    dtype: str

    @property
    def rows(self) -> int:
        return self.logits[0].shape[1]


def run(files: ModelFiles, prompts: Sequence[Ids], new_tokens: int) -> Outputs:
    """Load a model, run it on token ids, and free it again.

    Raises ModelError, also when the logits are not finite; it names the first layer where that is so.
    """
    try:
        import torch

        from calpaca.core.weights import load_weights

        loaded = load_weights(files)
    except ModuleNotFoundError as error:
        raise MissingExtraError("Comparing models", "torch", error.name or "torch") from error
    model = loaded.model
    with torch.inference_mode():
        logits = tuple(_logits(model, ids, files.name) for ids in prompts)
        greedy = _greedy(model, prompts, new_tokens, frozenset(loaded.eos_ids))
        without = {}
        for number, left_out in _left_out(model):
            with left_out:
                without[number] = tuple(_logits(model, ids, files.name) for ids in prompts)
    outputs = Outputs(logits, greedy, without, str(model.dtype).removeprefix("torch."))
    del loaded, model
    gc.collect()  # the next model must find the memory free; layers and hooks refer to each other
    return outputs


def _left_out(model: Any) -> Iterator[tuple[int, AbstractContextManager[None]]]:
    """For each adapter with a low-rank part: its number, and a context in which only the others are active."""
    present = list(getattr(model, "peft_config", ()))
    for name in present:
        others = [other for other in present if other != name]
        number = int(name.removeprefix("adapter_"))  # as apply_adapters calls it
        yield number, _only(model, others, present) if others else model.disable_adapter()


@contextmanager
def _only(model: Any, active: list[str], all_of_them: list[str]) -> Iterator[None]:
    model.base_model.set_adapter(active, inference_mode=True)
    try:
        yield
    finally:
        model.base_model.set_adapter(all_of_them, inference_mode=True)


def _logits(model: Any, ids: Ids, name: str) -> Tensor:
    """float32 [positions, rows], on the CPU. Raises ModelError when they are not finite."""
    import torch

    inputs = {"input_ids": torch.tensor([ids], device=model.device), "use_cache": False}
    logits: Tensor = model(**inputs).logits[0].float().cpu()
    if not bool(logits.isfinite().all()):
        raise ModelError(
            f"{name} gives logits that are not finite (NaN or inf). They begin in {first_not_finite(model, inputs)}.",
            "Its weights may be damaged, or it overflows: try --dtype float32 or bfloat16.",
        )
    return logits


def _greedy(model: Any, prompts: Sequence[Ids], count: int, eos_ids: frozenset[int]) -> tuple[Ids, ...]:
    """The likeliest `count` tokens after each prompt, run together; fewer where the answer ends."""
    import torch

    rows = [list[int]() for _ in prompts]
    if not count:
        return tuple(map(tuple, rows))
    step, mask = _padded(prompts, model.device)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    cache: Any = None
    while True:
        output = model(
            input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        step = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        for row, token in zip(rows, step[:, 0].tolist(), strict=True):
            if not row or row[-1] not in eos_ids:
                row.append(token)
        if all(len(row) == count or row[-1] in eos_ids for row in rows):
            return tuple(map(tuple, rows))
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        positions = mask.sum(dim=-1, keepdim=True) - 1


def _padded(prompts: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [prompts, longest], padded on the left."""
    import torch

    width = max(map(len, prompts))
    padding = [width - len(ids) for ids in prompts]
    ids = [[0] * pad + list(row) for pad, row in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * len(row) for pad, row in zip(padding, prompts, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
