"""Training data: files in all their forms, checked, rendered, cached, and mixed by weight."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from calpaca.core.fingerprint import file_digest
from calpaca.core.jobs import step_key
from calpaca_trainer.conversation import Conversation, form_of, read_conversation, read_text
from calpaca_trainer.errors import DataError
from calpaca_trainer.rendering import Example, TooLong
from calpaca_trainer.rows import Fault, Row, find_files, read_rows
from calpaca_trainer.token_cache import TokenCache, cache_key, find_cache, write_cache

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("calpaca")

Stage = Literal["sft", "pretrain", "dpo"]


@dataclass(frozen=True)
class DataSource:
    """A file or folder, and how often its examples are seen beside those of the others: 1.0 once in an epoch."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """Read `PATH` or `PATH@0.5`."""
        path, at, weight = text.rpartition("@")
        try:
            return cls(Path(path), float(weight)) if at and not Path(text).exists() else cls(Path(text))
        except ValueError:
            return cls(Path(text))


class Renderer(Protocol):
    """What makes examples of conversations, or of texts."""

    def render(self, contents: Iterable[Any], /) -> Iterator[list[Example | TooLong]]: ...


@dataclass(frozen=True)
class Rendering:
    """How rows become examples: for which stage, by which renderer; `key` names everything it depends on."""

    stage: Stage
    renderer: Renderer
    key: dict[str, Any]
    unit: str = "document"


@dataclass(frozen=True)
class Dataset:
    """Examples of several files. Example numbers run through all of them."""

    caches: tuple[TokenCache, ...]
    weights: tuple[float, ...]
    digests: tuple[str, ...]
    faults: tuple[Fault, ...] = field(default=())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Ids and marks of an example, and its number."""
        cache, within = self._find(number)
        return {"ids": cache.ids(within), "marks": cache.marks(within), "number": number}

    def place(self, number: int) -> str:
        """File and line that an example came from."""
        cache, within = self._find(number)
        return f"{cache.file}:{cache.line(within)}"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example."""
        return self._joined([cache.lengths for cache in self.caches])

    @cached_property
    def learnt(self) -> np.ndarray:
        """Tokens of every example that count in the loss."""
        return self._joined([cache.learnt for cache in self.caches])

    @cached_property
    def weight_of(self) -> np.ndarray:
        """The weight of every example's source."""
        import numpy as np

        return self._joined(
            [np.full(len(cache), weight) for cache, weight in zip(self.caches, self.weights, strict=True)]
        )

    def __add__(self, other: Dataset) -> Dataset:
        """Both, this one's examples first."""
        return Dataset(
            self.caches + other.caches, self.weights + other.weights, self.digests + other.digests,
            self.faults + other.faults,
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """What the data is, by content and weights."""
        return data_digest(self.digests, self.weights)

    @cached_property
    def _starts(self) -> np.ndarray:
        import numpy as np

        return np.cumsum([0, *map(len, self.caches)])

    def _find(self, number: int) -> tuple[TokenCache, int]:
        import numpy as np

        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.caches[at], int(number - self._starts[at])

    @staticmethod
    def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        import numpy as np

        return np.concatenate(arrays) if arrays else np.zeros(0)


def data_digest(files: Sequence[str], weights: Sequence[float]) -> str:
    """What data is, by the digests of its files and their weights."""
    return step_key("training data", files=list(files), weights=list(weights))


def load_dataset(sources: Sequence[DataSource], rendering: Rendering) -> Dataset:
    """Read, check and render all files, or take what the cache holds of them.

    Raises DataError for a file that mixes forms, and where nothing is left to learn from.
    """
    files = [(file, source.weight) for source in sources for file in find_files(source.path)]
    caches = [_load_file(file, rendering) for file, _ in files]
    faults = tuple(fault for cache in caches for fault in cache.faults)
    dataset = Dataset(
        tuple(caches), tuple(weight for _, weight in files), tuple(file_digest(file) for file, _ in files), faults
    )
    if not len(dataset):
        first = f" The first: {faults[0]}." if faults else ""
        raise DataError(
            f"There is nothing to learn from: {len(faults)} of {len(faults)} rows cannot be used.{first}",
            "`calpaca train data check` lists them all.",
        )
    return dataset


def _load_file(file: Path, rendering: Rendering) -> TokenCache:
    key = cache_key(content=file_digest(file), suffix=file.suffix.lower(), unit=rendering.unit, **rendering.key)
    found = find_cache(key, file)
    if found is not None:
        return found
    log.info("Reading %s.", file)
    faults: list[Fault] = []
    facts: dict[str, Any] = {"rows": 0}
    contents = _contents(file, rendering, faults, facts)
    return write_cache(key, file, _examples(contents, rendering.renderer, faults), faults, facts)


def _contents(
    file: Path, rendering: Rendering, faults: list[Fault], facts: dict[str, Any]
) -> Iterator[tuple[Row, Conversation | str]]:
    """What is in the rows that are sound; the others go to `faults`. Raises DataError when forms are mixed."""
    read = read_conversation if rendering.stage == "sft" else read_text
    forms = Counter[str]()
    for row in read_rows(file, rendering.unit):
        facts["rows"] += 1
        if isinstance(row, Fault):
            faults.append(row)
            continue
        forms[form_of(row) or "unknown"] += 1
        content = read(row)
        if isinstance(content, Fault):
            faults.append(content)
        else:
            yield row, content
    known = forms.keys() - {"unknown"}
    if len(known) > 1:
        counts = ", ".join(f"{count} of {name}" for name, count in forms.most_common())
        raise DataError(f"{file} mixes rows of several forms: {counts}.", "Give each form a file of its own.")
    facts["form"] = next(iter(known), None)


def _examples(
    contents: Iterable[tuple[Row, Conversation | str]], renderer: Renderer, faults: list[Fault]
) -> Iterator[tuple[int, Example]]:
    """The examples with the lines of their rows; what is too long, or has nothing to learn, goes to `faults`."""
    places = deque[tuple[Path, int]]()  # of rows that are read but not rendered yet

    def remembered() -> Iterator[Conversation | str]:
        for row, content in contents:
            places.append((row.file, row.line))
            yield content

    for examples in renderer.render(remembered()):
        file, line = places.popleft()
        for example in examples:
            if isinstance(example, TooLong):
                faults.append(Fault(file, line, f"{example.tokens} tokens with its prompt, more than --max-length"))
            elif not example.learnt:
                faults.append(Fault(file, line, "no token of it is learnt"))
            else:
                yield line, example
