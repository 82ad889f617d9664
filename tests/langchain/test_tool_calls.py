"""Tools and structured output: on a model that babbles, and on scripted answers."""

from typing import Annotated, TypedDict

import jsonschema
import pytest
from langchain_core.messages import AIMessageChunk
from pydantic import BaseModel, Field

from calpaca import ChatCalpaca
from calpaca.core.errors import UsageError
from calpaca.testing import fake_runtime


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def weather(place: str, days: int = 1) -> str:
    """Tell the weather."""
    return place * days


class Leg(BaseModel):
    length: int
    parts: list[str]


class Animal(BaseModel):
    """An animal."""

    name: str
    colour: str | None = Field(None, description="If it is known.")
    legs: list[Leg]


class Point(TypedDict):
    """A point."""

    x: Annotated[int, ..., "to the right"]
    y: Annotated[int, ..., "up"]


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def chat_on(answers=None, **arguments):
    return ChatCalpaca(runtime=fake_runtime(answers, by="character"), **arguments)


def merged(chunks):
    first, *rest = chunks
    return first + rest


# Forced calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["any", "required", True, "add", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_forced_call_is_valid_whatever_the_model(choice, sampling):
    bound = chat_on(**sampling).bind_tools([add, weather], tool_choice=choice)
    for answer in (bound.invoke("Hello"), merged(list(bound.stream("Hello")))):
        (call,) = answer.tool_calls
        assert call["name"] in {"add"} if choice not in ("any", "required", True) else {"add", "weather"}
        assert call["id"].startswith("call_")
        assert set(call["args"]) >= ({"a", "b"} if call["name"] == "add" else {"place"})
        assert answer.content == ""
        assert answer.response_metadata["finish_reason"] == "tool_calls"


def test_tools_are_shown_to_the_model():
    chat = chat_on()
    chat.bind_tools([add], tool_choice="any").invoke("Hello")
    (prompt,) = chat.runtime.model().engine.prompts
    assert '"name": "add"' in prompt and "Add two numbers." in prompt


def test_a_call_cut_by_its_length_is_an_invalid_one():
    answer = chat_on(max_tokens=20).bind_tools([add], tool_choice="any").invoke("Hello")
    assert answer.tool_calls == []
    (invalid,) = answer.invalid_tool_calls
    assert '{"name":"add"' in invalid["args"]
    assert answer.response_metadata["finish_reason"] == "length"


def test_wrong_choices_are_refused():
    for tools, choice, words in (([add], "ad", "Did you mean 'add'"), ([], "any", "no tools")):
        with pytest.raises(UsageError, match=words):
            chat_on().bind_tools(tools, tool_choice=choice)


# Free answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_a_free_answer_may_hold_text_and_calls(way):
    bound = chat_on([f"Let me see: a < b, <tool.{CALL}\n{CALL}\n"]).bind_tools([add, weather])
    answer = bound.invoke("?") if way == "invoke" else merged(list(bound.stream("?")))
    assert answer.content == "Let me see: a < b, <tool."
    assert [call["args"] for call in answer.tool_calls] == [{"a": 1, "b": 2}] * 2
    assert len({call["id"] for call in answer.tool_calls}) == 2


def test_text_streams_before_a_call_and_the_call_comes_whole():
    chunks = list(chat_on([f"Wait. {CALL}"]).bind_tools([add]).stream("?"))
    assert [chunk.content for chunk in chunks[:5]] == list("Wait.")
    (with_call,) = [chunk for chunk in chunks if chunk.tool_call_chunks]
    assert with_call.tool_call_chunks[0]["args"] == '{"a": 1, "b": 2}'
    assert isinstance(chunks[-1], AIMessageChunk) and chunks[-1].chunk_position == "last"


def test_a_call_streams_in_the_v1_format_too():
    bound = chat_on([f"Wait. {CALL}\n{CALL}"], output_version="v1").bind_tools([add])
    for answer in (bound.invoke("?"), merged(list(bound.stream("?")))):
        assert [block["type"] for block in answer.content_blocks] == ["text", "tool_call", "tool_call"]
        assert [call["args"] for call in answer.tool_calls] == [{"a": 1, "b": 2}] * 2


def test_without_a_call_the_answer_is_text():
    answer = chat_on(["It is <b>3</b>.\n"]).bind_tools([add]).invoke("?")
    assert (answer.content, answer.tool_calls) == ("It is <b>3</b>.\n", [])
    assert answer.response_metadata["finish_reason"] == "stop"


def test_a_call_that_fits_no_tool_cannot_be_written():
    answer = chat_on([CALL.replace("add", "subtract")]).bind_tools([add]).invoke("?")
    assert answer.tool_calls == answer.invalid_tool_calls == []


def test_one_call_at_a_time_when_asked_so():
    answer = chat_on([f"{CALL}\n{CALL}"]).bind_tools([add], parallel_tool_calls=False).invoke("?")
    assert len(answer.tool_calls) < 2


def test_tools_are_left_out_when_none_may_be_called():
    chat = chat_on([CALL])
    assert chat.bind_tools([add], tool_choice="none").invoke("?").content == CALL
    assert "tools" not in chat.runtime.model().engine.prompts[0]


def test_a_format_and_tools_go_together():
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": {"n": {"type": "integer"}}}}}
    for script, calls, text in (('{"n": 4}', 0, '{"n": 4}'), (CALL, 1, ""), (f"{CALL}\n{CALL}", 2, "")):
        answer = chat_on([script]).bind_tools([add], response_format=form).invoke("?")
        assert (len(answer.tool_calls), answer.content) == (calls, text)


# Structured output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("schema", [Animal, Point, Animal.model_json_schema()])
def test_structured_output_fits_whatever_the_model(method, schema):
    chain = chat_on(temperature=1.0, seed=5).with_structured_output(schema, method=method)
    value = chain.invoke("A llama, please.")
    if schema is Animal:
        assert isinstance(value, Animal)
    else:
        jsonschema.validate(value, Animal.model_json_schema() if schema is not Point else {"required": ["x", "y"]})
    *_, last = chain.stream("A llama, please.")
    assert last == value


async def test_structured_output_works_asynchronously():
    chain = chat_on().with_structured_output(Point)
    assert set(await chain.ainvoke("?")) == {"x", "y"}


def test_raw_answers_come_along():
    chain = chat_on(['{"x": 1, "y": 2}']).with_structured_output(Point, include_raw=True)
    result = chain.invoke("?")
    assert (result["parsed"], result["parsing_error"]) == ({"x": 1, "y": 2}, None)
    assert result["raw"].content == '{"x": 1, "y": 2}'
    cut = chat_on(max_tokens=5).with_structured_output(Animal, include_raw=True).invoke("?")
    assert cut["parsed"] is None and cut["parsing_error"] is not None


def test_json_mode_needs_no_schema():
    assert chat_on(['{"free": [1]}']).with_structured_output(method="json_mode").invoke("?") == {"free": [1]}


def test_the_schema_is_shown_to_the_model():
    chat = chat_on()
    chat.with_structured_output(Animal).invoke("?")
    assert "If it is known." in chat.runtime.model().engine.prompts[0]


def test_strict_requires_every_property():
    value = chat_on().with_structured_output(Animal, strict=True).invoke("?")
    assert "colour" in value.model_fields_set


def test_unknown_methods_and_formats_are_refused():
    with pytest.raises(UsageError, match="Did you mean 'json_mode'"):
        chat_on().with_structured_output(Animal, method="json_mod")
    with pytest.raises(UsageError, match="needs a schema"):
        chat_on().with_structured_output(None)
    with pytest.raises(UsageError, match="Did you mean 'json_schema'"):
        chat_on().invoke("?", response_format={"type": "json_scheme"})
    with pytest.raises(UsageError, match="no schema"):
        chat_on().invoke("?", response_format={"type": "json_schema"})
