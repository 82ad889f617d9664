"""Conversations that are kept on disk and taken up again by name."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from calpaca.core.errors import SessionError, UsageError
from calpaca.core.paths import data_dir

_NAME = re.compile(r"[\w][\w.-]{0,99}")


class Session:
    """The turns of a conversation, a JSON object per line, the oldest first.

    A turn is appended whole once its answer is there, and reaches the disk before the answer's result is given out. What a
    kill or a full disk cut off at the end is no turn; the next one is written over it. Two processes may add to one
    session.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' is no name for a session.", "Use letters, digits, dots, - and _, as in plans-2026."
            )
        self.name = name
        self.path = (folder or data_dir() / "sessions" / "retrieval_qa") / f"{name}.jsonl"

    def turns(self) -> list[dict[str, str]]:
        """The messages so far: question, answer, question, …"""
        messages = []
        for turn in self.records():
            messages.append({"role": "user", "content": str(turn["question"])})
            messages.append({"role": "assistant", "content": str(turn["answer"])})
        return messages

    def records(self) -> list[dict[str, Any]]:
        """Every turn as it was written. Raises SessionError for a file that is no session."""
        with self._translated():
            return self._whole()[0] if self.path.is_file() else []

    def append(self, **turn: Any) -> None:
        """Write a turn down. Raises SessionError when that fails; what was there stays."""
        line = json.dumps({**turn, "time": time.time()}, ensure_ascii=False, default=str) + "\n"
        with self._translated():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")), self.path.open("ab+") as file:
                file.truncate(self._whole()[1])
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())

    def _whole(self) -> tuple[list[dict[str, Any]], int]:
        """The turns, and the bytes they take: a last line without its end is none."""
        content = self.path.read_bytes()
        size = content.rfind(b"\n") + 1
        return [self._turn(line) for line in content[:size].splitlines()], size

    def _turn(self, line: bytes) -> dict[str, Any]:
        try:
            turn = json.loads(line)
            if turn["question"] is not None and turn["answer"] is not None:
                return dict(turn)
        except (ValueError, KeyError, TypeError):
            pass
        raise SessionError(f"{self.path} is no session: {line[:60]!r}.", "Remove the file, or name another session.")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SessionError(
                f"The session {self.path} cannot be used: {error.strerror or error}.",
                "Free disk space or check the permissions; CALPACA_DATA moves it.",
            ) from error
