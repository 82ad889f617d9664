"""What the chat model and the plain language model share: which model, how it samples, and the request that follows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Self

from langchain_core.language_models.base import LangSmithParams
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from langchain_core.utils import secret_from_env
from pydantic import AliasChoices, ConfigDict, Field, SecretStr, field_validator, model_validator

from calpaca.core.decoding import refuse_not_offered
from calpaca.core.engine import Chunk, Handle, Sampling, TokenLogprob
from calpaca.core.errors import AnswerTimeoutError, DownloadError, UsageError, unknown_name
from calpaca.core.langchain.serializable import PublicSerializable
from calpaca.core.model import Model
from calpaca.core.settings import SamplingSettings
from calpaca.core.spec import ModelSpec

SPEC_FIELDS = frozenset(ModelSpec.model_fields)
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
)
CALL_ARGUMENTS = frozenset(
    {
        *SAMPLING_FIELDS,
        "model",
        "max_tokens",
        "max_new_tokens",
        "logprobs",
        "top_logprobs",
        "timeout",
        "grammar",
        "logit_bias",
    }
)
"""Constructor arguments that a single call may override, and the grammar of its answer."""
_THREADS = 256
_ALIASES = ("model_name", "max_new_tokens")


@dataclass(frozen=True)
class Call:
    """One call after its own arguments were laid over the constructor's."""

    model: Model
    sampling: Sampling
    timeout: float | None
    arguments: Mapping[str, Any]


class ModelParameters(PublicSerializable):
    """Constructor arguments. What is left out is taken from the settings."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(
        None,
        validation_alias=AliasChoices("model", "model_name"),
        description="Catalogue name, hub id, folder or .gguf file. A ModelSpec sets the fields below, too.",
    )
    adapters: tuple[str, ...] = Field((), description="LoRA adapters in order: folders or ids, with @0.5 a scale.")
    tokenizer: str | None = Field(None, description="Folder or id of another tokenizer.")
    chat_template: str | None = Field(None, description="Name of a built-in template, or a Jinja file.")
    engine: str = Field("auto", description="Engine that runs it, or auto.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 or cuda:0,1.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")
    quantization: str | None = Field(None, description="8bit or 4bit, on CUDA.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    temperature: float | None = Field(None, description="0 always takes the likeliest token.")
    max_tokens: int | None = Field(
        None,
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="Longest answer in tokens.",
    )
    top_p: float | None = Field(None, description="Keep the likeliest tokens that together reach this probability.")
    top_k: int | None = Field(None, description="Keep this many of the likeliest tokens; 0 keeps all.")
    repetition_penalty: float | None = Field(None, description="Above 1 makes earlier tokens less likely.")
    seed: int | None = Field(None, description="Makes sampling repeatable.")
    min_p: float | None = Field(None, description="Keep tokens of this share of the likeliest one's probability.")
    frequency_penalty: float | None = Field(None, description="Lowers a token for each time the answer has it.")
    presence_penalty: float | None = Field(None, description="Lowers a token that the answer has at all.")
    logit_bias: dict[int, float] | None = Field(None, description="Added to the logits of token ids; -100 bans one.")
    stop: list[str] | None = Field(None, description="Texts that end an answer; they are cut off.")
    logprobs: bool = Field(False, description="Report the log probability of each token.")
    top_logprobs: int | None = Field(None, description="Report this many alternatives beside it.")

    streaming: bool = Field(False, description="Let invoke stream, so that callbacks see the tokens.")
    timeout: float | None = Field(None, description="Seconds an answer may take before it is cancelled.")
    max_retries: int = Field(0, ge=0, description="How often a model that could not be fetched is tried again.")
    api_key: SecretStr | None = Field(
        default_factory=secret_from_env("CALPACA_API_KEY", default=None),
        description="For engines that ask a server; those that run here need none.",
    )
    runtime: Any = Field(
        None, exclude=True, repr=False, description="Where models are loaded; the process's own if left out."
    )

    @classmethod
    def from_model(cls, model: Model, sampling: Sampling = Sampling(), **arguments: Any) -> Self:
        """On a model that is loaded already. It answers with `sampling` unless a call says otherwise."""
        given = {name: getattr(sampling, name) for name in SAMPLING_FIELDS}
        logprobs = {"logprobs": sampling.logprobs is not None, "top_logprobs": sampling.logprobs or None}
        return cls(
            model=model.name,
            runtime=_LoadedModel(model),
            max_tokens=sampling.max_new_tokens,
            stop=list(sampling.stop),
            logit_bias=dict(sampling.logit_bias) or None,
            **{**given, **logprobs, **arguments},
        )

    # As JSON: `langchain_core.load.dumpd` and `load` ------------------------------------------------------------------
    @property
    def lc_secrets(self) -> dict[str, str]:
        """What is written as the name of an environment variable instead."""
        return {"api_key": "CALPACA_API_KEY"}

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What would be left out as a default: `streaming=False` that was asked for forbids langchain_core to stream."""
        return {"streaming": self.streaming} if "streaming" in self.model_fields_set else {}

    # Checks at construction: nothing is loaded, but a wrong name does not wait for the first call ------------------
    @model_validator(mode="before")
    @classmethod
    def _read_arguments(cls, values: Any) -> Any:
        """Spread a ModelSpec over the fields. Raises UsageError for an unknown argument."""
        if not isinstance(values, Mapping):
            return values
        given = dict(values)
        spec = given.get("model")
        if isinstance(spec, ModelSpec):
            del given["model"]
            secret = {"api_key": spec.api_key} if spec.api_key is not None else {}  # no dump holds it
            given = {**spec.model_dump(exclude_defaults=True), **secret, "adapters": spec.adapters, **given}
        known = {*cls.model_fields, *_ALIASES}
        refuse_not_offered(given)
        for name in given:
            if name not in known:
                raise UsageError(*unknown_name(f"argument of {cls.__name__}", name, known))
        return given

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapters_as_text(cls, value: Any) -> Any:
        return tuple(str(each) for each in value) if isinstance(value, list | tuple) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_model_parameters(self) -> Self:
        """Raises ModelNotFoundError or UsageError, with the nearest known name or the allowed range."""
        self._runtime().check(self.spec)
        self._sampling(None, {})
        return self

    # The model -----------------------------------------------------------------------------------------------------
    @property
    def spec(self) -> ModelSpec:
        """What these arguments name, before the settings are applied."""
        return ModelSpec(**{name: getattr(self, name) for name in SPEC_FIELDS})

    def _runtime(self) -> Any:
        # By name, since the core does not import what lies above it.
        return self.runtime if self.runtime is not None else import_module("calpaca").runtime()

    def _load(self, name: str | None = None) -> Model:
        """The model, loaded at the first call; `name` puts another one in its place, without its adapters."""
        kept = ("engine", "device", "dtype", "quantization", "api_key")
        other = name is not None and name != self.model
        spec = ModelSpec(model=name, **{field: getattr(self, field) for field in kept}) if other else self.spec
        for attempt in range(self.max_retries + 1):
            try:
                model: Model = self._runtime().model(spec)
            except DownloadError:
                if attempt == self.max_retries:
                    raise
                time.sleep(2.0**attempt)
            else:
                return model
        raise AssertionError("unreachable")

    def _identity(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the answer to a prompt depends on, for caches and traces; `arguments` are those of the call."""
        call = self._call(None, arguments, extra=arguments.keys())
        model, sampling = call.model, asdict(call.sampling)
        return {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "adapters": [str(adapter) for adapter in model.spec.adapters],
            "engine": model.engine.name,
            "dtype": model.engine.capabilities().details.get("dtype", model.spec.dtype),
            "quantization": model.spec.quantization,
            **sampling,
            "stop": list(sampling["stop"]),
        }

    def _tracing(self, kind: Any, stop: Sequence[str] | None, arguments: Mapping[str, Any]) -> LangSmithParams:
        """What LangSmith shows. Loads nothing."""
        sampling = self._sampling(stop, arguments)
        spec: ModelSpec = self._runtime().check(self.spec)
        params = LangSmithParams(
            ls_provider="calpaca",
            ls_model_name=arguments.get("model") or str(spec),
            ls_model_type=kind,
            ls_temperature=sampling.temperature,
        )
        if sampling.max_new_tokens is not None:
            params["ls_max_tokens"] = sampling.max_new_tokens
        if sampling.stop:
            params["ls_stop"] = list(sampling.stop)
        return params

    # A call --------------------------------------------------------------------------------------------------------
    def _call(self, stop: Sequence[str] | None, arguments: Mapping[str, Any], extra: Any = ()) -> Call:
        """Lay a call's arguments over the constructor's. Raises UsageError for one that is neither known nor `extra`."""
        allowed = CALL_ARGUMENTS | set(extra)
        refuse_not_offered(arguments)
        for name in arguments:
            if name not in allowed:
                raise UsageError(*unknown_name(f"argument of a call to {type(self).__name__}", name, allowed))
        timeout = arguments.get("timeout", self.timeout)
        return Call(self._load(arguments.get("model")), self._sampling(stop, arguments), timeout, arguments)

    def _sampling(self, stop: Sequence[str] | None, arguments: Mapping[str, Any]) -> Sampling:
        """The call's argument, else the constructor's, else the settings'."""
        defaults: SamplingSettings = self._runtime().settings.sampling
        values = defaults.model_dump()
        values |= {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        values |= {name: arguments[name] for name in SAMPLING_FIELDS if arguments.get(name) is not None}
        lengths = (
            arguments.get("max_tokens"),
            arguments.get("max_new_tokens"),
            self.max_tokens,
            values["max_new_tokens"],
        )
        values["max_new_tokens"] = next((length for length in lengths if length is not None), None)
        stops = next((each for each in (stop, self.stop) if each is not None), values["stop"])
        values["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
        bias: Mapping[int, float] = arguments.get("logit_bias", self.logit_bias) or {}
        pairs = tuple((int(token_id), float(value)) for token_id, value in bias.items())
        return Sampling(**values, logprobs=self._logprobs(arguments), logit_bias=pairs)

    def _logprobs(self, arguments: Mapping[str, Any]) -> int | None:
        """How many alternatives are reported; None: no log probabilities at all."""
        top: int | None = arguments.get("top_logprobs", self.top_logprobs)
        wanted = arguments.get("logprobs", self.logprobs) or top is not None
        return (top or 0) if wanted else None


@dataclass(frozen=True)
class _Defaults:
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(frozen=True)
class _LoadedModel:
    """Stands where a runtime stands, and has one model."""

    only: Model
    settings: _Defaults = field(default_factory=_Defaults)

    def check(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def loaded(self, spec: ModelSpec) -> Model:  # noqa: ARG002
        return self.only

    def model(self, spec: ModelSpec) -> Model:
        if spec.model != self.only.name:
            raise UsageError(
                f"This object answers with '{self.only.name}' only, not with '{spec.model}'.",
                "Construct it with a model's name instead of from_model.",
            )
        return self.only


def all_at_once(config: RunnableConfig | list[RunnableConfig] | None, inputs: int) -> list[RunnableConfig]:
    """A config per input, under which the threads of a batch ask together unless `max_concurrency` limits them."""
    configs = get_config_list(config, inputs)
    for each in configs:
        each["max_concurrency"] = each.get("max_concurrency") or min(inputs, _THREADS)
    return configs


@contextmanager
def answering(handle: Handle, timeout: float | None) -> Iterator[Handle]:
    """Cancel the request when the block is left, however that happens, and when it takes longer than `timeout` seconds.

    Raises AnswerTimeoutError.
    """
    expired = threading.Event()

    def expire() -> None:
        if not handle.done:
            expired.set()
            handle.cancel()

    timer = threading.Timer(timeout, expire) if timeout is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield handle
    finally:
        if timer is not None:
            timer.cancel()
        handle.cancel()
    if expired.is_set():
        raise AnswerTimeoutError(
            f"There was no whole answer within {timeout:g} s.", "Raise timeout, or lower max_tokens."
        )


def whole(handle: Handle, timeout: float | None) -> Chunk:
    """Wait for the answer, as one chunk."""
    with answering(handle, timeout):
        handle.result()
    return joined(handle)


async def awhole(handle: Handle, timeout: float | None) -> Chunk:
    """Wait for the answer without blocking the event loop."""
    with answering(handle, timeout):
        await handle
    return joined(handle)


def joined(handle: Handle) -> Chunk:
    """A finished answer as one chunk."""
    answer = handle.result()
    return Chunk(
        answer.text, answer.token_ids, answer.logprobs, answer.finish_reason, answer.stop, answer.usage, answer.timings,
        answer.prompt_logprobs,
    )  # fmt: skip


def logprobs_info(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log probabilities in the form of OpenAI's responses."""
    return {
        "content": [
            {
                "token": entry.text,
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top_logprobs": [{"token": text, "token_id": id, "logprob": value} for id, text, value in entry.top],
            }
            for entry in logprobs
        ]
    }


def end_info(chunk: Chunk, model: Model) -> dict[str, Any]:
    """What is said about a whole answer, once, with its last chunk."""
    info: dict[str, Any] = {
        "finish_reason": chunk.finish_reason,
        "model_name": model.name,
        "model_provider": "calpaca",
        "system_fingerprint": model.fingerprint[:16],
    }
    if chunk.stop is not None:
        info["stop_reason"] = chunk.stop
    if chunk.timings is not None:
        info["timings"] = asdict(chunk.timings)
    return info
