"""Questions that were kept from training, each with the answer that is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from calpaca.core.template import Message
from calpaca_trainer.conversation import Conversation, read_conversation
from calpaca_trainer.errors import DataError
from calpaca_trainer.rows import Fault, find_files, read_rows


@dataclass(frozen=True)
class HeldOut:
    """A conversation up to its last answer, and where it stands."""

    place: str
    conversation: Conversation

    @property
    def asked(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.conversation.messages[:-1]

    @property
    def question(self) -> str:
        """What is asked last."""
        return last_question(self.asked)

    @property
    def wanted(self) -> str:
        return str(self.conversation.messages[-1]["content"])


def last_question(messages: tuple[Message, ...]) -> str:
    """The text of the last message of a user; empty where there is none."""
    return next((str(each["content"]) for each in reversed(messages) if each["role"] == "user"), "")


def read_held_out(paths: tuple[Path, ...]) -> tuple[list[HeldOut], list[Fault]]:
    """Every question of files and folders, and the rows that hold none. Raises DataError where there is no question."""
    found: list[HeldOut] = []
    faults: list[Fault] = []
    for each in _read(paths):
        if isinstance(each, Fault):
            faults.append(each)
        else:
            found.append(each)
    if not found:
        first = f" The first: {faults[0]}." if faults else ""
        raise DataError(
            f"There is nothing to measure on: {len(faults)} of {len(faults)} rows cannot be used.{first}",
            "Name rows of one of the forms that `calpaca train sft` takes.",
        )
    return found, faults


def _read(paths: tuple[Path, ...]) -> Iterator[HeldOut | Fault]:
    for row in (row for path in paths for file in find_files(path) for row in read_rows(file)):
        if isinstance(row, Fault):
            yield row
            continue
        content = read_conversation(row)
        yield content if isinstance(content, Fault) else HeldOut(f"{row.file}:{row.line}", content)
