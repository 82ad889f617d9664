"""Tensors out of packs of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calpaca_trainer.batches import Pack
from calpaca_trainer.dataset import Dataset

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a token that does not count in the loss."""


@dataclass(frozen=True)
class PackedRows:
    """A dataset whose keys are packs: what `torch.utils.data.DataLoader` reads from."""

    dataset: Dataset
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, pack: Pack) -> list[dict[str, Any]]:
        return [self.dataset[number] for number in pack]


@dataclass(frozen=True)
class Collator:
    """Rows padded on the right to a multiple of `multiple` tokens.

    There is no attention mask: a causal model never looks right, so no real token sees a pad. Packed rows get
    positions that begin anew with each example, by which transformers keeps them apart. `labels` are as transformers
    has them, unshifted; the first token of an example, which nothing predicts, is never one.
    """

    pad_id: int
    packing: bool = False
    multiple: int = 8

    def __call__(self, rows: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
        import torch

        longest = max(sum(len(example["ids"]) for example in row) for row in rows)
        length = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        positions = torch.arange(length).repeat(len(rows), 1)
        for number, row in enumerate(rows):
            self._fill(row, ids[number], labels[number], positions[number])
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if self.packing:
            batch["position_ids"] = positions
        return {**batch, "numbers": [[example["number"] for example in row] for row in rows]}

    def _fill(
        self, row: list[dict[str, Any]], ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
    ) -> None:
        import torch

        at = 0
        for example in row:
            end = at + len(example["ids"])
            ids[at:end] = torch.from_numpy(example["ids"].astype("int64"))
            learnt = torch.from_numpy(example["marks"].copy())
            learnt[0] = False
            labels[at:end] = torch.where(learnt, ids[at:end], IGNORED)
            positions[at:end] = torch.arange(end - at)
            at = end
        positions[at:] = torch.arange(len(positions) - at)
