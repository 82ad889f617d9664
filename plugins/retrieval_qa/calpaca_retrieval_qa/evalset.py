"""Sets of questions with their expected answers: JSON Lines.

{"question": "Who keeps the key?", "answers": ["Lin Zhao"], "source": "handbook.md", "start": 1041, "end": 1049}

`answers` are the accepted ones, in the words of the document; none at all says that the documents hold no answer.
`source` is the document's path, or the end of it; `start` and `end` are where the answer stands, in characters of the
document (of its `page`, where it has pages). Without them a passage counts as the right one when it holds an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from calpaca.core.errors import UsageError
from calpaca.core.paths import atomic_file
from calpaca_retrieval_qa.quotation import FoldedText


class EvalQuestion(BaseModel):
    """A question, what is accepted as its answer, and where that stands. Other keys are kept and not used."""

    model_config = ConfigDict(frozen=True, extra="allow")

    question: str
    answers: list[str] = []
    source: str | None = None
    page: int | None = None
    start: int | None = None
    end: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EvalQuestion:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if (self.start is None) != (self.end is None):
            raise ValueError("start and end belong together")
        if self.start is not None and (self.source is None or self.end is None or not 0 <= self.start < self.end):
            raise ValueError("start and end are characters of a source, the first below the second")
        return self

    @property
    def answerable(self) -> bool:
        return bool(self.answers)

    def holds(self, source: str, page: int | None, text: str, place: tuple[int, int] | None) -> bool:
        """Whether a piece of a document, `place` of it, is where the answer stands."""
        if not self.answers or (self.source is not None and not _ends_with(source, self.source)):
            return False
        if self.start is None or self.end is None or place is None:
            return any(FoldedText(text).find(answer) for answer in self.answers)
        return (self.page is None or self.page == page) and place[0] < self.end and place[1] > self.start


def _ends_with(path: str, end: str) -> bool:
    parts, wanted = PurePath(path).parts, PurePath(end).parts
    return parts[-len(wanted) :] == wanted


def read_evalset(path: Path) -> list[EvalQuestion]:
    """The questions of a file. Raises UsageError with the line that is wrong, and for an empty file."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The evaluation set {path} cannot be read: {error}.", "It must be JSON Lines in UTF-8."
        ) from error
    questions = [_read(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UsageError(f"The evaluation set {path} is empty.", "Draft one with --make-evalset FILE.")
    return questions


def _read(path: Path, number: int, line: str) -> EvalQuestion:
    try:
        return EvalQuestion.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    except ValueError as error:
        fault = f"no JSON: {error}"
    raise UsageError(
        f"{path}, line {number}: {fault}.", 'A line is {"question": "…", "answers": ["…"], "source": "…"}.'
    )


def write_evalset(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a set, whole or not at all. Raises UsageError when that fails."""
    try:
        with atomic_file(path.expanduser()) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", "Name another file.") from error


def check_writable(path: Path) -> None:
    """Raises UsageError for a file that is there: questions that somebody went over are not written over."""
    if path.expanduser().exists():
        raise UsageError(f"{path} is there already.", "Name a new file, or remove that one.")


def split_by_source(questions: Sequence[EvalQuestion]) -> tuple[list[EvalQuestion], list[EvalQuestion]]:
    """Two halves that share no document: to choose a threshold on one and test it on the other."""
    sources = sorted({question.source or "" for question in questions if question.answerable})
    first = set(sources[: (len(sources) + 1) // 2])
    halves: tuple[list[EvalQuestion], list[EvalQuestion]] = ([], [])
    free = 0
    for question in questions:
        if question.answerable:
            halves[(question.source or "") not in first].append(question)
        else:
            halves[free % 2].append(question)
            free += 1
    return halves
