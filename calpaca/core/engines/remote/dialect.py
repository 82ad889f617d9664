"""What kinds of servers understand beyond OpenAI's API, and a request in the fields that they know.

A server ignores a field that it does not know, so each kind is sent only what it honours; the rest is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calpaca.core.engine import Grammar, Request, Sampling
from calpaca.core.engines.remote.estimate import plain_messages
from calpaca.core.errors import UnsupportedError, UsageError

_JSON_ONLY = frozenset({"json_schema"})
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as models were trained on it; a small one loses itself in more. Only llguidance reads it."""
_EXTRAS = frozenset({"top_k", "repetition_penalty", "min_p", "frequency_penalty", "presence_penalty", "logit_bias"})
_PENALTIES = {"frequency_penalty": "frequency_penalty", "presence_penalty": "presence_penalty"}
"""Part of OpenAI's own API. llama.cpp, and so Ollama, has the names too, but counts the prompt."""


@dataclass(frozen=True)
class Dialect:
    """One kind of server.

    `owners` are what its list of models names as their owner. `names` maps fields of `Sampling` to its own; `fixed` is
    sent with every request, and switches off what the server would otherwise do unasked. `most_stops` None: any number.
    `tokenizes`: it turns text into token ids and back, and takes ids as a prompt. `regex`: it knows `structured_outputs`.
    `schema_field` is what a JSON schema is called in a completion, None: as in a chat. `stops_here`: stop texts are
    looked for on this side, because the server loses text over them. `biases`: it knows `logit_bias`. `scores`: it gives
    log probabilities of a prompt's tokens, before an answer that begins with the prompt (`echo`).
    """

    name: str
    owners: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    max_logprobs: int = 20
    most_stops: int | None = None
    names_stops: bool = False
    stops_here: bool = False
    tokenizes: bool = False
    regex: bool = False
    schema_field: str | None = None
    biases: bool = False
    scores: bool = False

    @property
    def unsupported(self) -> frozenset[str]:
        """Fields of `Sampling` that it does not know."""
        return frozenset(_EXTRAS - self.names.keys() - ({"logit_bias"} if self.biases else set()))

    @property
    def grammars(self) -> frozenset[str]:
        return _JSON_ONLY | {"regex"} if self.regex else _JSON_ONLY


_VLLM = Dialect(
    "vllm",
    frozenset({"vllm"}),
    names={"top_k": "top_k", "repetition_penalty": "repetition_penalty", "min_p": "min_p", **_PENALTIES},
    fixed={"return_token_ids": True},
    biases=True,
    names_stops=True,
    tokenizes=True,
    regex=True,
    scores=True,
)

DIALECTS: Mapping[str, Dialect] = {
    "openai": Dialect("openai", frozenset({"openai", "system"}), names=_PENALTIES, most_stops=4, biases=True),
    "vllm": _VLLM,
    "calpaca": Dialect(**{**vars(_VLLM), "name": "calpaca", "owners": frozenset({"calpaca"}), "most_stops": 4}),
    "llama_cpp": Dialect(
        "llama_cpp",
        frozenset({"llamacpp"}),
        names={"top_k": "top_k", "repetition_penalty": "repeat_penalty", "min_p": "min_p"},
        biases=True,
        fixed={"repeat_last_n": 1 << 16},  # else it looks back 64 tokens
        # It drops what it held back for a stop text when the answer ends for another reason.
        names_stops=True,
        stops_here=True,
        tokenizes=True,
        schema_field="json_schema",
    ),
    "ollama": Dialect("ollama", frozenset({"library"}), max_logprobs=0),
}


def find_dialect(server: str, owner: str | None) -> Dialect:
    """The dialect that the settings name; `auto` goes by the owner that the server gives for its models."""
    if server != "auto":
        return DIALECTS[server]
    found = (dialect for dialect in DIALECTS.values() if owner is not None and owner.lower() in dialect.owners)
    return next(found, DIALECTS["openai"])


def write_request(
    request: Request, model: str, dialect: Dialect, max_new_tokens: int | None
) -> tuple[str, dict[str, Any]]:
    """The path below the address, and the body. Raises UnsupportedError for what the dialect cannot say."""
    sampling = request.sampling
    if dialect.most_stops is not None and len(sampling.stop) > dialect.most_stops:
        raise UnsupportedError(
            f"The server takes at most {dialect.most_stops} stop texts, not {len(sampling.stop)}.", "Give fewer."
        )
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **{wire: getattr(sampling, name) for name, wire in dialect.names.items()},
        **dialect.fixed,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): value for token_id, value in sampling.logit_bias}
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop and not dialect.stops_here:
        body["stop"] = list(sampling.stop)
    is_chat = request.conversation is not None
    if request.grammar is not None:
        body |= _grammar(request.grammar, dialect, is_chat=is_chat)
    if sampling.logprobs is not None:
        body |= _logprobs(sampling.logprobs, is_chat=is_chat)
    if request.conversation is not None:
        return "/chat/completions", {**body, "messages": plain_messages(request.conversation)}
    return "/completions", {**body, "prompt": _prompt(request.prompt)}


def write_scoring(prompt: Sequence[int], model: str, dialect: Dialect, alternatives: int) -> tuple[str, dict[str, Any]]:
    """The same for the log probabilities of a prompt's tokens: an answer of no tokens that begins with the prompt.

    vLLM has a field `prompt_logprobs` too, but not in a stream. Without `return_token_ids` it cannot echo token ids
    (`completion/serving.py`).
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "echo": True,
        "logprobs": alternatives,
        "max_tokens": 0,
        "temperature": 0.0,
        "stream": True,
        **dialect.fixed,
    }
    return "/completions", body


def _prompt(prompt: str | tuple[int, ...]) -> str | list[int]:
    if not prompt:
        raise UsageError("The prompt is empty.", "Give at least one token of text.")
    return prompt if isinstance(prompt, str) else list(prompt)


def _grammar(grammar: Grammar, dialect: Dialect, *, is_chat: bool) -> dict[str, Any]:
    if grammar.kind != "json_schema":
        return {"structured_outputs": {grammar.kind: grammar.value}}
    if isinstance(grammar.value, str):
        raise UsageError("A JSON schema must be a mapping.", "Parse the text first.")
    schema = dict(grammar.value)
    if dialect.schema_field is not None and not is_chat:
        return {dialect.schema_field: {"x-guidance": _JSON_STYLE, **schema}}
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _logprobs(count: int, *, is_chat: bool) -> dict[str, Any]:
    # llama.cpp takes 0 for none at all; what is too much is cut off when the answer is read.
    return {"logprobs": True, "top_logprobs": max(count, 1)} if is_chat else {"logprobs": max(count, 1)}


def wire_name(name: str, dialect: Dialect) -> str:
    """The flag of a field that a server names: `--max-new-tokens` for `max_tokens`; empty where there is none."""
    ours = {"max_tokens": "max_new_tokens", **{wire: own for own, wire in dialect.names.items()}}.get(name, name)
    return f"--{ours.replace('_', '-')}" if ours in Sampling.__dataclass_fields__ and ours != "logprobs" else ""
