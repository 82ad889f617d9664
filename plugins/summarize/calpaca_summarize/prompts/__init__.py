"""What the model is asked, in the language of the text, from the TOML files beside this one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from calpaca.core.language import Language, language_of
from calpaca.core.template import Message

Length = Literal["short", "medium", "long"]
Style = Literal["prose", "bullets"]
Prompt = tuple[Message, ...]

_NAMES: dict[str, Language] = {"en": "en", "english": "en", "zh": "zh", "chinese": "zh", "中文": "zh"}
_FOREIGN = re.compile(r"[^\W\d_a-zA-Z]")
_SAMPLE = 20_000


@dataclass(frozen=True)
class Wishes:
    """What the summary is to be like. `language` None is that of the text."""

    length: Length = "medium"
    style: Style = "prose"
    focus: str | None = None
    language: str | None = None


class SummaryPrompts:
    """Prompts of one user's message each. Texts stand in them as they are, also their white space."""

    def __init__(self, wishes: Wishes, sample: str) -> None:
        """`sample` is some of the text; it decides about the language where the wishes do not."""
        named = _NAMES.get((wishes.language or "").strip().lower())
        self.language: Language = named or ("en" if wishes.language else language_of(sample[:_SAMPLE]))
        self._texts = _shipped(self.language)
        wish = self._texts["wish"]
        self._values = {
            "length": self._texts["bullets" if wishes.style == "bullets" else "length"][wishes.length],
            "style": wish[wishes.style],
            "focus": wish["focus"].format(focus=wishes.focus.strip()) if wishes.focus else "",
            "language": self._in_language(wishes.language, named, sample[:_SAMPLE]),
        }

    def _in_language(self, wanted: str | None, named: Language | None, sample: str) -> str:
        wish: dict[str, str] = self._texts["wish"]
        if wanted and named is None:
            return wish["language"].format(language=wanted.strip())
        other = language_of(sample) != self.language
        if wanted and other:
            return wish["language"].format(language={"en": "English", "zh": "中文"}[self.language])
        foreign = not wanted and len(_FOREIGN.findall(sample)) > len(sample) // 200
        return wish["same_language"] if foreign else ""

    def whole(self, texts: Sequence[str]) -> Prompt:
        """The whole text at once."""
        return self._prompt("whole", text="\n\n".join(texts))

    def part(self, text: str) -> Prompt:
        """One part, whose summary is one of many."""
        return self._prompt("part", text=text)

    def first(self, text: str) -> Prompt:
        """The first part of a text that is read in order."""
        return self._prompt("first", text=text)

    def refine(self, summary: str, text: str) -> Prompt:
        """A further part, and the summary of all before it."""
        return self._prompt("refine", summary=summary, text=text)

    def collapse(self, summaries: Sequence[str]) -> Prompt:
        """Summaries of parts that follow each other, to be made one."""
        return self._prompt("collapse", text="\n\n".join(summaries))

    def combine(self, summaries: Sequence[str]) -> Prompt:
        """Summaries of all parts."""
        return self._prompt("combine", text="\n\n".join(summaries))

    def _prompt(self, name: str, **values: str) -> Prompt:
        return ({"role": "user", "content": self._texts[name].strip().format(**self._values, **values)},)


@cache
def _shipped(language: Language) -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath(f"{language}.toml").read_text(encoding="utf-8"))
