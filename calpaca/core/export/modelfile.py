"""An Ollama Modelfile beside a GGUF file: where the weights are, how messages become a prompt, where an answer ends.

Ollama's templates are Go's, and of the Jinja template in a GGUF file it only recognises a few. So the model's template is
recognised here, by what it makes of a conversation. Format: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calpaca.core.errors import ModelError
from calpaca.core.template import ChatTemplate, Message

MODELFILE = "Modelfile"

_QUOTES = '"""'

_SYSTEM, _USER, _ANSWER, _NEXT = "System text 1.", "User text 2.", "Answer text 3.", "User text 4."
_TALK: tuple[Message, ...] = (
    {"role": "user", "content": _USER},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
)


@dataclass(frozen=True)
class _Family:
    """`render` says what the template makes of a system text (None: without one) and `_TALK`, after the first bos.

    `source` is the same in Go. `.Messages` has every message; older forms are run once for each question and answer.
    """

    name: str
    source: str
    stop: tuple[str, ...]
    render: Callable[[str | None, Mapping[str, str]], str]


def _chatml(system: str | None, _: Mapping[str, str]) -> str:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system is not None else ""
    turns = (f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in _TALK)
    return f"{head}{''.join(turns)}<|im_start|>assistant\n"


def _llama3(system: str | None, _: Mapping[str, str]) -> str:
    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

    head = turn("system", system) if system is not None else ""
    turns = (turn(each["role"], each["content"]) for each in _TALK)
    return f"{head}{''.join(turns)}<|start_header_id|>assistant<|end_header_id|>\n\n"


def _llama2(system: str | None, special: Mapping[str, str]) -> str:
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None else ""
    ends = special.get("eos_token", "") + special.get("bos_token", "")
    return f"[INST] {head}{_USER} [/INST] {_ANSWER}{ends}[INST] {_NEXT} [/INST]"


def _alpaca(system: str | None, _: Mapping[str, str]) -> str:
    head = f"{system}\n\n" if system is not None else ""
    return f"{head}### Instruction:\n{_USER}\n\n### Response: {_ANSWER}\n\n### Instruction:\n{_NEXT}\n\n### Response: "


_FAMILIES = (
    _Family(
        "chatml",
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n",
        ("<|im_start|>", "<|im_end|>"),
        _chatml,
    ),
    _Family(
        "llama3",
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
        '{{ range .Messages }}{{ if ne .Role "system" }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n'
        "{{ .Content }}<|eot_id|>{{ end }}{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _llama3,
    ),
    # The system text stands in the first question only, which is also the one before which Ollama puts bos itself.
    _Family(
        "llama2-zh",
        "{{ if .System }}[INST] <<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ else }}<s>[INST] {{ end }}"
        "{{ .Prompt }} [/INST]{{ if .Response }} {{ .Response }}</s>{{ end }}",
        ("[INST]", "</s>"),
        _llama2,
    ),
    _Family(
        "alpaca",
        "{{ if .System }}{{ .System }}\n\n{{ end }}### Instruction:\n{{ .Prompt }}\n\n### Response: {{ .Response }}\n\n",
        ("### Instruction:", "</s>"),
        _alpaca,
    ),
)


@dataclass(frozen=True)
class OllamaTemplate:
    """`source` is Go's form, `system` the text that the model's template has where the person gives none."""

    name: str
    source: str
    stop: tuple[str, ...]
    system: str | None = None


def recognise(template: ChatTemplate, *, add_bos: bool) -> OllamaTemplate | None:
    """The form that Ollama takes of a chat template; None when it does something else than the known ones.

    `add_bos`: the vocabulary puts bos before a text, so Ollama's template must not.
    """
    bos = template.special_tokens.get("bos_token", "") if add_bos else ""
    try:
        with_system = template.render([{"role": "system", "content": _SYSTEM}, *_TALK]).removeprefix(bos)
        without = template.render(list(_TALK)).removeprefix(bos)
    except ModelError:
        return None
    for family in _FAMILIES:
        if family.render(_SYSTEM, template.special_tokens) != with_system:
            continue
        if family.render(None, template.special_tokens) == without:
            return OllamaTemplate(family.name, family.source, family.stop)
        system = _default_system(with_system, without)
        if system is not None and _QUOTES not in system and family.render(system, template.special_tokens) == without:
            return OllamaTemplate(family.name, family.source, family.stop, system)
    return None


def _default_system(with_system: str, without: str) -> str | None:
    """What stands where the system text would."""
    before, _, after = with_system.partition(_SYSTEM)
    fits = without.startswith(before) and without.endswith(after) and len(without) >= len(before) + len(after)
    return without[len(before) : len(without) - len(after)] if fits else None


def modelfile(weights: str, template: ChatTemplate | None, *, add_bos: bool, adapter: str | None = None) -> str:
    """The file's text. `weights` is the GGUF file beside it, or what Ollama calls the base that `adapter` is put on."""
    lines = [f"FROM {weights}"]
    if adapter is not None:
        lines.append("# FROM must name the base as Ollama has it: a model of its own, or the base's GGUF file.")
        lines.append(f"ADAPTER ./{adapter}")
    if template is None:
        lines.append("# The model brings no chat template: it continues texts.")
        return "\n".join(lines) + "\n"
    found = recognise(template, add_bos=add_bos)
    if found is None:
        lines.append(
            "# The chat template is none that calpaca can say in Ollama's language, and Ollama reads the one in"
        )
        lines.append("# the GGUF file only where it knows it. Write TEMPLATE here, or chat with calpaca or llama.cpp.")
        stop: tuple[str, ...] = template.stop
    else:
        lines.append(f'TEMPLATE """{found.source}"""')
        if found.system is not None:
            lines.append(f"SYSTEM {_quoted(found.system)}")
        stop = (*found.stop, *template.stop)
    ends = (*stop, template.special_tokens.get("eos_token") or "")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys(ends) if text]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """An argument as Ollama reads it: nothing is escaped, so a text must not hold the marks that enclose it."""
    return f"{_QUOTES}{text}{_QUOTES}" if '"' in text or "\n" in text else f'"{text}"'
