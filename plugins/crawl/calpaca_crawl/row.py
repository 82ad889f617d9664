"""A row of instruction data: what is asked and answered, and the forms in which trainers read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["alpaca", "sharegpt", "messages"]


@dataclass(frozen=True)
class Row:
    """`turns` are what the user says and what is answered, one pair or several; `input` is what the first is about."""

    turns: tuple[tuple[str, str], ...]
    input: str = ""

    @property
    def question(self) -> str:
        """All that is asked, as one text."""
        return "\n".join([self.turns[0][0], *filter(None, [self.input]), *(user for user, _ in self.turns[1:])])

    @property
    def answer(self) -> str:
        """All that is answered, as one text."""
        return "\n".join(assistant for _, assistant in self.turns)

    def written(self, form: Form) -> dict[str, Any]:
        """The row in Alpaca's, ShareGPT's or OpenAI's form."""
        if form == "alpaca":
            return self._alpaca()
        first = "\n".join(filter(None, [self.turns[0][0], self.input]))
        turns = [(first, self.turns[0][1]), *self.turns[1:]]
        if form == "sharegpt":
            return {"conversations": _pairs(turns, "from", "value", "human", "gpt")}
        return {"messages": _pairs(turns, "role", "content", "user", "assistant")}

    def _alpaca(self) -> dict[str, Any]:
        """The last turn is the row's own, those before it are its history, as LLaMA-Factory has it."""
        *history, (instruction, output) = self.turns
        row: dict[str, Any] = {"instruction": instruction, "input": self.input, "output": output}
        if history:
            history[0] = ("\n".join(filter(None, [history[0][0], self.input])), history[0][1])
            row |= {"input": "", "history": [list(turn) for turn in history]}
        return row


def _pairs(turns: Sequence[tuple[str, str]], who: str, what: str, user: str, assistant: str) -> list[dict[str, str]]:
    return [{who: name, what: text} for turn in turns for name, text in zip((user, assistant), turn, strict=True)]


def read_row(values: Mapping[str, Any]) -> Row | None:
    """The row in a mapping of one of the three forms; None where there is none in it."""
    for key, what in (("conversations", "value"), ("messages", "content")):
        if isinstance(values.get(key), list):
            said = [str(each.get(what) or "") for each in values[key] if isinstance(each, Mapping)]
            said = said[len(said) % 2 :]  # a system's text comes first
            return Row(tuple(zip(said[::2], said[1::2], strict=True))) if said else None
    instruction, output = _text(values.get("instruction")), _text(values.get("output"))
    return Row(((instruction, output),), _text(values.get("input"))) if instruction else None


def _text(value: Any) -> str:
    """A field as text: models also write numbers, lists and objects where a text is asked for."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
