"""The fake engine keeps the contract of every engine, and its script."""

import pytest

from calpaca.core.engine import Grammar, Request, Sampling
from calpaca.core.errors import ModelError
from calpaca.testing import EngineContract, FakeEngine, fake_model, fake_runtime


class TestFakeEngine(EngineContract):
    @pytest.fixture
    def engine(self):
        engine = FakeEngine(by="character", delay=0.002)
        yield engine
        engine.close()


def test_answers_come_in_turn_and_over_again():
    model = fake_model(["one", "two"])
    assert [model.generate("?").result().text for _ in range(3)] == ["one", "two", "one"]


def test_answers_may_depend_on_the_prompt():
    model = fake_model(lambda prompt: prompt.upper())
    assert model.generate("why").result().text == "WHY"
    assert model.engine.prompts == ["why"]


def test_an_exception_in_the_script_reaches_the_reader():
    with pytest.raises(ModelError, match="no memory"):
        fake_model([ModelError("no memory")]).generate("?").result()


def test_an_answer_streams_by_word_or_character():
    words = [chunk.text for chunk in fake_model(["a bc 你好"]).generate("?")]
    assert words == ["a", " bc", " 你", "好", ""]
    characters = [chunk.text for chunk in fake_model(["a 你"], by="character").generate("?")]
    assert characters == ["a", " ", "你", ""]


def test_a_script_that_fits_the_grammar_is_kept_and_another_is_replaced():
    grammar = Grammar("json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    engine = FakeEngine(['{"a": 12}', "no json"])
    assert engine.submit(Request("?", grammar=grammar)).result().text == '{"a": 12}'
    assert engine.submit(Request("?", grammar=grammar)).result().text.startswith('{"a"')


def test_max_new_tokens_counts_bytes_and_drops_half_a_character():
    answer = fake_model(["你好"]).generate("?", Sampling(max_new_tokens=4)).result()
    assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == ("你", "length", 4)


def test_a_closed_engine_refuses():
    runtime = fake_runtime(["x"])
    runtime.model().close()
    with pytest.raises(ModelError, match="closed"):
        runtime.model().generate("?")


def test_embeddings_of_like_texts_are_near():
    embedder = fake_runtime().embedder()
    near, far = embedder.embed_documents(["the llama eats grass", "quantum chromodynamics"]) @ embedder.embed_query(
        "llama grass"
    )
    assert near > far
