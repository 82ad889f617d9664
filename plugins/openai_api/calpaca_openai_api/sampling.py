"""A request's fields as the engine's `Sampling`, and the refusal of what an engine cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from calpaca.core.engine import Capabilities, Grammar, Sampling
from calpaca.core.settings import SamplingSettings
from calpaca.plugins.options import SamplingOptions
from calpaca_openai_api.bodies import GenerationBody
from calpaca_openai_api.faults import ApiError, unsupported

_GREEDIEST = 1e-6
"""Stands for a `top_p` of 0, which keeps the likeliest token alone."""


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say: options of `calpaca serve`, else the settings, else what OpenAI
    documents (temperature and top_p 1)."""

    options: SamplingOptions
    settings: SamplingSettings

    def value(self, name: str, documented: Any) -> Any:
        for chosen in (getattr(self.options, name), getattr(self.settings, name)):
            if chosen is not None and chosen != SamplingSettings.model_fields[name].default:
                return chosen
        given = getattr(self.options, name)
        return given if given is not None else documented

    def sampling(self, body: GenerationBody, most_tokens: int | None, logprobs: int | None) -> Sampling:
        """The sampling that a request asks for."""
        asked: Mapping[str, Any] = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "repetition_penalty": body.repetition_penalty,
            "top_k": body.top_k,
            "max_new_tokens": most_tokens,
            "seed": body.seed,
            "stop": body.stops if body.stop is not None else None,
        }
        documented = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "top_k": 0, "stop": ()}
        values = {
            name: value if value is not None else self.value(name, documented.get(name))
            for name, value in asked.items()
        }
        values["top_p"] = max(values["top_p"], _GREEDIEST)
        values["top_k"] = max(values["top_k"], 0)  # -1 is how vLLM's clients switch it off
        return Sampling(
            **{**values, "stop": tuple(values["stop"])},
            logprobs=logprobs,
            min_p=body.min_p or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logit_bias=_biases(body),
        )


def _biases(body: GenerationBody) -> tuple[tuple[int, float], ...]:
    """Raises ApiError for a token that is named twice, as "7" and "07"."""
    biases = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if len(biases) < len(body.logit_bias or ()):
        raise ApiError(400, "'logit_bias' names a token twice.", param="logit_bias")
    return tuple(biases.items())


def for_choice(sampling: Sampling, choice: int) -> Sampling:
    """Sampling of one of several answers to a prompt: a seed gives each another text, and the same ones again."""
    if sampling.seed is None or choice == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice) % 2**63)


def refuse_fields(body: GenerationBody) -> None:
    """Raise ApiError for fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' is for streamed responses only.", param="stream_options")


def refuse_what_the_engine_cannot(body: GenerationBody, capabilities: Capabilities, sampling: Sampling) -> None:
    """Raise ApiError that names the field."""
    for name, refused in _refusals(capabilities, sampling):
        if refused:
            raise unsupported(name, "the engine that runs this model does not do it.")
    count = sampling.logprobs
    if count is not None and capabilities.max_logprobs < max(count, 1):
        raise unsupported("logprobs", f"the engine gives {capabilities.max_logprobs} alternatives at most.")
    if body.return_token_ids and not capabilities.token_ids:
        raise unsupported("return_token_ids", "the engine does not know them.")


def _refusals(capabilities: Capabilities, sampling: Sampling) -> Iterator[tuple[str, bool]]:
    yield "seed", sampling.seed is not None and not capabilities.seed
    for name in sorted(capabilities.unsupported):
        yield name, getattr(sampling, name) != getattr(Sampling, name)


def structured_grammar(body: GenerationBody) -> Grammar | None:
    """The grammar of the extension `structured_outputs`. Raises ApiError."""
    given = {name: value for name, value in (body.structured_outputs or {}).items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ApiError(400, "Give one kind of structured output.", param="structured_outputs")
    ((name, value),) = given.items()
    if name in ("regex", "grammar") and isinstance(value, str):
        return Grammar("regex" if name == "regex" else "lark", value)
    if name == "json" and isinstance(value, dict):
        return Grammar("json_schema", value)
    raise ApiError(
        400, "Structured outputs are 'regex' or 'grammar' (texts) or 'json' (a schema).", param="structured_outputs"
    )
