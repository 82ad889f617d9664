"""How a source is read under a model's context: the strategy, the chunks, and room for every prompt and answer.

All sizes are tokens of the model's own tokenizer, counted on prompts as its template renders them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calpaca.core.context import ContextPolicy
from calpaca.core.errors import ContextOverflowError, UsageError
from calpaca.core.model import Model
from calpaca_summarize.coverage import PlacedChunk
from calpaca_summarize.partition import Chunk, Partition, Section
from calpaca_summarize.prompts import Prompt, SummaryPrompts
from calpaca_summarize.source import Source
from calpaca_summarize.strategies import Part, Steps, map_reduce, refine, rounds_of_map_reduce, stuff, together

Strategy = Literal["auto", "stuff", "refine", "map_reduce"]

CHUNK_SIZE = 1024
"""Tokens of a chunk where none is asked for, if the context has room: small models lose the thread in longer ones."""

NOTE_TOKENS = 160
"""Longest intermediate summary."""

ASSUMED_CONTEXT = 4096
"""Where a server does not tell its context length."""

MOST_ARITY = 8
_SMALLEST_CHUNK = 16
_SLACK = 8
"""Tokens by which a text may grow where it meets the prompt around it."""

POLICIES: dict[str, ContextPolicy] = {"stuff": "error", "refine": "refine", "map_reduce": "summarise"}


@dataclass(frozen=True)
class Room:
    """What the model's context leaves: for a chunk, for a summary on its way up, for the last one."""

    context: int
    chunk: int
    note: int
    answer: int
    arity: int


@dataclass(frozen=True)
class Plan:
    """What will be sent: `parts` are the texts of `chunks`, `sections` names them by the numbers of their chunks."""

    strategy: str
    room: Room
    chunks: list[PlacedChunk]
    parts: list[Part]
    sections: list[tuple[int, Section, list[Part]]]

    def steps(self, prompts: SummaryPrompts, *, by_section: bool) -> Steps[Prompt, list[str]]:
        """One summary, or one for each section."""
        if not by_section:
            return together([self._whole(prompts)])
        return together([self._section(parts, prompts) for _, _, parts in self.sections])

    def prompts(self, *, by_section: bool) -> int:
        """How often the model will be asked."""
        if by_section:
            return sum(self._section_prompts(len(parts)) for _, _, parts in self.sections)
        if self.strategy == "map_reduce":
            return rounds_of_map_reduce([len(parts) for _, _, parts in self.sections], self.room.arity)
        return 1 if self.strategy == "stuff" else len(self.parts)

    def _whole(self, prompts: SummaryPrompts) -> Steps[Prompt, str]:
        if self.strategy == "stuff":
            return stuff(self.parts, prompts)
        if self.strategy == "refine":
            return refine(self.parts, prompts)
        return map_reduce([parts for _, _, parts in self.sections], prompts, self.room.arity)

    def _section(self, parts: Sequence[Part], prompts: SummaryPrompts) -> Steps[Prompt, str]:
        if len(parts) == 1:
            return stuff(parts, prompts)
        return refine(parts, prompts) if self.strategy == "refine" else map_reduce([parts], prompts, self.room.arity)

    def _section_prompts(self, parts: int) -> int:
        return parts if parts == 1 or self.strategy == "refine" else rounds_of_map_reduce([parts], self.room.arity)


class Planner:
    """Makes plans for one model and its prompts. `answer` and `chunk_size` are what was asked for, `note` is the longest
    intermediate summary of `map_reduce`."""

    def __init__(
        self,
        model: Model,
        prompts: SummaryPrompts,
        *,
        answer: int,
        chunk_size: int | None = None,
        overlap: int = 0,
        note: int = NOTE_TOKENS,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.answer = answer
        self.chunk_size = chunk_size
        self.overlap = overlap
        self.note = note
        self.context = model.context_length or ASSUMED_CONTEXT

    def plan(self, source: Source, strategy: Strategy, *, by_section: bool = False) -> Plan:
        """Raises ContextOverflowError for `stuff` of a text that is too long, UsageError for sizes that do not fit."""
        if by_section:
            return self._cut(source, "refine" if strategy == "refine" else "map_reduce", by_section=True)
        if strategy in ("auto", "stuff"):
            tokens = self.model.count_tokens(self.prompts.whole([each.text for each in source.texts]))
            if tokens + self.answer <= self.context:
                return self._whole(source)
            if strategy == "stuff":
                raise ContextOverflowError(tokens, self.answer, self.context)
        return self._cut(source, "map_reduce" if strategy == "auto" else strategy, by_section=False)

    def _whole(self, source: Source) -> Plan:
        """Every text in one piece."""
        sections = [[Section("", (Chunk(0, len(each.text), 0),))] for each in source.texts]
        return _plan("stuff", self._room("stuff"), source, sections)

    def _cut(self, source: Source, strategy: str, *, by_section: bool) -> Plan:
        """Chunks small enough that every prompt fits as it is rendered, whatever the tokens at their borders become."""
        room = self._room(strategy)
        size = room.chunk
        while True:
            partition = Partition(self._count, size, min(self.overlap, size // 2))
            cut = partition.sections if by_section else partition.branches
            plan = _plan(strategy, room, source, [cut(each.text, each.form) for each in source.texts])
            over = max(self._tokens(strategy, part.text) for part in plan.parts) - self.context
            if over <= 0:
                return plan
            size -= over
            if size < _SMALLEST_CHUNK:
                raise self._too_small()

    def _count(self, text: str) -> int:
        return len(self.model.engine.encode(text)) if self.model.engine.capabilities().token_ids else self._asked(text)

    def _asked(self, text: str) -> int:
        """An engine that gives no ids counts a message."""
        return self.model.count_tokens([{"role": "user", "content": text}])

    def _tokens(self, strategy: str, text: str) -> int:
        """Tokens of the longest prompt that a text can stand in, with its answer."""
        if strategy == "refine":
            return self.model.count_tokens(self.prompts.refine("", text)) + 2 * self.answer + _SLACK
        shown = (self.prompts.part(text), self.prompts.whole([text]))
        return max(map(self.model.count_tokens, shown)) + max(self.answer, self.note if strategy != "stuff" else 0)

    def _room(self, strategy: str) -> Room:
        """Raises UsageError when the context, or the chunk size that was asked for, is too small or too large."""
        most = self.context - self._tokens(strategy, "") - _SLACK
        arity = 0
        if strategy == "map_reduce":
            frame = max(map(self.model.count_tokens, (self.prompts.combine([]), self.prompts.collapse([]))))
            arity = min((self.context - frame - self.answer) // (self.note + _SLACK), MOST_ARITY)
        if strategy != "stuff" and (most < _SMALLEST_CHUNK or (strategy == "map_reduce" and arity < 2)):
            raise self._too_small()
        wanted = self.chunk_size or min(CHUNK_SIZE, most)
        if strategy != "stuff" and not _SMALLEST_CHUNK <= wanted <= most:
            raise UsageError(
                f"The chunk size is {wanted} tokens; the context of {self.context} leaves room for {most} beside the "
                "prompt and its answer.",
                f"Choose --chunk-size between {_SMALLEST_CHUNK} and {most}, or leave it out.",
            )
        return Room(self.context, wanted, self.note, self.answer, arity)

    def _too_small(self) -> UsageError:
        return UsageError(
            f"The context of {self.context} tokens is too small for a summary of {self.answer} tokens.",
            "Ask for a shorter one with --length or --max-new-tokens, or choose another model.",
        )


def _plan(strategy: str, room: Room, source: Source, sections: Sequence[Sequence[Section]]) -> Plan:
    """Number the chunks of all sections of all texts."""
    plan = Plan(strategy, room, [], [], [])
    for text, own in enumerate(sections):
        for section in own:
            placed = [PlacedChunk(text, chunk) for chunk in section.chunks]
            parts = [Part(len(plan.chunks) + number, each.of(source.texts)) for number, each in enumerate(placed)]
            plan.chunks.extend(placed)
            plan.parts.extend(parts)
            plan.sections.append((text, section, parts))
    return plan
