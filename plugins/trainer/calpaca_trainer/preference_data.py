"""Preferences as token ids, in memory, in the shape that batches are planned of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calpaca.core.errors import UnsupportedError, UsageError
from calpaca.core.fingerprint import file_digest
from calpaca_trainer.dataset import DataSource, data_digest
from calpaca_trainer.errors import DataError
from calpaca_trainer.preferences import Preference, read_preference
from calpaca_trainer.rendering import ConversationRenderer, Example, TooLong
from calpaca_trainer.rows import Fault, find_files, read_rows

if TYPE_CHECKING:
    import numpy as np

PreferenceLoss = Literal["dpo", "kto"]


@dataclass(frozen=True)
class PreferredAnswers:
    """Token ids of a prompt and of its answers. A pair has both, a rated answer one of them."""

    file: Path
    line: int
    weight: float
    prompt: list[int] = field(default_factory=list)
    chosen: list[int] | None = None
    rejected: list[int] | None = None

    def parts(self) -> list[tuple[str, list[int]]]:
        """The prompt, marked with a space, and each answer: the better with a plus, the worse with a minus."""
        answers = [("+", self.chosen), ("-", self.rejected)]
        return [(" ", self.prompt), *((mark, ids) for mark, ids in answers if ids is not None)]

    @property
    def length(self) -> int:
        """Tokens of all that is computed for it."""
        answers = [each for each in (self.chosen, self.rejected) if each is not None]
        return sum(len(self.prompt) + len(each) for each in answers)


@dataclass(frozen=True)
class PreferenceData:
    """Preferences of several files. What of it is asked by the planning of batches is as a `Dataset` has it."""

    rows: tuple[PreferredAnswers, ...]
    digests: tuple[str, ...]
    weights: tuple[float, ...]
    faults: tuple[Fault, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The better answer (else the worse) as an example has it: ids and marks; and the whole row."""
        import numpy as np

        row = self.rows[number]
        answer = row.chosen or row.rejected or []
        marks = np.zeros(len(row.prompt) + len(answer), dtype=bool)
        marks[len(row.prompt) :] = True
        ids = np.asarray([*row.prompt, *answer], dtype=np.int32)
        return {"ids": ids, "marks": marks, "number": number, "answers": row}

    def place(self, number: int) -> str:
        """File and line that a row came from."""
        row = self.rows[number]
        return f"{row.file}:{row.line}"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every row."""
        import numpy as np

        return np.asarray([row.length for row in self.rows])

    @cached_property
    def weight_of(self) -> np.ndarray:
        """The weight of every row's source."""
        import numpy as np

        return np.asarray([row.weight for row in self.rows])

    def __add__(self, other: PreferenceData) -> PreferenceData:
        """Both, this one's rows first."""
        return PreferenceData(
            self.rows + other.rows, self.digests + other.digests, self.weights + other.weights,
            self.faults + other.faults,
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """What the data is, by content and weights."""
        return data_digest(self.digests, self.weights)


def check_surroundings(processes: int) -> None:
    """Raises UsageError where the package that has the losses is missing, UnsupportedError for several processes: what KTO
    measures by is a process's own batch."""
    if processes > 1:
        raise UnsupportedError(
            f"Preferences are learnt in one process, and there are {processes}.", "Leave torchrun and --processes away."
        )
    if find_spec("trl") is None or find_spec("datasets") is None:
        raise UsageError(
            "Learning from preferences needs the package 'trl', which is not installed.",
            "Install it with: pip install 'calpaca-trainer[preferences]'",
        )


def load_preferences(
    sources: Sequence[DataSource], renderer: ConversationRenderer, loss: PreferenceLoss
) -> PreferenceData:
    """Read, check and render all files. DPO needs pairs; for KTO a pair is a good answer and a bad one.

    Raises DataError where nothing is left to learn from.
    """
    files = [(file, source.weight) for source in sources for file in find_files(source.path)]
    found = [each for file, weight in files for each in _load_file(file, weight, renderer, loss)]
    data = PreferenceData(
        tuple(each for each in found if isinstance(each, PreferredAnswers)),
        tuple(file_digest(file) for file, _ in files),
        tuple(weight for _, weight in files),
        tuple(each for each in found if isinstance(each, Fault)),
    )
    _check(data, loss)
    return data


def _load_file(
    file: Path, weight: float, renderer: ConversationRenderer, loss: PreferenceLoss
) -> Iterator[PreferredAnswers | Fault]:
    for row in read_rows(file):
        preference = row if isinstance(row, Fault) else read_preference(row)
        if isinstance(preference, Fault):
            yield preference
        elif loss == "dpo" and not preference.is_pair:
            yield Fault(file, row.line, "one answer alone: --loss kto learns from those")
        else:
            yield from _render(preference, PreferredAnswers(file, row.line, weight), renderer, loss)


def _render(
    preference: Preference, empty: PreferredAnswers, renderer: ConversationRenderer, loss: PreferenceLoss
) -> Iterator[PreferredAnswers | Fault]:
    """The row with its ids; with KTO's loss one for each answer."""
    rendered = [_only(examples) for examples in renderer.render(preference.conversations())]
    long = next((each for each in rendered if isinstance(each, TooLong)), None)
    if long is not None:
        yield Fault(empty.file, empty.line, f"{long.tokens} tokens with its prompt, more than --max-length")
        return
    answers = iter([each for each in rendered if isinstance(each, Example)])
    chosen = next(answers) if preference.chosen is not None else None
    rejected = next(answers) if preference.rejected is not None else None
    pairs = [(chosen, rejected)] if loss == "dpo" else [(chosen, None), (None, rejected)]
    yield from (_filled(empty, better, worse) for better, worse in pairs if better or worse)


def _only(examples: list[Example | TooLong]) -> Example | TooLong:
    (example,) = examples
    return example


def _filled(empty: PreferredAnswers, chosen: Example | None, rejected: Example | None) -> PreferredAnswers:
    example = chosen or rejected
    assert example is not None
    start = example.spans[0][0]
    better, worse = (each.ids[start:] if each is not None else None for each in (chosen, rejected))
    return replace(empty, prompt=example.ids[:start], chosen=better, rejected=worse)


def _check(data: PreferenceData, loss: PreferenceLoss) -> None:
    """Raises DataError for data that teaches nothing."""
    if not len(data):
        first = f" The first: {data.faults[0]}." if data.faults else ""
        raise DataError(
            f"There is nothing to learn from: {len(data.faults)} of {len(data.faults)} rows cannot be used.{first}",
            "Rows need prompt, chosen and rejected, or with --loss kto prompt, completion and label.",
        )
    good = sum(row.chosen is not None for row in data.rows)
    if loss == "kto" and good in {0, len(data)}:
        raise DataError(
            f"All {len(data)} answers are {'good' if good else 'bad'}: KTO needs both.", "Add rows of the other label."
        )
