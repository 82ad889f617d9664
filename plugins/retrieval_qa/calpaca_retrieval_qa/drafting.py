"""`--make-evalset`: questions about the user's own documents, drafted by the model, with the place of their answers.

The model is shown one passage at a time and must choose one of its numbers and names as the answer, then ask for it; the
engine's constrained decoding enforces that. A draft is kept only when its answer stands in the passage, word for word, and the question
can be told from others; of the rest the reason is counted and said. Whoever uses the set should read it: a small model
asks small questions.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from calpaca.core.events import Event, Notice, Progress, Result, Token
from calpaca.core.jobs import Job, step_key
from calpaca.core.language import language_of
from calpaca.core.runtime import Runtime
from calpaca.documents.loaders import find_files, load_file
from calpaca_retrieval_qa.evalset import check_writable, write_evalset
from calpaca_retrieval_qa.facts import Statements, facts
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.prompts import load_prompts
from calpaca_retrieval_qa.quotation import FoldedText
from calpaca_retrieval_qa.recorded import RecordedWork

_BATCH = 8
_LONGEST_ANSWER = 80
_LEAST_PASSAGE = 80
"""Characters below which a passage is a heading or a remnant, from which no question comes."""

_SPAN = re.compile(
    r"\d+(?:[.,:]\d+)*(?:\s(?:million|billion|thousand|per cent|percent))?(?:\s(?!(?:the|and|for|with|from|was|were|when|that|who|which|but|are|has|had)\b)[a-z]{3,})?"
    r"|(?:(?<=[a-z,;] )[A-Z][\w'’-]+(?:\s(?:of\s|the\s|and\s)*[A-Z][\w'’-]+)*)"
)
"""What is often asked for: numbers with their unit, and names within a sentence."""
_HAN_SPAN = re.compile(
    "[0-9０-９一二三四五六七八九十百千两]+[\u3400-\u9fff]{1,2}|[《“「][^》”」]{2,20}[》”」]|[A-Za-z][A-Za-z .-]{2,30}[A-Za-z]"
)
_CLAUSE = re.compile("[,;，；。]")
_MOST_SPANS = 12
_ASKS = {"en": r"(Who|What|When|Where|Which|How|Why) [^?\n]{6,150}\?", "zh": "[^？\\n]{4,50}？"}


def schema(text: str) -> dict[str, Any]:
    """What a draft must look like: one of the passage's own numbers or names, then a question.

    A passage without any leaves the answer free. The answer comes first, so that the question follows from it.
    """
    language = language_of(text)
    pattern = _HAN_SPAN if language == "zh" else _SPAN
    spans = list(dict.fromkeys(match.group() for match in pattern.finditer(text)))[:_MOST_SPANS]
    answer = {"enum": spans} if spans else {"type": "string", "minLength": 1, "maxLength": _LONGEST_ANSWER}
    return {
        "type": "object",
        "title": "draft",
        "properties": {"answer": answer, "question": {"type": "string", "pattern": f"^{_ASKS[language]}$"}},
        "required": ["answer", "question"],
        "additionalProperties": False,
    }


@dataclass(frozen=True)
class Passage:
    """A passage that a question is drafted from: `start` is where it begins, in characters of its document or page."""

    text: str
    source: str
    page: int | None
    start: int


@dataclass
class Drafts:
    """What was kept, and why the rest was not."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, passage: Passage, text: str) -> None:
        """Check a draft."""
        try:
            draft = json.loads(text)
            question, answer = str(draft["question"]).strip(), str(draft["answer"]).strip()
        except (ValueError, KeyError, TypeError):
            self.rejected["it is no JSON: the answer ran too long"] += 1
            return
        reason = self._fault(passage.text, question, answer)
        if reason:
            self.rejected[reason] += 1
        else:
            self.kept.append(_row(passage, question, answer))

    def _fault(self, text: str, question: str, answer: str) -> str:
        """What is wrong with a draft; empty where nothing is."""
        folded = FoldedText(text)
        faults = {
            "the answer does not stand in the text": folded.find(answer) is None,
            "the question does not end with a question mark": not question.endswith(("?", "？")),
            "the question holds the answer": FoldedText(question).find(answer) is not None,
            "the question copies the text": any(
                _is_long(clause) and folded.find(clause) for clause in _CLAUSE.split(question.rstrip("?？"))
            ),
            "the question has no word of the text": not Statements(text).held(facts(question)),
            "the question was drafted before": FoldedText(question).folded in self._asked(),
        }
        return next((reason for reason, found in faults.items() if found), "")

    def _asked(self) -> set[str]:
        return {FoldedText(row["question"]).folded for row in self.kept}


def _row(passage: Passage, question: str, answer: str) -> dict[str, Any]:
    """The line of the set."""
    place = FoldedText(passage.text).find(answer)
    assert place is not None
    start, end = (passage.start + offset for offset in place)
    page = {"page": passage.page} if passage.page is not None else {}
    words = passage.text[slice(*place)]
    return {"question": question, "answers": [words], "source": passage.source, **page, "start": start, "end": end}


class Drafting:
    """Drafts questions from passages that lie evenly over the documents."""

    def __init__(self, options: RetrievalQAOptions, runtime: Runtime) -> None:
        from calpaca.core.langchain import ChatCalpaca

        assert options.make_evalset is not None
        self.target = options.make_evalset.expanduser().absolute()
        self.options = options
        self.runtime = runtime
        self.index = options.index(runtime, options.embedding)
        self.model = runtime.model(options.spec())
        self.llm: BaseChatModel = ChatCalpaca.from_model(self.model, options.sampling(runtime.settings))

    def work(self, job: Job) -> Iterator[Event]:
        """Write the set, and say what became of the other drafts."""
        passages = evenly(list(self._passages()), self.options.drafts)
        job.expect(len(passages))
        replies: dict[int, str] = {}
        for position, value in job.steps(
            "draft", [self._key(each) for each in passages], self._draft(passages), _BATCH
        ):
            replies[position] = value.decode()
            yield Progress(job.done, job.total, "passages", "Drafting")
        drafts = Drafts()
        for position, passage in enumerate(passages):
            drafts.add(passage, replies[position])
        write_evalset(self.target, drafts.kept)
        for reason, count in drafts.rejected.most_common():
            yield Notice(f"Rejected: {count} of {len(passages)} drafts, since {reason}.")
        yield Token(f"{len(drafts.kept)} questions in {self.target}")
        counts = {"questions": len(drafts.kept), "drafted": len(passages), "rejected": dict(drafts.rejected)}
        yield Result({"file": str(self.target), **counts, "job": job.id})

    def _passages(self) -> Iterator[Passage]:
        found = find_files(self.index.paths, self.index.loaders)
        for path in found:
            for chunk in self.index.splitter.split_documents(load_file(path, self.index.loaders)):
                if len(chunk.page_content) >= _LEAST_PASSAGE or language_of(chunk.page_content) == "zh":
                    page = chunk.metadata.get("page")
                    yield Passage(chunk.page_content, str(path), page, int(chunk.metadata["start"]))

    def _prompt(self, passage: Passage) -> list[BaseMessage]:
        prompts = load_prompts(language_of(passage.text), self.options.prompt_file)
        return prompts.evalset.invoke({"text": passage.text}).to_messages()

    def _key(self, passage: Passage) -> str:
        prompt = [message.text for message in self._prompt(passage)]
        sampling = self.options.sampling(self.runtime.settings)
        asked = schema(passage.text)
        return step_key("draft", model=self.model.fingerprint, prompt=prompt, schema=asked, sampling=repr(sampling))

    def _draft(self, passages: Sequence[Passage]) -> Callable[[list[int]], Mapping[int, bytes]]:
        def draft(passage: Passage) -> bytes:
            asked = {"type": "json_schema", "json_schema": {"name": "draft", "schema": schema(passage.text)}}
            return str(self.llm.invoke(self._prompt(passage), response_format=asked).text).encode()

        def work(positions: list[int]) -> Mapping[int, bytes]:
            with ThreadPoolExecutor(_BATCH) as threads:  # each has a grammar of its own; the engine batches them
                replies = threads.map(draft, (passages[each] for each in positions))
                return dict(zip(positions, replies, strict=True))

        return work


def _is_long(clause: str) -> bool:
    """Whether a clause is more than a name or a term: seven words, or ten Chinese characters."""
    return len(clause.split()) >= 7 or (language_of(clause) == "zh" and len(FoldedText(clause).folded) >= 10)


def evenly(passages: Sequence[Passage], count: int) -> list[Passage]:
    """At most `count` of them, at equal distances."""
    if len(passages) <= count:
        return list(passages)
    return [passages[position * len(passages) // count] for position in range(count)]


def build_drafting(options: RetrievalQAOptions, runtime: Runtime) -> RecordedWork:
    """The job of `--make-evalset`. Raises UsageError when the file is there already."""
    assert options.make_evalset is not None
    check_writable(options.make_evalset)
    drafting = Drafting(options, runtime)
    return RecordedWork(runtime, f"Draft questions into {options.make_evalset}", options.parameters(), drafting.work)
