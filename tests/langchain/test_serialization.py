"""Our LangChain objects as JSON and back."""

import json

import pytest
from langchain_core.load import dumpd, load
from langchain_core.prompts import ChatPromptTemplate

from calpaca import CalpacaEmbeddings, CalpacaLLM, ChatCalpaca, ModelSpec
from calpaca.core.engine import Grammar
from calpaca.core.spec import AdapterSpec

MODEL = "smollm2-135m-instruct"
OURS = [CalpacaEmbeddings, CalpacaLLM, ChatCalpaca]

pytestmark = pytest.mark.filterwarnings("ignore:The function `load` is in beta")


def revived(thing, **arguments):
    """Through JSON text, as a file would hold it."""
    return load(json.loads(json.dumps(dumpd(thing))), allowed_objects=OURS, valid_namespaces=["calpaca"], **arguments)


@pytest.fixture
def spec(tmp_path):
    """A model with everything that can be said about it."""
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    return ModelSpec(
        model=MODEL,
        adapters=(AdapterSpec(source="first"), AdapterSpec(source="second", scale=0.5)),
        tokenizer=str(tmp_path),
        chat_template=str(tmp_path / "template.jinja"),
        engine="transformers",
        dtype="float32",
        revision="main",
    )


@pytest.mark.parametrize("kind", [ChatCalpaca, CalpacaLLM])
def test_an_equal_object_comes_back(kind, spec):
    llm = kind(
        model=spec, temperature=0.5, max_tokens=7, top_k=3, seed=0, stop=["END"], logprobs=True, timeout=9.0, max_retries=2
    )  # fmt: skip
    again = revived(llm)
    assert again == llm
    assert type(again) is kind
    assert again.spec == spec


def test_a_model_or_a_loaded_one_is_written_by_its_name(smollm2):
    llm = ChatCalpaca(model=str(smollm2), max_tokens=1)
    llm.invoke("?")
    text = json.dumps(dumpd(llm))
    assert dumpd(llm)["id"] == ["calpaca", "ChatCalpaca"]
    assert len(text) < 500
    assert "not_implemented" not in text
    assert revived(llm) == llm


def test_the_grammar_of_a_plain_model_is_kept():
    grammar = Grammar("json_schema", {"type": "object"})
    assert revived(CalpacaLLM(model=MODEL, grammar=grammar)).grammar == grammar


def test_a_model_that_must_not_stream_stays_so():
    assert "streaming" in revived(ChatCalpaca(model=MODEL, streaming=False)).model_fields_set
    assert "streaming" not in revived(ChatCalpaca(model=MODEL)).model_fields_set


@pytest.mark.parametrize("kind", [ChatCalpaca, CalpacaLLM])
def test_the_key_is_never_written(kind, monkeypatch):
    llm = kind(model=MODEL, api_key="very-secret")
    assert "very-secret" not in json.dumps(dumpd(llm))
    assert dumpd(llm)["kwargs"]["api_key"] == {"lc": 1, "type": "secret", "id": ["CALPACA_API_KEY"]}
    assert revived(llm, secrets_from_env=False).api_key is None
    assert revived(llm, secrets_map={"CALPACA_API_KEY": "very-secret"}) == llm
    monkeypatch.setenv("CALPACA_API_KEY", "from-the-environment")
    assert revived(llm, secrets_from_env=True).api_key.get_secret_value() == "from-the-environment"


def test_what_is_not_on_the_list_is_not_loaded():
    with pytest.raises(ValueError, match="not allowed"):
        load(dumpd(CalpacaLLM(model=MODEL)), allowed_objects=[ChatCalpaca], valid_namespaces=["calpaca"])


def test_a_chain_is_written_whole():
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | ChatCalpaca(model=MODEL, seed=3).bind(
        stop=["."]
    )
    written = json.dumps(dumpd(chain))
    assert "not_implemented" not in written
    allowed = [*OURS, *{type(step) for step in (chain, *chain.steps)}]
    names = ["langchain_core", "langchain", "calpaca"]
    again = load(json.loads(written), allowed_objects=[*allowed, *_prompt_parts()], valid_namespaces=names)
    assert again.last.bound == chain.last.bound
    assert again.last.kwargs == {"stop": ["."]}


def _prompt_parts():
    from langchain_core.prompts import HumanMessagePromptTemplate, PromptTemplate

    return [HumanMessagePromptTemplate, PromptTemplate]


def test_embeddings_come_back_too():
    embeddings = CalpacaEmbeddings(model="multilingual-e5-small")
    assert revived(embeddings) == embeddings
    assert dumpd(embeddings)["kwargs"] == {"model": "multilingual-e5-small"}


def test_a_subclass_is_written_where_it_is_defined():
    class OwnChat(ChatCalpaca):
        """A user's."""

    assert OwnChat.lc_id() == [*__name__.split("."), "OwnChat"]
