"""Chat templates: messages in, the text a model was trained on out.

The tokenizer's own Jinja template is used where there is one; named ones serve models that bring none. Messages are
plain dicts: `{"role": "system"|"user"|"assistant"|"tool", "content": str, "tool_calls": [...]}`.

Only the template itself may write control tokens, such as the one that ends a turn. A message that spells one (a document
that says `<|im_end|>`) is shown to the model as the text it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.errors import ModelError, UsageError, unknown_name

if TYPE_CHECKING:
    from calpaca.core.tokenizer import Tokenizer

Message = Mapping[str, Any]

ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_PRIVATE_USE = range(0xE000, 0xF900)
"""Characters without a meaning of their own; one that occurs nowhere marks where a text is cut."""

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
    template on every call (for example `enable_thinking=False`). `control_tokens` are the texts that the tokenizer takes
    for control tokens wherever they stand.
    """

    source: str
    special_tokens: Mapping[str, str]
    stop: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    control_tokens: frozenset[str] = frozenset()

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
        return "".join(self.parts(messages, tools, answer=answer))

    def parts(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, answer: bool = True
    ) -> tuple[str, ...]:
        """The prompt text as `Tokenizer.encode` takes it: cut inside every control token that messages or tools spell.

        One part, unless there is such a text.
        """
        described = messages if self.takes_tools else describe_tools(messages, tools)
        turns = normalise(described, keep_tool_messages=self.takes_tools)
        schemas = [dict(tool) for tool in tools] if self.takes_tools else []
        texts = list(_texts([turns, schemas]))
        beginning = self._control_token
        if beginning is None or not any(beginning.search(text) for text in texts):
            return (self._rendered(turns, schemas, answer),)
        unused = next(
            sign for sign in map(chr, _PRIVATE_USE) if not any(sign in text for text in (self.source, *texts))
        )
        turns, schemas = _with_texts([turns, schemas], lambda text: beginning.sub(rf"\g<0>{unused}", text))
        return tuple(self._rendered(turns, schemas, answer).split(unused))

    @cached_property
    def _control_token(self) -> re.Pattern[str] | None:
        """Finds the first character of every control token, also of those that overlap."""
        rests: dict[str, list[str]] = defaultdict(list)
        for token in sorted(self.control_tokens):
            if len(token) > 1:
                rests[token[0]].append(re.escape(token[1:]))
        alternatives = [f"{re.escape(first)}(?={'|'.join(each)})" for first, each in rests.items()]
        return re.compile("|".join(alternatives)) if alternatives else None

    def _rendered(self, turns: list[dict[str, Any]], schemas: list[dict[str, Any]], answer: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[turns],
                tools=schemas or None,
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


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):  # a union would be made anew at each call
        for each in value:
            yield from _texts(each)
    elif isinstance(value, (dict, Mapping)):  # a dict is known at once, an abstract class asks around
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and dicts with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_with_texts(key, change): _with_texts(each, change) for key, each in value.items()}
    return [_with_texts(each, change) for each in value] if isinstance(value, list | tuple) else value


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


def choose_template(tokenizer: Tokenizer, chosen: NamedTemplate | None = None) -> ChatTemplate:
    """The template that was chosen, else the tokenizer's own; a model without one can still continue text."""
    own = NamedTemplate(tokenizer.chat_template) if tokenizer.chat_template else None
    named = chosen or own
    if named is None:
        return no_template()
    return ChatTemplate(named.source, tokenizer.special_tokens, named.stop, control_tokens=tokenizer.control_tokens)


def find_template(path: Path) -> str | None:
    """The source of the template that a model folder, adapter folder or GGUF file brings; None when it brings none."""
    from calpaca.core.gguf import read_header
    from calpaca.core.tokenizer import stored_template

    if path.is_dir():
        return stored_template(path)
    source = read_header(path).metadata.get("tokenizer.chat_template")
    return str(source) if source is not None else None


def template_name(source: str) -> str | None:
    """The name of a built-in template with this source."""
    return next((name for name, template in NAMED_TEMPLATES.items() if template.source == source), None)


def template_digest(template: str | Path) -> str | None:
    """sha256 of a template's source, or of the one that a folder or GGUF file brings; None when it brings none."""
    source = find_template(template) if isinstance(template, Path) else template
    return hashlib.sha256(source.encode()).hexdigest() if source is not None else None
