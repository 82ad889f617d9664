"""The ways to come by rows: each makes the prompt of its next request, from lists, seeds, documents or rows made so far.

What a request asks for follows from its number, the run's seed and the rows that were kept before: a run that is
resumed asks the same again, and finds the replies in the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Literal, Protocol

from calpaca.core.instructions import Instruction
from calpaca_crawl.kept import KeptRow, row_id
from calpaca_crawl.prompts import Prompts
from calpaca_crawl.reply import read_records
from calpaca_crawl.reply_form import ReplyForm
from calpaca_crawl.row import Row, read_row
from calpaca_crawl.task import Draft, Record, Refused, Task, plain

MethodName = Literal["topics", "self_instruct", "evolve", "documents", "answers", "dialogues"]

_SEEDS_SHOWN, _KEPT_SHOWN = 4, 2
"""As in Self-Instruct, where it is six and two: small models have no room for more."""


class Method(Protocol):
    """`task` gives the method's request with a number (from 0), or None where it has no more to ask."""

    def task(self, number: int, kept: Sequence[KeptRow]) -> Task | None: ...


@dataclass(frozen=True)
class Passage:
    """A piece of a document: where it comes from, its text and where that begins in the document."""

    source: str
    text: str
    start: int


@dataclass(frozen=True)
class Setup:
    """What all methods share. `records` are asked for in one reply of at most `tokens` tokens.

    `seeds` are rows to begin from, by their ids.
    """

    prompts: Prompts
    records: int
    tokens: int
    turns: int = 3
    seed: int = 0
    seeds: Sequence[KeptRow] = ()
    passages: Sequence[Passage] = ()
    instructions: Sequence[Instruction] = field(default_factory=list)

    def chance(self, name: str, number: int) -> Random:
        return Random(f"{self.seed} {name} {number}")  # noqa: S311  # no secret

    def ask(self, name: str, form: ReplyForm, **values: object) -> str:
        """The prompt `name`, filled in."""
        shown = self.prompts.filled("format", example=form.example)
        words = self.tokens // form.count // 2
        return self.prompts.filled(name, format=shown, length=words, **values)

    def rows_form(self, count: int | None = None) -> ReplyForm:
        fields = ("instruction", "input", "output")
        return ReplyForm("rows", fields, count or self.records, self.tokens, self.prompts.language)


def drawn(entries: Sequence[str], count: int, start: int, chance: Callable[[int], Random]) -> list[str]:
    """`count` entries from place `start` of a deck that is shuffled anew whenever all its entries were drawn."""
    decks: dict[int, list[str]] = {}
    found = []
    for place in range(start, start + count):
        deck, at = divmod(place, len(entries))
        if deck not in decks:
            decks[deck] = chance(deck).sample(list(entries), len(entries))
        found.append(decks[deck][at])
    return found


class Topics:
    """Topics and kinds of tasks, drawn without replacement, as Chinese-LLaMA-Alpaca's crawl_prompt.py draws them."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._topics, self._tasks = setup.prompts.lines("topics"), setup.prompts.lines("tasks")

    def task(self, number: int, kept: Sequence[KeptRow]) -> Task:  # noqa: ARG002
        setup, count = self._setup, self._setup.records
        topics = drawn(self._topics, count, number * count, partial(setup.chance, "topics"))
        tasks = drawn(self._tasks, count, number * count, partial(setup.chance, "tasks"))
        pairs = list(zip(topics, tasks, strict=True))
        assignments = "\n".join(
            setup.prompts.filled("assignment", number=place, topic=topic, task=task)
            for place, (topic, task) in enumerate(pairs, 1)
        )
        form = setup.rows_form()
        prompt = setup.ask("topics", form, count=count, assignments=assignments)

        def read(place: int, record: Record) -> Draft | Refused:
            found = plain(place, record)
            if isinstance(found, Refused) or place >= count:
                return found
            return Draft(found.row, {"topic": pairs[place][0], "task": pairs[place][1]})

        return Task("topics", prompt, form.schema, read)


class SelfInstruct:
    """New tasks after examples, of seeds and of rows made so far (Wang et al. 2023, https://arxiv.org/abs/2212.10560)."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def task(self, number: int, kept: Sequence[KeptRow]) -> Task:
        setup, chance = self._setup, self._setup.chance("self_instruct", number)
        own = chance.sample(list(kept), min(_KEPT_SHOWN, len(kept)))
        wanted = _SEEDS_SHOWN + _KEPT_SHOWN - len(own)
        shown = [*own, *chance.sample(list(setup.seeds), min(wanted, len(setup.seeds)))]
        chance.shuffle(shown)
        form = setup.rows_form()
        prompt = setup.ask(
            "self_instruct", form, count=setup.records, examples="\n".join(_shown(each.row) for each in shown)
        )
        return Task("self_instruct", prompt, form.schema, plain, parents=[each.id for each in shown])


class Evolve:
    """A harder or rarer task made of another one (WizardLM's Evol-Instruct, https://arxiv.org/abs/2304.12244)."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._changes = setup.prompts.lines("changes")

    def task(self, number: int, kept: Sequence[KeptRow]) -> Task:
        setup, chance = self._setup, self._setup.chance("evolve", number)
        parent = chance.choice([*setup.seeds, *kept])
        change = drawn(self._changes, 1, number, partial(setup.chance, "changes"))[0]
        form = setup.rows_form(1)
        prompt = setup.ask("evolve", form, example=_shown(parent.row), change=change)
        return Task("evolve", prompt, form.schema, plain, {"change": change}, [parent.id])


class Documents:
    """Questions on passages of documents. What is quoted must stand there; its place is the row's source."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def task(self, number: int, kept: Sequence[KeptRow]) -> Task | None:  # noqa: ARG002
        setup = self._setup
        if number >= len(setup.passages):
            return None
        passage = setup.passages[number]
        fields = ("question", "quote", "answer")
        form = ReplyForm("rows", fields, setup.records, setup.tokens, setup.prompts.language)
        prompt = setup.ask("documents", form, count=setup.records, passage=passage.text)
        return Task("documents", prompt, form.schema, partial(_read_quoted, passage))


def _read_quoted(passage: Passage, _: int, record: Record) -> Draft | Refused:
    question, answer = record.get("question"), record.get("answer")
    quote = str(record.get("quote") or "").strip().strip("\"“”'…")
    if not question or not answer:
        return Refused("incomplete", record)
    at = passage.text.find(quote) if quote else -1
    if at < 0:
        return Refused("quote_not_found", record)
    start = passage.start + at
    source = {"source": passage.source, "start": start, "end": start + len(quote), "quote": quote}
    return Draft(Row(((str(question).strip(), str(answer).strip()),)), source)


class Answers:
    """Answers to instructions that are given."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def task(self, number: int, kept: Sequence[KeptRow]) -> Task | None:  # noqa: ARG002
        if number >= len(self._setup.instructions):
            return None
        asked = self._setup.instructions[number].asked
        text = asked if isinstance(asked, str) else str(asked[-1]["content"])

        def read(_: int, record: Record) -> Draft:
            return Draft(Row(((text, str(record["output"])),)))

        return Task("answers", text, None, read, {"instruction": number + 1})


class Dialogues:
    """Conversations of several turns about a topic."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._topics = setup.prompts.lines("topics")

    def task(self, number: int, kept: Sequence[KeptRow]) -> Task:  # noqa: ARG002
        setup = self._setup
        topic = drawn(self._topics, 1, number, partial(setup.chance, "dialogues"))[0]
        form = ReplyForm("turns", ("user", "assistant"), setup.turns, setup.tokens, setup.prompts.language)
        prompt = setup.ask("dialogues", form, turns=setup.turns, topic=topic)
        return DialogueTask("dialogues", prompt, form.schema, plain, {"topic": topic})


class DialogueTask(Task):
    """A request whose records are the turns of one row."""

    def drafts(self, reply: str, *, cut: bool) -> list[Draft | Refused]:
        records = read_records(reply)[: -1 if cut else None]  # the turns before the one that was cut are whole
        turns = [(str(each.get("user") or ""), str(each.get("assistant") or "")) for each in records]
        whole = tuple((user.strip(), assistant.strip()) for user, assistant in turns)
        if len(whole) < 2:
            return [Refused("cut" if cut else "no_json", reply)]
        return [Draft(Row(whole))]


METHODS: Mapping[str, Callable[[Setup], Method]] = {
    "topics": Topics,
    "self_instruct": SelfInstruct,
    "evolve": Evolve,
    "documents": Documents,
    "answers": Answers,
    "dialogues": Dialogues,
}


def read_seeds(rows: Sequence[Mapping[str, Any]]) -> list[KeptRow]:
    """Rows to begin from; those without a question are left out."""
    found = [row for row in map(read_row, rows) if row is not None]
    return [KeptRow(row_id(row), row) for row in found]


def _shown(row: Row) -> str:
    instruction, output = row.turns[0]
    return json.dumps({"instruction": instruction, "input": row.input, "output": output}, ensure_ascii=False)
