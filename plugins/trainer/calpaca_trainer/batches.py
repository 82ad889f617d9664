"""Which examples are computed together, for a whole run: mixed by weight, shuffled, packed and sorted by length.

The plan follows from the data and the seed alone, so a run that is resumed goes on with the batch it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from calpaca_trainer.dataset import Dataset

if TYPE_CHECKING:
    import numpy as np

Pack = tuple[int, ...]
"""Numbers of the examples that share a row."""
Batch = list[Pack]

_WINDOW = 64  # batches whose rows are sorted by length, so that little is padded and the order stays random


@dataclass(frozen=True)
class BatchOptions:
    """`batch_size` counts rows; `max_length` is a row's most tokens; `accumulation` batches make a step."""

    batch_size: int
    max_length: int
    accumulation: int = 1
    packing: bool = False
    seed: int = 0


def plan_batches(
    dataset: Dataset, members: np.ndarray, options: BatchOptions, *, epochs: float, max_steps: int | None = None
) -> list[Batch]:
    """The batches of a run. `members` are the numbers of the examples that it may use."""
    if max_steps is not None:
        return list(islice(_forever(dataset, members, options), max_steps * options.accumulation))
    whole, part = int(epochs), epochs - int(epochs)
    batches = [batch for epoch in range(whole) for batch in _epoch(dataset, members, options, epoch)]
    if part:
        last = list(_epoch(dataset, members, options, whole))
        batches += last[: max(1, round(part * len(last)))]
    return batches


def plan_evaluation(dataset: Dataset, members: np.ndarray, options: BatchOptions) -> list[Batch]:
    """Every example once, by length."""
    import numpy as np

    order = members[np.argsort(-dataset.lengths[members], kind="stable")]
    rows: list[Pack] = [(int(number),) for number in order]
    return [rows[at : at + options.batch_size] for at in range(0, len(rows), options.batch_size)]


def _forever(dataset: Dataset, members: np.ndarray, options: BatchOptions) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from _epoch(dataset, members, options, epoch)
        epoch += 1


def _epoch(dataset: Dataset, members: np.ndarray, options: BatchOptions, epoch: int) -> Iterator[Batch]:
    import numpy as np

    chance = np.random.default_rng((options.seed, epoch))
    weights = dataset.weight_of[members]
    times = np.floor(weights + chance.random(len(members))).astype(int)  # weight 1.5: once, and half of them twice
    order = chance.permutation(np.repeat(members, times))
    if not len(order):
        order = chance.permutation(members)
    window = options.batch_size * _WINDOW
    for start in range(0, len(order), window):
        numbers = order[start : start + window]
        rows = _pack(numbers, dataset, options) if options.packing else [(int(number),) for number in numbers]
        rows.sort(key=lambda row: sum(int(dataset.lengths[number]) for number in row))
        batches = [rows[at : at + options.batch_size] for at in range(0, len(rows), options.batch_size)]
        yield from (batches[at] for at in chance.permutation(len(batches)))


def _pack(numbers: np.ndarray, dataset: Dataset, options: BatchOptions) -> list[Pack]:
    """First fit, the longest first: each example goes into the first row that has room for it."""
    packs: list[list[int]] = []
    room: list[int] = []
    for number in sorted(map(int, numbers), key=lambda number: -int(dataset.lengths[number])):
        length = int(dataset.lengths[number])
        at = next((at for at, left in enumerate(room) if left >= length), None)
        if at is None:
            packs.append([number])
            room.append(options.max_length - length)
        else:
            packs[at].append(number)
            room[at] -= length
    return list(map(tuple, packs))


def most_tokens(batches: Sequence[Batch], dataset: Dataset, multiple: int = 8) -> int:
    """Tokens of the largest batch, its rows padded to a multiple of `multiple`."""
    lengths = dataset.lengths.tolist()
    longest = ((len(batch), max(sum(lengths[number] for number in pack) for pack in batch)) for batch in batches)
    return max((rows * -(-tokens // multiple) * multiple for rows, tokens in longest), default=0)


def split(dataset: Dataset, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to train on, and of the share that is kept for measuring (at least one if any)."""
    import numpy as np

    order = np.random.default_rng((seed, 0xE7A1)).permutation(len(dataset))
    kept = min(math.ceil(share * len(dataset)), len(dataset) - 1) if share else 0
    return np.sort(order[kept:]), np.sort(order[:kept])
