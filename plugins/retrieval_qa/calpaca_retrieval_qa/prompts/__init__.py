"""Prompts for each language, read from the TOML files beside this one or from the user's."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from calpaca.core.errors import UsageError, unknown_name
from calpaca.core.language import Language

_VARIABLES: Mapping[tuple[str, str], frozenset[str]] = {
    ("stuff", "system"): frozenset(),
    ("stuff", "passage"): frozenset({"text", "number", "source", "excerpt"}),
    ("stuff", "separator"): frozenset(),
    ("stuff", "prompt"): frozenset({"context", "excerpt", "question"}),
    ("refine", "system"): frozenset(),
    ("refine", "passage"): frozenset({"text", "number", "source", "excerpt"}),
    ("refine", "question"): frozenset({"context_str", "question"}),
    ("refine", "refine"): frozenset({"context_str", "question", "existing_answer"}),
    ("map_rerank", "system"): frozenset(),
    ("map_rerank", "passage"): frozenset({"text", "number", "source", "excerpt"}),
    ("map_rerank", "prompt"): frozenset({"context", "question"}),
    ("summary", "prompt"): frozenset({"text", "question"}),
    ("follow_up", "prompt"): frozenset({"history", "question"}),
    ("evalset", "prompt"): frozenset({"text"}),
    ("messages", "nothing_found"): frozenset(),
}
_OPTIONAL = {"number", "source", "excerpt"}
_PLAIN = {("messages", "nothing_found"), ("stuff", "separator")}


@dataclass(frozen=True)
class Prompts:
    """What the model is shown and the user is told, in one language."""

    stuff: ChatPromptTemplate
    stuff_passage: PromptTemplate
    stuff_separator: str
    refine_question: ChatPromptTemplate
    refine: ChatPromptTemplate
    refine_passage: PromptTemplate
    map_rerank: ChatPromptTemplate
    map_rerank_passage: PromptTemplate
    summary: ChatPromptTemplate
    follow_up: ChatPromptTemplate
    evalset: ChatPromptTemplate
    nothing_found: str


def load_prompts(language: Language, own: Path | None = None) -> Prompts:
    """The prompts of a language, with those of the user's file in place of ours.

    Raises UsageError when that file cannot be read, has an unknown key or lacks a variable.
    """
    texts = {section: dict(values) for section, values in _shipped(language).items()}
    if own is not None:
        for (section, key), text in _own(own).items():
            texts[section][key] = text
    stuff, refine, map_rerank = texts["stuff"], texts["refine"], texts["map_rerank"]
    return Prompts(
        stuff=_chat(stuff["system"], stuff["prompt"]),
        stuff_passage=PromptTemplate.from_template(stuff["passage"]),
        stuff_separator=stuff["separator"],
        refine_question=_chat(refine["system"], refine["question"]),
        refine=_chat(refine["system"], refine["refine"]),
        refine_passage=PromptTemplate.from_template(refine["passage"]),
        map_rerank=_chat(map_rerank["system"], map_rerank["prompt"]),
        map_rerank_passage=PromptTemplate.from_template(map_rerank["passage"]),
        summary=_chat("", texts["summary"]["prompt"]),
        follow_up=_chat("", texts["follow_up"]["prompt"]),
        evalset=_chat("", texts["evalset"]["prompt"]),
        nothing_found=texts["messages"]["nothing_found"],
    )


@cache
def _shipped(language: Language) -> dict[str, dict[str, str]]:
    return tomllib.loads(files(__package__).joinpath(f"{language}.toml").read_text(encoding="utf-8"))


def _own(path: Path) -> dict[tuple[str, str], str]:
    try:
        sections: dict[str, Any] = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"The prompt file {path} cannot be read: {error}.", "It must be TOML in UTF-8.") from error
    given = {
        (section, key): text
        for section, values in sections.items()
        for key, text in (values.items() if isinstance(values, dict) else [("", values)])
    }
    for name, text in given.items():
        _check(path, name, text)
    return given


def _check(path: Path, name: tuple[str, str], text: Any) -> None:
    """Raises UsageError unless the text fits its place."""
    label = ".".join(part for part in name if part)
    if name not in _VARIABLES:
        known = [".".join(pair) for pair in _VARIABLES]
        message, hint = unknown_name("prompt", label, known)
        raise UsageError(f"{path}: {message}", hint)
    if not isinstance(text, str):
        raise UsageError(f"{path}: {label} is {text!r}.", "It must be a text.")
    if name in _PLAIN:
        return
    try:
        used = set(PromptTemplate.from_template(text).input_variables)
    except ValueError as error:
        raise UsageError(f"{path}: {label} is no template: {error}.", "Write {{ and }} for braces.") from error
    wrong = (used - _VARIABLES[name]) | (_VARIABLES[name] - _OPTIONAL - used)
    if wrong:
        wanted = ", ".join("{" + variable + "}" for variable in sorted(_VARIABLES[name])) or "none"
        found = ", ".join("{" + variable + "}" for variable in sorted(used)) or "none"
        raise UsageError(f"{path}: {label} has the variables {found}.", f"It takes {wanted}.")


def _chat(system: str, prompt: str) -> ChatPromptTemplate:
    """A system message, where there is one, and the user's."""
    messages = [("human", prompt.strip())]
    return ChatPromptTemplate.from_messages([("system", system.strip()), *messages] if system.strip() else messages)
