"""Chat templates: messages in, the text a model was trained on out.

The tokenizer's own Jinja template is used where there is one; named ones serve models that bring none. Messages are
plain dicts: `{"role": "system"|"user"|"assistant"|"tool", "content": str, "tool_calls": [...]}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calpaca.core.errors import ModelError, UsageError, unknown_name

Message = Mapping[str, Any]

ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
LLAMA2_ZH_SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"


@dataclass(frozen=True)
class NamedTemplate:
    """A template by name: its Jinja source, and texts that end an answer beside the end-of-sequence token."""

    source: str
    stop: tuple[str, ...] = ()


NAMED_TEMPLATES: Mapping[str, NamedTemplate] = {
    # The spacing that Chinese-LLaMA-Alpaca was trained with: one space after "### Response:", at the end of the prompt
    # too. Earlier answers carry no end-of-sequence token, as in that project's own chat server.
    "alpaca": NamedTemplate(
        "{%- set ns = namespace(system='" + ALPACA_SYSTEM + "') -%}"
        "{%- for m in messages if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endfor -%}"
        "{{- bos_token + ns.system + '\\n\\n' -}}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{{- '### Instruction:\\n' + m.content + '\\n\\n' -}}"
        "{%- elif m.role == 'assistant' -%}{{- '### Response: ' + m.content + '\\n\\n' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '### Response: ' -}}{%- endif -%}",
        stop=("### Instruction:",),
    ),
    # Chinese-LLaMA-Alpaca-2: the system text stands inside the first instruction, each turn begins with bos.
    "llama2-zh": NamedTemplate(
        "{%- set ns = namespace(system='" + LLAMA2_ZH_SYSTEM + "', first=true) -%}"
        "{%- for m in messages if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endfor -%}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}"
        "{{- bos_token + '[INST] ' -}}"
        "{%- if ns.first -%}{{- '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' -}}{%- set ns.first = false -%}{%- endif -%}"
        "{{- m.content + ' [/INST]' -}}"
        "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "chatml": NamedTemplate(
        "{%- for m in messages -%}"
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
        stop=("<|im_end|>",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ChatTemplate:
    """Renders messages for one model.

    `source` is Jinja; `special_tokens` maps `bos_token`, `eos_token` … to their texts. `options` are passed to the
    template on every call (for example `enable_thinking=False`).
    """

    source: str
    special_tokens: Mapping[str, str]
    stop: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_tools(self) -> bool:
        return "tools" in self.source

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, answer: bool = True
    ) -> str:
        """The prompt text, ending where the assistant's answer begins when `answer` is set.

        Messages may stand in any order: runs of one role are merged and system texts are put first, since many
        templates demand that. Raises ModelError when the template cannot render them.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        described = messages if self.takes_tools else describe_tools(messages, tools)
        try:
            rendered, _ = render_jinja_template(
                conversations=[normalise(described, keep_tool_messages=self.takes_tools)],
                tools=[dict(tool) for tool in tools] if tools and self.takes_tools else None,
                chat_template=self.source,
                add_generation_prompt=answer,
                **{**self.special_tokens, **self.options},
            )
        except (TemplateError, TypeError) as error:
            raise ModelError(
                f"The chat template cannot render these messages: {error}.", "Choose another with --chat-template."
            ) from error
        text: str = rendered[0]
        return text


def no_template() -> ChatTemplate:
    """For a model that brings none: rendering says so. The model can still continue text."""
    known = ", ".join(NAMED_TEMPLATES)
    return ChatTemplate(
        "{{ raise_exception('this model brings no chat template; the built-in ones are " + known + "') }}", {}
    )


def named_template(name: str) -> NamedTemplate:
    """A built-in template by name, or a Jinja file by path. Raises UsageError for anything else."""
    if name in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[name]
    path = Path(name).expanduser()
    if path.is_file():
        return NamedTemplate(path.read_text(encoding="utf-8"))
    message, hint = unknown_name("chat template", name, NAMED_TEMPLATES)
    raise UsageError(message, f"{hint} Or name a Jinja file.")


def normalise(messages: Sequence[Message], *, keep_tool_messages: bool) -> list[dict[str, Any]]:
    """Messages in the order that every template accepts: one system text first, then runs of a role merged.

    Tool calls and results become text where the template does not know them.
    """
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn = dict(message) if keep_tool_messages else _as_text(message)
        turn["content"] = turn.get("content") or ""
        if turn["role"] == "system":
            system.append(turn["content"])
        elif turns and turn["role"] == turns[-1]["role"] != "tool":
            turns[-1] = _merged(turns[-1], turn)
        else:
            turns.append(turn)
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return head + turns


def _merged(first: Message, second: Message) -> dict[str, Any]:
    """Two messages of one role as one."""
    merged = {**first, "content": "\n\n".join(filter(None, (first["content"], second["content"])))}
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    return {**merged, "tool_calls": calls} if calls else merged


def _as_text(message: Message) -> dict[str, Any]:
    """A message without tool roles: calls in the form that `tool_call_text` gives, results as a user's message."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = "\n".join(tool_call_text(call["function"]) for call in message.get("tool_calls", ()))
    return {"role": message["role"], "content": f"{content}\n{calls}".strip() if calls else content}


def tool_call_text(function: Mapping[str, Any]) -> str:
    """A tool call as the Hermes and Qwen families write it. Arguments may be an object, or its JSON text."""
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    body = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def describe_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Put tools into a system message, for templates that have no place for them."""
    if not tools:
        return list(messages)
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You may call these functions to help with the request. Their signatures:\n"
        f"<tools>\n{listed}\n</tools>\n"
        'To call one, answer with <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    )
    return [{"role": "system", "content": text}, *messages]
