"""A running batch: rows of different lengths that share one forward pass and one key-value cache.

Rows are padded on the left, so that the newest token of every row stands in the last column. New rows are prefilled on
their own and joined; finished ones are taken out, and columns that only padding uses are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calpaca.core.engines.row import Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Batch:
    """Rows under way on one model. Used by one thread, inside `torch.inference_mode`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._config = model.config
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask: Tensor | None = None  # [rows, length], True where a token stands

    @property
    def can_join(self) -> bool:
        """Whether rows can join a running batch: every layer must keep all its keys, without a sliding window."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=self._config).layers)

    def admit(self, rows: Sequence[Row]) -> Tensor:
        """Run the prompts of new rows and join them to the batch; logits [len(rows), vocabulary] of their next tokens."""
        import torch
        from transformers.cache_utils import DynamicCache

        width = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for position, row in enumerate(rows):
            ids[position, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[position, width - len(row.ids) :] = True
        mask = mask.to(self._device)
        cache = DynamicCache(config=self._config)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        logits = self._forward(ids.to(self._device), mask, positions, cache)
        self._join(rows, cache, mask)
        return logits

    def step(self) -> Tensor:
        """Run the newest token of every row; logits [rows, vocabulary]."""
        import torch

        assert self._mask is not None
        newest = torch.tensor([[row.ids[-1]] for row in self.rows], device=self._device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=-1)
        positions = self._mask.sum(dim=-1, keepdim=True) - 1
        return self._forward(newest, self._mask, positions, self._cache)

    def drop(self, finished: set[Row]) -> None:
        """Take rows out and free what only they used."""
        import torch

        if not finished:
            return
        keep = [position for position, row in enumerate(self.rows) if row not in finished]
        self.rows = [self.rows[position] for position in keep]
        if not keep:
            self._cache, self._mask = None, None
            return
        assert self._mask is not None
        indices = torch.tensor(keep, device=self._device)
        self._cache.batch_select_indices(indices)
        self._mask = self._mask[indices]
        unused = int(self._mask.any(dim=0).int().argmax())
        if unused:
            self._mask = self._mask[:, unused:]
            self._map_cache(self._cache, lambda states: states[:, :, unused:])

    def clear(self) -> None:
        self.rows, self._cache, self._mask = [], None, None

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits [rows, vocabulary] of the last column. Without padding no mask is needed, which is faster."""
        output = self._model(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _join(self, rows: Sequence[Row], cache: Any, mask: Tensor) -> None:
        """Pad the shorter of the two caches on the left, then stack them."""
        import torch

        if self._cache is None or self._mask is None:
            self.rows, self._cache, self._mask = list(rows), cache, mask
            return
        width = max(mask.shape[1], self._mask.shape[1])
        for part, part_mask in ((self._cache, self._mask), (cache, mask)):
            missing = width - part_mask.shape[1]
            if missing:
                self._map_cache(part, lambda states, pad=missing: torch.nn.functional.pad(states, (0, 0, pad, 0)))
        for own, new in zip(self._cache.layers, cache.layers, strict=True):
            own.keys = torch.cat([own.keys, new.keys])
            own.values = torch.cat([own.values, new.values])
        padded = [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in (self._mask, mask)]
        self._mask = torch.cat(padded)
        self.rows += rows

    @staticmethod
    def _map_cache(cache: Any, change: Any) -> None:
        """Apply `change` to keys and values [rows, heads, length, dimensions] of every layer."""
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
