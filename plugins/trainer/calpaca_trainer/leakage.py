"""Questions to measure on that were trained on: the same, nearly the same, or part of a text that was."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core.checkpoint.manifest import read_manifest
from calpaca.core.fingerprint import file_digest
from calpaca.core.near_duplicates import THRESHOLD, NearDuplicates
from calpaca.core.text_measures import words
from calpaca_trainer.conversation import read_conversation
from calpaca_trainer.dataset import DataSource, data_digest
from calpaca_trainer.errors import DataError
from calpaca_trainer.held_out import HeldOut, last_question
from calpaca_trainer.preferences import read_preference
from calpaca_trainer.rows import Fault, Row, find_files, read_rows

_HINT = "Name the data that it was trained on with --trained-on, once for each file."


@dataclass(frozen=True)
class Leak:
    """A question to measure on, the place of the training data that it is like, and how much: 1.0 is word for word."""

    question: HeldOut
    trained: str
    similarity: float

    def __str__(self) -> str:
        how = "is" if self.similarity == 1.0 else f"is {self.similarity:.0%} like"
        return f"{self.question.place}: {how} {self.trained}"


@dataclass(frozen=True)
class _Trained:
    place: str
    text: str
    is_question: bool


def find_leaks(questions: Sequence[HeldOut], trained: Sequence[Path], threshold: float = THRESHOLD) -> list[Leak]:
    """The questions that stand in the training files too. Words are compared without case and punctuation; questions of at
    least `threshold` ROUGE-L are nearly the same, and one that stands in a plain text word for word is in it."""
    rows = list(_trained(trained))
    known = {_plain(row.text): row.place for row in reversed(rows) if row.is_question}
    asked = [row for row in rows if row.is_question]
    pool = NearDuplicates(threshold)
    for row in asked:
        pool.keep(row.text)
    texts = [(f" {_plain(row.text)} ", row.place) for row in rows if not row.is_question]
    return [leak for question in questions if (leak := _leak(question, known, texts, pool, asked)) is not None]


def _leak(
    question: HeldOut, known: dict[str, str], texts: Sequence[tuple[str, str]], pool: NearDuplicates,
    asked: Sequence[_Trained],
) -> Leak | None:  # fmt: skip
    plain = _plain(question.question)
    if plain in known:
        return Leak(question, known[plain], 1.0)
    place = next((place for text, place in texts if f" {plain} " in text), None)
    if place is not None:
        return Leak(question, place, 1.0)
    match = pool.find(question.question)
    return None if match is None else Leak(question, asked[match.number].place, match.similarity)


def _plain(text: str) -> str:
    return " ".join(words(text))


def _trained(paths: Iterable[Path]) -> Iterator[_Trained]:
    for row in (row for path in paths for file in find_files(path) for row in read_rows(file)):
        if isinstance(row, Row):
            place = f"{row.file}:{row.line}"
            yield from (_Trained(place, text, is_question) for text, is_question in _texts(row))


def _texts(row: Row) -> Iterator[tuple[str, bool]]:
    """Every question of a row, or its text."""
    if isinstance(row.values.get("text"), str):
        yield row.values["text"], False
        return
    preference = read_preference(row)
    if not isinstance(preference, Fault):
        yield last_question(preference.prompt), True
        return
    content = read_conversation(row)
    if not isinstance(content, Fault):
        yield from ((str(each["content"]), True) for each in content.messages if each["role"] == "user")


# What an adapter was trained on --------------------------------------------------------------------------------------


def training_files(adapter: Path) -> list[Path]:
    """The files that an adapter was trained on, as its run folder says, and those of the adapter that it went on from.

    Raises DataError where that is not known, or where the files are no longer what they were.
    """
    recipe = _recipe(adapter)
    sources = [DataSource.parse(text) for text in (*recipe.get("datasets", ()), *recipe.get("eval_datasets", ()))]
    files = [(file, source.weight) for source in sources for file in find_files(source.path)]
    manifest = read_manifest(adapter)
    recorded = manifest.lineage.settings.get("data") if manifest is not None else None
    digest = data_digest([file_digest(file) for file, _ in files], [weight for _, weight in files])
    if recorded != digest:
        raise DataError(f"The data that {adapter} was trained on is no longer what it was.", _HINT)
    earlier = training_files(Path(recipe["adapter"])) if recipe.get("adapter") else []
    return [*(file for file, _ in files), *earlier]


def _recipe(adapter: Path) -> dict[str, Any]:
    file = adapter / "recipe.toml"
    if not file.is_file():
        raise DataError(f"{adapter} does not say what it was trained on: there is no recipe.toml in it.", _HINT)
    return tomllib.loads(file.read_text("utf-8"))
