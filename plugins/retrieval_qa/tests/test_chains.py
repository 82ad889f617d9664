import warnings

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from calpaca_retrieval_qa.chains import RefineChain, StuffChain
from calpaca_retrieval_qa.map_rerank import MapRerankChain

DOCUMENTS = [Document(f"Fact {letter} holds.", metadata={"source": f"{letter}.txt"}) for letter in "ABC"]
STUFF = PromptTemplate.from_template("Read {context} and answer {question}.")
FIRST = PromptTemplate.from_template("Read {context_str} and answer {question}.")
REFINE = PromptTemplate.from_template("You said {existing_answer}. Read {context_str}. Now answer {question}.")
CHAT = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "Read {context} and answer {question}.")])
INPUTS = {"input_documents": DOCUMENTS, "question": "why?"}


class Recorder(FakeListLLM):
    """A language model that remembers its prompts."""

    seen: list[str] = []  # noqa: RUF012  # a pydantic field

    def _call(self, prompt, stop=None, run_manager=None, **kwargs):
        self.seen.append(prompt)
        return super()._call(prompt, stop, run_manager, **kwargs)


class ChatRecorder(FakeListChatModel):
    """A chat model that remembers its messages."""

    seen: list[list] = []  # noqa: RUF012  # a pydantic field

    def _call(self, messages, *args, **kwargs):
        self.seen.append(messages)
        return super()._call(messages, *args, **kwargs)

    def _stream(self, messages, *args, **kwargs):
        self.seen.append(messages)
        yield from super()._stream(messages, *args, **kwargs)


def models(kind, count: int):
    answers = [f"answer {number}" for number in range(1, count + 1)]
    return kind(responses=list(answers), seen=[]), kind(responses=list(answers), seen=[])


@pytest.fixture
def classic():
    """langchain-classic, whose chains are deprecated; its warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("langchain_classic.chains")
        if not hasattr(module, "StuffDocumentsChain"):
            pytest.skip("this langchain-classic has no StuffDocumentsChain any more")
        yield module


@pytest.mark.parametrize("kind", [Recorder, ChatRecorder])
@pytest.mark.parametrize("prompt", [STUFF, CHAT])
def test_stuff_sends_the_prompt_of_the_classic_chain(classic, kind, prompt) -> None:
    ours, theirs = models(kind, 1)
    document_prompt = PromptTemplate.from_template("<{source}> {page_content}")
    options = {"document_variable_name": "context", "document_separator": "\n--\n", "document_prompt": document_prompt}
    chain = classic.StuffDocumentsChain(llm_chain=classic.LLMChain(llm=theirs, prompt=prompt), **options)
    assert StuffChain(ours, prompt, **options).invoke(INPUTS)["output_text"] == chain.invoke(INPUTS)["output_text"]
    assert ours.seen == theirs.seen != []


@pytest.mark.parametrize("kind", [Recorder, ChatRecorder])
def test_refine_sends_the_prompts_of_the_classic_chain(classic, kind) -> None:
    ours, theirs = models(kind, 3)
    options = {
        "document_variable_name": "context_str",
        "initial_response_name": "existing_answer",
        "return_intermediate_steps": True,
    }
    chain = classic.RefineDocumentsChain(
        initial_llm_chain=classic.LLMChain(llm=theirs, prompt=FIRST),
        refine_llm_chain=classic.LLMChain(llm=theirs, prompt=REFINE),
        **options,
    )
    expected = chain.invoke(INPUTS)
    output = RefineChain(ours, FIRST, REFINE, **options).invoke(INPUTS)
    assert output == {name: expected[name] for name in ("output_text", "intermediate_steps")}
    assert len(ours.seen) == 3
    assert ours.seen == theirs.seen


RATED = ["They are grey\nScore: 20", "They are brown\nScore: 90", "No idea\nScore: 0"]


@pytest.mark.parametrize("kind", [Recorder, ChatRecorder])
def test_map_rerank_sends_the_prompts_of_the_classic_chain_and_chooses_the_same_answer(classic, kind) -> None:
    from langchain_classic.output_parsers.regex import RegexParser

    parser = RegexParser(regex=r"(.*?)\nScore: (\d*)", output_keys=["answer", "score"])
    prompt = PromptTemplate(
        template="Read {context} and answer {question}.", input_variables=["context", "question"], output_parser=parser
    )
    ours, theirs = kind(responses=RATED, seen=[]), kind(responses=RATED, seen=[])
    options = {"document_variable_name": "context", "metadata_keys": ["source"], "return_intermediate_steps": True}
    chain = classic.MapRerankDocumentsChain(
        llm_chain=classic.LLMChain(llm=theirs, prompt=prompt), rank_key="score", answer_key="answer", **options
    )
    expected = chain.invoke(INPUTS)
    one_by_one = {"max_concurrency": 1} if kind is ChatRecorder else {}  # threads would record them in any order
    output = MapRerankChain(ours, prompt, **options).invoke(INPUTS, one_by_one)
    assert output == {name: expected[name] for name in ("output_text", "intermediate_steps", "source")}
    assert (output["output_text"], output["source"]) == ("They are brown", "B.txt")
    assert len(ours.seen) == 3
    assert ours.seen == theirs.seen


def test_map_rerank_without_a_way_to_rate_is_an_error() -> None:
    with pytest.raises(ValueError, match="output_parser"):
        MapRerankChain(FakeListLLM(responses=["x"]), STUFF)


def by_length(piece, document) -> dict:
    return {"answer": piece.text, "score": len(piece.text), "of": document.page_content}


def chains(kind=FakeListChatModel):
    answers = ["one", "two", "three"]
    return [
        (StuffChain(kind(responses=answers), STUFF), {"output_text": "one"}),
        (
            RefineChain(kind(responses=answers), FIRST, REFINE, return_intermediate_steps=True),
            {"output_text": "three", "intermediate_steps": answers},
        ),
        (MapRerankChain(kind(responses=["long"] * 3), STUFF, rate=by_length), {"output_text": "long"}),
    ]


@pytest.mark.parametrize("kind", [FakeListChatModel, FakeListLLM])
async def test_every_way_of_running_a_chain_gives_the_same(kind) -> None:
    for chain, expected in chains(kind):
        assert chain.invoke(INPUTS) == expected
    for chain, expected in chains(kind):
        assert await chain.ainvoke(INPUTS) == expected
    for chain, expected in chains(kind):
        parts = list(chain.stream(INPUTS))
        assert (len(parts) > 1) is chain.streams_last_step
        assert sum(parts[1:], parts[0]) == expected
    for chain, expected in chains(kind):
        parts = [part async for part in chain.astream(INPUTS)]
        assert sum(parts[1:], parts[0]) == expected


async def test_the_models_tokens_and_every_step_show_up_in_the_events() -> None:
    chain, _ = chains()[1]
    events = [event async for event in chain.astream_events(INPUTS, version="v2")]
    ends = [event["data"]["output"].content for event in events if event["event"] == "on_chat_model_end"]
    tokens = [event["data"]["chunk"].content for event in events if event["event"] == "on_chat_model_stream"]
    assert ends == ["one", "two", "three"]
    assert "".join(tokens) == "onetwothree"


def test_leaving_a_stream_early_asks_the_model_no_more() -> None:
    model = ChatRecorder(responses=["one", "two", "three"], seen=[])
    stream = RefineChain(model, FIRST, REFINE).stream(INPUTS)
    pieces = RefineChain(model, FIRST, REFINE).pieces(INPUTS)
    next(pieces)
    pieces.close()
    stream.close()
    assert len(model.seen) == 1


def test_no_documents_are_an_error() -> None:
    with pytest.raises(ValueError, match="input_documents is empty"):
        chains()[0][0].invoke({"input_documents": [], "question": "why?"})
