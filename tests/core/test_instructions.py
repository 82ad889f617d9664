"""Reading what a model is asked in bulk."""

import json

import pytest

from calpaca.core.errors import UsageError
from calpaca.core.instructions import read_instructions


def asked(text: str, name: str = "tasks.jsonl", template: str | None = None) -> list:
    return [instruction.asked for instruction in read_instructions(text, name, template)]


def test_each_line_with_text_is_an_instruction():
    assert asked("Say hello.\r\n\n  为什么要减少污染？  \n", "tasks.txt") == ["Say hello.", "为什么要减少污染？"]


def test_rows_are_read_as_the_formats_of_instruction_data_name_them():
    rows = [
        {"prompt": "A"},
        {"instruction": "B", "input": "", "output": "gold"},
        {"instruction": "Translate.", "input": "猫"},
        {"question": "C"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "D"}]},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert asked(lines) == ["A", "B", "Translate.\n猫", "C", tuple(rows[4]["messages"])]
    assert asked(json.dumps(rows), "tasks.json") == asked(lines)


def test_the_row_is_kept_as_it_was_read():
    (instruction,) = read_instructions('{"id": 7, "prompt": "A"}', "tasks.jsonl")
    assert instruction.row == {"id": 7, "prompt": "A"}


def test_a_template_is_filled_with_the_fields_of_a_row_and_a_line_is_its_instruction():
    assert asked('{"text": "{x}", "to": "French"}', template="Into {to}: {text} {{as is}}") == [
        "Into French: {x} {as is}"
    ]
    assert asked("cat\ndog", "words.txt", "What is a {instruction}?") == ["What is a cat?", "What is a dog?"]


@pytest.mark.parametrize("template", ["{text.__class__}", "{text[0]}", "{text!r}", "{text:>9}", "{text", "{}"])
def test_a_template_takes_plain_names_alone(template: str):
    with pytest.raises(UsageError):
        asked('{"text": "secret"}', template=template)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "A"}\n{"prompt": ', r"tasks\.jsonl:2 is not valid JSON"),
        ('{"prompt": "A"}\n[1]', r"tasks\.jsonl:2: the row is no JSON object but \[1\]"),
        ('{"text": "A"}\n' * 5, r"tasks\.jsonl:1: .*its fields: text\. .*tasks\.jsonl:3.* So are 2 others"),
        ('{"messages": [{"role": "user"}]}', r"tasks\.jsonl:1: its messages are no list"),
        ("\n\n", r"tasks\.jsonl holds no instruction"),
        ("[" * 100_000, r"tasks\.jsonl is not valid JSON"),
    ],
)
def test_bad_rows_are_named_by_line_before_anything_is_asked(text: str, said: str):
    with pytest.raises(UsageError, match=said):
        asked(text)
