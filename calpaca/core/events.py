"""What an app, an index or a job reports while it works."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from calpaca.core.context import ContextUse
from calpaca.core.engine import Usage


@dataclass(frozen=True)
class Step:
    """A step begins: `index` of `total`, counted from 1; `total` is 0 where it is not known."""

    name: str
    index: int
    total: int = 0


@dataclass(frozen=True)
class Token:
    """A piece of text as the model produced it. `step` counts as in `Step`; the last step's text is the answer."""

    text: str
    step: int = 1


@dataclass(frozen=True)
class Source:
    """A passage the answer rests on. `start` and `end` are lines counted from 1, both included."""

    source: str
    text: str
    page: int | None = None
    start: int | None = None
    end: int | None = None
    score: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where in its document it stands: `page 3, lines 4-5`; a heading where it has no lines; may be empty."""
        parts = [f"page {self.page}"] if self.page is not None else []
        if self.start is not None:
            several = self.end is not None and self.end != self.start
            parts.append(f"lines {self.start}-{self.end}" if several else f"line {self.start}")
        elif self.metadata.get("heading"):  # text of a web page or an office document has no lines
            parts.append(str(self.metadata["heading"]))
        return ", ".join(parts)


@dataclass(frozen=True)
class UsageReport:
    """Tokens used so far."""

    usage: Usage


@dataclass(frozen=True)
class ContextReport:
    """What the model was sent for the result, and what was left out."""

    use: ContextUse


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s; `total` is None where it is not known."""

    done: int
    total: int | None
    unit: str
    what: str = ""


@dataclass(frozen=True)
class Notice:
    """One line a person should read: something was skipped, replaced or not found."""

    text: str


@dataclass(frozen=True)
class Result:
    """The last event: the app's whole answer as a mapping, as `--json` prints it."""

    value: dict[str, Any]


Event = Step | Token | Source | UsageReport | ContextReport | Progress | Notice | Result
