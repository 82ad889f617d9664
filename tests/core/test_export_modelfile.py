"""Modelfiles: the template in Ollama's language, where calpaca can say it."""

from __future__ import annotations

import re

import pytest

from calpaca.core.export.modelfile import modelfile, recognise
from calpaca.core.template import LLAMA2_ZH_SYSTEM, NAMED_TEMPLATES, ChatTemplate

LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are \"kind\".<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def named(name: str) -> ChatTemplate:
    return ChatTemplate(NAMED_TEMPLATES[name].source, LLAMA, NAMED_TEMPLATES[name].stop)


@pytest.mark.parametrize("name", ["chatml", "llama2-zh", "alpaca"])
def test_built_in_templates_are_recognised(name: str) -> None:
    found = recognise(named(name), add_bos=True)
    assert found is not None
    assert found.name == name


def test_llama_3_is_recognised_and_bos_is_left_to_ollama() -> None:
    template = ChatTemplate(LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    found = recognise(template, add_bos=True)
    assert found is not None
    assert found.name == "llama3"
    assert "begin_of_text" not in found.source
    assert recognise(template, add_bos=False) is None


def test_a_system_text_that_the_template_brings_becomes_the_default() -> None:
    template = ChatTemplate(SMOLLM2, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    text = modelfile("./model-f16.gguf", template, add_bos=False)
    assert text.startswith('FROM ./model-f16.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
    assert 'SYSTEM """You are "kind"."""' in text
    assert text.count('PARAMETER stop "<|im_end|>"') == 1


def test_chinese_llama_2_says_its_system_text_once() -> None:
    text = modelfile("./model-q8_0.gguf", named("llama2-zh"), add_bos=True)
    assert f'SYSTEM "{LLAMA2_ZH_SYSTEM}"' in text
    assert "{{ if .System }}[INST] <<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ else }}<s>[INST] {{ end }}" in text
    assert 'PARAMETER stop "</s>"' in text


def test_any_other_template_is_left_out_with_a_word_why() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", LLAMA)
    text = modelfile("./model-f16.gguf", template, add_bos=True)
    assert 'TEMPLATE "' not in text
    assert "# The chat template is none that calpaca can say in Ollama's language" in text
    assert 'PARAMETER stop "</s>"' in text


def test_a_template_that_refuses_is_not_recognised() -> None:
    assert recognise(ChatTemplate("{{ raise_exception('no') }}", LLAMA), add_bos=True) is None


def test_without_a_template_only_the_weights_are_named() -> None:
    assert modelfile("./m.gguf", None, add_bos=True).splitlines()[0] == "FROM ./m.gguf"
    adapter = modelfile("llama3", None, add_bos=True, adapter="adapter-f32.gguf")
    assert adapter.splitlines()[::2][:2] == ["FROM llama3", "ADAPTER ./adapter-f32.gguf"]


# The file as Ollama reads it -----------------------------------------------------------------------------------------

NAMES = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER"}


def read(text: str) -> list[tuple[str, str]]:
    """Instructions and arguments by the rules of Ollama's parser: comments and blank lines are skipped; an argument goes
    to the end of its line, one that begins with a quotation mark to the first line that closes it. Nothing is escaped."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, _, argument = line.partition(" ")
        assert name in NAMES, line
        if name == "PARAMETER":
            parameter, _, argument = argument.partition(" ")
            name = f"{name} {parameter}"
        while (plain := unquoted(argument.strip(" \t"))) is None:
            argument += "\n" + next(lines)
        found.append((name, plain))
    return found


def unquoted(argument: str) -> str | None:
    """Without its quotation marks; None where the closing ones are still to come."""
    mark = re.match('"""|"|', argument)[0]
    if not mark:
        return argument
    closed = len(argument) >= 2 * len(mark) and argument.endswith(mark)
    return argument[len(mark) : -len(mark)] if closed else None


def with_system(system: str) -> ChatTemplate:
    """A template that brings this system text."""
    escaped = system.replace("\n", "\\n")
    return ChatTemplate(
        SMOLLM2.replace('You are "kind".', escaped), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    )


@pytest.mark.parametrize("name", ["chatml", "llama2-zh", "alpaca"])
def test_ollama_reads_back_what_was_meant(name: str) -> None:
    found = recognise(named(name), add_bos=True)
    assert found is not None
    told = read(modelfile("./model-f16.gguf", named(name), add_bos=True))
    assert told[:2] == [("FROM", "./model-f16.gguf"), ("TEMPLATE", found.source)]
    assert dict(told).get("SYSTEM") == found.system
    stops = [argument for instruction, argument in told if instruction == "PARAMETER stop"]
    assert stops == list(dict.fromkeys((*found.stop, *NAMED_TEMPLATES[name].stop, "</s>")))


@pytest.mark.parametrize(
    "system",
    ["Plain.", 'You are "kind".', 'Ends "so"', '"', "Two\nlines.\n\n# no comment", " spaces ", "你是助手。", 'a""\nb'],
)
def test_any_system_text_is_read_back(system: str) -> None:
    assert dict(read(modelfile("./m.gguf", with_system(system), add_bos=False)))["SYSTEM"] == system


def test_a_system_text_that_the_format_cannot_say_is_not_cut_short() -> None:
    told = read(modelfile("./m.gguf", with_system('Say """ aloud.'), add_bos=False))
    assert {"TEMPLATE", "SYSTEM"}.isdisjoint(dict(told))


def test_ollama_reads_the_file_of_an_adapter() -> None:
    told = read(modelfile("llama3", None, add_bos=True, adapter="adapter-f32.gguf"))
    assert told == [("FROM", "llama3"), ("ADAPTER", "./adapter-f32.gguf")]
