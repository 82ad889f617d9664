"""Reading rows: all kinds of files and forms, and each fault with its file and line."""

from __future__ import annotations

import json

import pytest

from calpaca_trainer.conversation import Conversation, read_conversation, read_text
from calpaca_trainer.errors import DataError
from calpaca_trainer.rows import Fault, Row, find_files, read_rows

ALPACA = {"instruction": "Name a camelid.", "input": "", "output": "The llama."}


def roles(conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def row(values) -> Row:
    from pathlib import Path

    return Row(Path("rows.jsonl"), 7, values)


@pytest.mark.parametrize(
    "values",
    [
        ALPACA,
        {"messages": [{"role": "user", "content": "Name a camelid."}, {"role": "assistant", "content": "The llama."}]},
        {"conversations": [{"from": "human", "value": "Name a camelid."}, {"from": "gpt", "value": "The llama."}]},
        {"prompt": "Name a camelid.", "completion": "The llama."},
        {
            "prompt": [{"role": "user", "content": "Name a camelid."}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "The llama."}]}],
        },
    ],
    ids=["alpaca", "messages", "sharegpt", "prompt", "prompt-messages"],
)
def test_every_form_gives_the_same_conversation(values) -> None:
    assert roles(read_conversation(row(values))) == [("user", "Name a camelid."), ("assistant", "The llama.")]


def test_an_alpaca_row_may_have_input_system_and_history() -> None:
    values = {**ALPACA, "input": "A big one.", "system": "Be brief.", "history": [["Hi.", "Hello."]]}
    assert roles(read_conversation(row(values))) == [
        ("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Name a camelid.\nA big one."),
        ("assistant", "The llama."),
    ]  # fmt: skip


def test_sharegpt_s_calls_and_tools_become_those_of_openai() -> None:
    said = [("human", "Weather?"), ("function_call", '{"name": "w", "arguments": {"at": "Lima"}}'),
            ("observation", "Fog."), ("gpt", "It is foggy.")]  # fmt: skip
    values = {
        "conversations": [{"from": who, "value": what} for who, what in said],
        "tools": '[{"name": "w", "parameters": {}}]',
    }
    conversation = read_conversation(row(values))
    assert isinstance(conversation, Conversation)
    assert conversation.tools == ({"type": "function", "function": {"name": "w", "parameters": {}}},)
    assert conversation.messages[1]["tool_calls"][0]["function"]["name"] == "w"
    assert conversation.messages[2]["role"] == "tool"


def test_turns_after_the_last_answer_are_left_out() -> None:
    messages = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "?"},
    ]
    assert roles(read_conversation(row({"messages": messages}))) == [("user", "Hi."), ("assistant", "Hello.")]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"question": "Hi", "answer": "Ho"}, "its columns (question, answer) are those of no known form"),
        ({**ALPACA, "output": ""}, "output: String should have at least 1 character"),
        ({**ALPACA, "output": 3}, "output: Input should be a valid string"),
        ({**ALPACA, "output": " \n"}, "an answer is empty"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no assistant answers in it"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "it begins with an answer"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role: Input should be"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{"}]}, "Expecting"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "a message holds something else than text",
        ),
    ],
)
def test_a_bad_row_says_what_is_wrong_and_where(values, reason) -> None:
    fault = read_conversation(row(values))
    assert isinstance(fault, Fault)
    assert reason in fault.reason
    assert str(fault).startswith("rows.jsonl:7: ")


def test_a_text_needs_its_column() -> None:
    assert read_text(row({"text": "Llamas."})) == "Llamas."
    assert "no column 'text'" in str(read_text(row({"body": "Llamas."})))
    assert "empty" in str(read_text(row({"text": " "})))


def test_a_list_in_json_knows_the_line_of_every_row(tmp_path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ALPACA, {**ALPACA, "output": "A\nB"}, 3], indent=2), encoding="utf-8")
    assert [each.line for each in read_rows(file)] == [2, 7, 12]


def test_a_truncated_list_keeps_what_came_before(tmp_path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ALPACA, ALPACA], indent=1)[:-12], encoding="utf-8")
    first, fault = read_rows(file)
    assert isinstance(first, Row)
    assert isinstance(fault, Fault)
    assert "no valid JSON from here on" in fault.reason


def test_a_broken_line_does_not_stop_the_others(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(ALPACA)}\n{{oops\n\n[1]\n{json.dumps(ALPACA)}\n", encoding="utf-8")
    found = list(read_rows(file))
    assert [each.line for each in found if isinstance(each, Fault)] == [2, 4]
    assert [each.line for each in found if isinstance(each, Row)] == [1, 5]


def test_csv_counts_the_lines_of_a_value_with_line_breaks(tmp_path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('instruction,output\n"Two\nlines","A"\nOne,B\nToo,many,values\n', encoding="utf-8")
    first, second, fault = read_rows(file)
    assert (first.line, second.line, fault.line) == (2, 4, 5)
    assert first.values == {"instruction": "Two\nlines", "output": "A"}


def test_parquet_is_read_row_by_row(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ALPACA, ALPACA]), file)
    assert [(each.line, dict(each.values)) for each in read_rows(file)] == [(1, ALPACA), (2, ALPACA)]


def test_text_is_one_document_or_its_lines(tmp_path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("One.\n\nTwo.\n", encoding="utf-8")
    assert [each.values["text"] for each in read_rows(file)] == ["One.\n\nTwo.\n"]
    assert [(each.line, each.values["text"]) for each in read_rows(file, "line")] == [(1, "One."), (3, "Two.")]


def test_a_folder_is_read_whole_and_in_order(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "sub/a.json", "notes.md"):
        (tmp_path / name).write_text(json.dumps(ALPACA), encoding="utf-8")
    assert [file.name for file in find_files(tmp_path)] == ["b.jsonl", "a.json"]
    with pytest.raises(DataError, match="does not exist"):
        find_files(tmp_path / "nothing")


def test_a_file_that_is_no_text_is_named(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
        list(read_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="of no kind"):
        list(read_rows(tmp_path / "rows.xml"))
