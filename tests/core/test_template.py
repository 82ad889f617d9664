"""Chat templates: the exact texts that models were trained on."""

import pytest

from calpaca.core.errors import ModelError, UsageError
from calpaca.core.template import ChatTemplate, named_template, no_template

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LLAMA2 = "You are a helpful assistant. 你是一个乐于助人的助手。"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}


def template(name, **options):
    named = named_template(name)
    return ChatTemplate(named.source, TOKENS, named.stop, options)


def test_alpaca_is_spaced_as_in_its_training():
    assert template("alpaca").render(TALK[:1]) == f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response: "


def test_alpaca_goes_on_as_its_chat_server_did():
    assert template("alpaca").render(TALK) == (
        f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response: Hello.\n\n### Instruction:\nAnd now?\n\n### Response: "
    )
    assert template("alpaca").stop == ("### Instruction:",)


def test_alpaca_s_sentence_gives_way_to_a_system_message():
    assert template("alpaca").render([TALK[0], {"role": "system", "content": "Be brief."}]) == (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response: "
    )


def test_llama2_zh_is_spaced_as_in_its_training():
    assert template("llama2-zh").render(TALK) == (
        f"<s>[INST] <<SYS>>\n{LLAMA2}\n<</SYS>>\n\nHi [/INST] Hello.</s><s>[INST] And now? [/INST]"
    )


def test_chatml():
    assert template("chatml").render(TALK[:2]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template("chatml").render(TALK[:1], answer=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_quotes_and_braces_in_a_message_stay_what_they_are():
    content = 'it\'s "{{ 7 * 7 }}" {% if %} \\n <b>&'
    for name in ("alpaca", "llama2-zh", "chatml"):
        assert content in template(name).render([{"role": "user", "content": content}])


def test_options_reach_the_template():
    source = "{{ 'thinking' if enable_thinking else 'plain' }}"
    assert ChatTemplate(source, {}, options={"enable_thinking": True}).render(TALK) == "thinking"


def test_a_template_that_demands_alternation_gets_it():
    strict = (
        "{%- for m in messages if m.role != 'system' -%}"
        "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('must alternate') }}{%- endif -%}"
        "{{- m.role[0] -}}{%- endfor -%}"
    )
    system = {"role": "system", "content": "s"}
    messages = [system, TALK[0], TALK[0], system, TALK[1], TALK[1], {"role": "tool", "content": "3"}, TALK[2]]
    assert ChatTemplate(strict, TOKENS).render(messages) == "uau"


def test_tools_are_described_where_the_template_has_no_place_for_them():
    text = template("chatml").render(TALK[:1], [TOOL])
    assert text.startswith("<|im_start|>system\n")
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in text


def test_tools_go_into_their_place_where_there_is_one():
    source = "{% for t in tools %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.role }} {% endfor %}"
    assert ChatTemplate(source, TOKENS).render([*TALK, {"role": "tool", "content": "3"}], [TOOL]) == (
        "add user assistant user tool "
    )


@pytest.mark.parametrize("arguments", [{"a": "é"}, '{"a": "é"}'])
def test_calls_and_results_become_text(arguments):
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    text = template("chatml").render(
        [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call, call]}, {"role": "tool", "content": "3"}]
    )
    written = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
    assert f"assistant\n{written}\n{written}<|im_end|>" in text
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>" in text


def test_rendering_changes_no_message():
    messages = [dict(TALK[0]), {"role": "assistant", "content": "", "tool_calls": [CALL]}, dict(TALK[1])]
    before = [dict(message) for message in messages]
    template("chatml").render(messages, [TOOL])
    assert messages == before


def test_a_file_is_a_template_and_unknown_names_are_refused(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    assert ChatTemplate(named_template(str(tmp_path / "own.jinja")).source, {}).render(TALK) == "Hi!"
    with pytest.raises(UsageError, match="Did you mean 'llama2-zh'"):
        named_template("llama2-cn")


def test_what_a_template_cannot_render_is_a_model_error():
    with pytest.raises(ModelError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(TALK)
    with pytest.raises(ModelError, match=r"brings no chat template.*alpaca"):
        no_template().render(TALK)
