"""The chains send what the classic ones send, to any model of LangChain."""

from __future__ import annotations

import warnings

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from calpaca import ChatCalpaca
from calpaca.core.errors import UsageError
from calpaca.testing import fake_runtime
from calpaca_summarize.chains import load_summarize_chain

DOCUMENTS = [Document(f"Chapter {number} tells of {animal}s.", metadata={"page": number}) for number, animal in
             enumerate(["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"])]  # fmt: skip
SUM_UP = PromptTemplate.from_template("Sum up for {reader}: {text}")
COMBINE = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "Combine for {reader}: {text}")])
COLLAPSE = PromptTemplate.from_template("Collapse for {reader}: {text}")
REFINE = PromptTemplate.from_template("Known: {existing_answer}. New for {reader}: {text}")
INPUTS = {"input_documents": DOCUMENTS, "reader": "a child"}
PROMPTS = {
    "stuff": {"prompt": SUM_UP},
    "refine": {"question_prompt": SUM_UP, "refine_prompt": REFINE, "return_intermediate_steps": True},
    "map_reduce": {"map_prompt": SUM_UP, "combine_prompt": COMBINE, "return_intermediate_steps": True},
}


class Words:
    """Counts words, and remembers what it was asked."""

    seen: list = []  # noqa: RUF012  # a pydantic field

    def get_num_tokens(self, text: str) -> int:
        return len(text.split())


class Recorder(Words, FakeListLLM):
    def _call(self, prompt, stop=None, run_manager=None, **kwargs):
        self.seen.append(prompt)
        return super()._call(prompt, stop, run_manager, **kwargs)


class ChatRecorder(Words, FakeListChatModel):
    def _call(self, messages, *args, **kwargs):
        self.seen.append(messages)
        return super()._call(messages, *args, **kwargs)


def models(kind):
    answers = [f"answer {number} in five words" for number in range(1, 40)]
    return kind(responses=list(answers), seen=[]), kind(responses=list(answers), seen=[])


@pytest.fixture
def classic():
    """langchain-classic's function; the chains that it builds are deprecated, and their warnings not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("langchain_classic.chains.summarize")
        yield module.load_summarize_chain


@pytest.mark.parametrize("kind", [Recorder, ChatRecorder])
@pytest.mark.parametrize(
    ("chain_type", "more"),
    [
        ("stuff", {}),
        ("refine", {}),
        ("map_reduce", {}),
        ("map_reduce", {"token_max": 30}),
        ("map_reduce", {"token_max": 22, "collapse_prompt": COLLAPSE}),
    ],
)
def test_the_prompts_are_those_of_the_classic_chain_in_their_order(classic, kind, chain_type, more) -> None:
    ours, theirs = models(kind)
    options = {**PROMPTS[chain_type], **more}
    one_by_one = {"max_concurrency": 1} if kind is ChatRecorder else {}  # threads would record them in any order
    expected = classic(theirs, chain_type, **options).invoke(INPUTS)
    output = load_summarize_chain(ours, chain_type, **options).invoke(INPUTS, one_by_one)
    assert ours.seen == theirs.seen
    assert len(ours.seen) == {"stuff": 1, "refine": 8}.get(chain_type, len(ours.seen))
    assert output == {name: expected[name] for name in output}
    assert set(output) == set(expected) - set(INPUTS)


def test_a_low_limit_makes_several_rounds(classic) -> None:
    ours, _ = models(Recorder)
    load_summarize_chain(ours, "map_reduce", **PROMPTS["map_reduce"], token_max=22).invoke(INPUTS)
    assert len(ours.seen) > 8 + 4 + 2


def test_summaries_that_do_not_become_shorter_end_in_an_error_and_not_never() -> None:
    chain = load_summarize_chain(Recorder(responses=["word " * 50], seen=[]), "map_reduce", token_max=20)
    with pytest.raises(UsageError, match="token_max is 20"):
        chain.invoke({"input_documents": DOCUMENTS})
    grows = Recorder(responses=["a b c", *["a b c d e f g"] * 40], seen=[])
    with pytest.raises(UsageError, match="do not become short enough"):
        load_summarize_chain(grows, "map_reduce", map_prompt=COLLAPSE, combine_prompt=COLLAPSE, token_max=11).invoke(
            INPUTS
        )


def test_our_own_prompts_stand_where_none_are_given() -> None:
    ours = Recorder(responses=["one", "two"], seen=[])
    load_summarize_chain(ours, "refine").invoke({"input_documents": DOCUMENTS[:2]})
    assert "Beginning of a longer text:\nChapter 0 tells of ants." in ours.seen[0]
    assert "Summary so far:\none\n\nThe text goes on:\nChapter 1 tells of bees." in ours.seen[1]


def test_the_prompts_of_a_round_reach_the_engine_at_once() -> None:
    runtime = fake_runtime(["short"], delay=0.05)
    chain = load_summarize_chain(ChatCalpaca(runtime=runtime), "map_reduce")
    assert chain.invoke({"input_documents": DOCUMENTS})["output_text"] == "short"
    assert runtime.model().engine.peak == 8


def test_an_unknown_type_and_no_documents_are_said() -> None:
    with pytest.raises(UsageError, match="Unknown chain type 'map_rduce'"):
        load_summarize_chain(FakeListLLM(responses=["x"]), "map_rduce")
    with pytest.raises(ValueError, match="nothing to sum up"):
        load_summarize_chain(FakeListLLM(responses=["x"])).invoke({"input_documents": []})
