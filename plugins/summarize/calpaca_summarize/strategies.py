"""How a long text is read: which prompts are sent, in what order, and which of them may be asked at once.

A strategy is a generator. It gives rounds of prompts, is sent their answers, and returns the summary. It knows neither
model nor ledger: the app asks an engine and keeps the answers of its steps, the chains ask any model of LangChain.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

P = TypeVar("P")
Made_co = TypeVar("Made_co", covariant=True)
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Part:
    """A part of the text: its number, and what it says."""

    index: int
    text: str


@dataclass(frozen=True)
class Ask(Generic[P]):
    """A prompt. `parts` are those of the text that it shows; `last`: its answer is a summary, no intermediate one."""

    step: str
    prompt: P
    parts: tuple[Part, ...] = ()
    last: bool = False


Round = list[Ask[P]]
Steps = Generator[Round[P], list[str], Returned]


class Templates(Protocol[Made_co]):
    """What makes prompts of texts."""

    def whole(self, texts: Sequence[str]) -> Made_co: ...

    def part(self, text: str) -> Made_co: ...

    def first(self, text: str) -> Made_co: ...

    def refine(self, summary: str, text: str) -> Made_co: ...

    def collapse(self, summaries: Sequence[str]) -> Made_co: ...

    def combine(self, summaries: Sequence[str]) -> Made_co: ...


def stuff(parts: Sequence[Part], templates: Templates[P]) -> Steps[P, str]:
    """All in one prompt."""
    prompt = templates.whole([part.text for part in parts])
    (summary,) = yield [Ask("summary", prompt, tuple(parts), last=True)]
    return summary


def refine(parts: Sequence[Part], templates: Templates[P]) -> Steps[P, str]:
    """A summary of the first part, made anew with each further one."""
    last = len(parts) - 1
    prompt = templates.first(parts[0].text)
    (summary,) = yield [Ask("refine", prompt, (parts[0],), last=last == 0)]
    for number, part in enumerate(parts[1:], 1):
        prompt = templates.refine(summary, part.text)
        (summary,) = yield [Ask("refine", prompt, (part,), last=number == last)]
    return summary


def map_reduce(branches: Sequence[Sequence[Part]], templates: Templates[P], arity: int) -> Steps[P, str]:
    """Every part alone, then summaries of at most `arity` summaries, up to one.

    Branches (chapters) are summed up by themselves before they meet, and groups are formed by position, not by length:
    a change within one branch changes no prompt of another. With an arity of at least 2 every round has fewer summaries
    than the one before, so it ends.
    """
    answers = yield [Ask("map", templates.part(part.text), (part,)) for branch in branches for part in branch]
    given = iter(answers)
    nodes = [[next(given) for _ in branch] for branch in branches]
    while sum(map(len, nodes)) > arity:
        if all(len(branch) <= 1 for branch in nodes):
            nodes = [[summary for branch in nodes for summary in branch]]
        groups = [[branch[start : start + arity] for start in range(0, len(branch), arity)] for branch in nodes]
        wanted = [group for branch in groups for group in branch if len(group) > 1]
        collapsed = iter((yield [Ask("collapse", templates.collapse(group)) for group in wanted]))
        nodes = [[next(collapsed) if len(group) > 1 else group[0] for group in branch] for branch in groups]
    summaries = [summary for branch in nodes for summary in branch]
    (summary,) = yield [Ask("combine", templates.combine(summaries), last=True)]
    return summary


def rounds_of_map_reduce(branches: Sequence[int], arity: int) -> int:
    """How many prompts `map_reduce` sends for branches of so many parts."""
    sizes, prompts = list(branches), sum(branches) + 1
    while sum(sizes) > arity:
        if all(size <= 1 for size in sizes):
            sizes = [sum(sizes)]
        prompts += sum(size // arity + (size % arity > 1) for size in sizes)
        sizes = [-(-size // arity) for size in sizes]
    return prompts


def together(several: Sequence[Steps[P, Returned]]) -> Steps[P, list[Returned]]:
    """Strategies side by side: their rounds are asked as one."""
    waiting: dict[int, Round[P]] = {}
    returned: dict[int, Returned] = {}

    def advance(number: int, move: Callable[[], Round[P]]) -> None:
        try:
            waiting[number] = move()
        except StopIteration as end:
            returned[number] = end.value

    for number, steps in enumerate(several):
        advance(number, lambda steps=steps: next(steps))  # type: ignore[misc]
    while waiting:
        asked, waiting = waiting, {}
        answers = iter((yield [ask for asks in asked.values() for ask in asks]))
        for number, asks in asked.items():
            own = [next(answers) for _ in asks]
            advance(number, lambda number=number, own=own: several[number].send(own))  # type: ignore[misc]
    return [returned[number] for number in range(len(several))]
