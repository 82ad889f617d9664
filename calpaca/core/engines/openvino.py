"""The openvino engine: OpenVINO GenAI's continuous batching over prepared GGUF weights.

OpenVINO leaves LoRA on a GGUF model out in silence, so adapters are merged. An adapter for single requests is merged too,
and runs as a model of its own in a process of its own, beside the one without it.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.engine import Capabilities, Grammar
from calpaca.core.engines.answer import Progress
from calpaca.core.engines.dialect import xgrammar_regex
from calpaca.core.engines.native import (
    Job,
    NativeEngine,
    NativeModel,
    cache_tokens,
    check_cpu,
    read_model,
    stored_type,
    threads,
)
from calpaca.core.engines.prepared import gguf_weights
from calpaca.core.engines.process import BrokenError, Event, Worker, reason
from calpaca.core.engines.rope import scaling
from calpaca.core.engines.schema_grammar import schema_ebnf
from calpaca.core.engines.threads import Neighbours
from calpaca.core.engines.workers import Workers
from calpaca.core.errors import MissingExtraError, ModelError, UnsupportedError, UsageError
from calpaca.core.files import AdapterFiles, ModelFiles
from calpaca.core.weights import free_memory

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime

NAME = "openvino"

READ_EXACTLY = frozenset({"F16", "Q8_0"})
"""Types of matrices in GGUF files that OpenVINO reads, and without a loss. It reads Q4_1 with one, and float32 not."""

MAX_ROWS = 64
"""Requests that run at once; more wait."""

STEP_TOKENS = 512
"""Tokens of one step: the running answers' next ones, and pieces of new prompts."""

_BLOCK = 32  # tokens whose keys and values are kept together
_BELOW_1 = 1.0 - 2.0**-24  # the largest min_p that the library takes, in float32
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def open_engine(files: ModelFiles, runtime: Runtime) -> NativeEngine:
    """Prepare the weights and start the engine in a process of its own. Raises ModelError."""
    check_cpu(NAME, files.spec)
    if files.spec.dtype not in {"auto", *_PRECISIONS}:
        raise UnsupportedError(
            f"The engine '{NAME}' does not compute in {files.spec.dtype}.", "Use --dtype float32 or bfloat16."
        )
    check_installed()
    _check_readable(files)
    weights = gguf_weights(files, runtime, NAME, READ_EXACTLY)
    return start_engine(files, weights, runtime)


def _check_readable(files: ModelFiles) -> None:
    """Raise UnsupportedError for what OpenVINO's reader of GGUF files leaves out in silence: of models with scaled rotary
    positions (linear, YaRN, Llama 3) and of Llamas with biases in attention no answer was transformers' (2026.4.1)."""
    from calpaca.core.convert.json_file import read_object

    config = read_object(files.weights / "config.json")
    kind = scaling(config)
    left_out = [f"the rotary scaling '{kind}'"] if kind is not None else []
    left_out += ["the biases of attention"] if config.get("attention_bias") else []
    if left_out:
        raise UnsupportedError(
            f"The engine '{NAME}' leaves out {' and '.join(left_out)} of {files.name}.",
            "Use --engine llama_cpp or transformers.",
        )


def check_installed() -> None:
    """Raise MissingExtraError where OpenVINO GenAI is not there. Imports nothing of it."""
    from importlib.util import find_spec

    if find_spec("openvino_genai") is None:
        raise MissingExtraError(f"The engine '{NAME}'", "openvino", "openvino-genai")


def start_engine(files: ModelFiles, weights: Path, runtime: Runtime, *, isolated: bool = True) -> NativeEngine:
    """The engine on prepared weights. Without `isolated` it runs in this process, and stops it during a step."""
    neighbours = Neighbours()
    model = read_model(files, weights)
    precision = _PRECISIONS.get(files.spec.dtype)
    value_bytes = 4 if precision == "f32" else 2
    tokens = cache_tokens(model, MAX_ROWS * model.context_length, value_bytes)
    context = min(model.context_length, tokens)
    arguments = {
        "weights": str(weights),
        "blocks": max(tokens // _BLOCK, 2),
        "eos_ids": model.eos_ids,
        "precision": precision,
        "threads": threads(neighbours),
    }

    def start(**changed: Any) -> Worker:
        target = "calpaca.core.engines.openvino:OpenVinoRunner"
        return Worker(target, {**arguments, **changed}, f"The engine '{NAME}'", isolated=isolated)

    def start_adapted(merged: Sequence[AdapterFiles]) -> Worker:
        room = _room(merged[0], model, context, value_bytes)
        return start(weights=str(merged[0].path), blocks=max(room // _BLOCK, 2))

    def merge(adapter: AdapterFiles) -> AdapterFiles:
        adapted = replace(files, adapters=(*files.adapters, adapter))
        return replace(adapter, path=gguf_weights(adapted, runtime, NAME, READ_EXACTLY))

    details = {
        "device": "cpu",
        "dtype": precision or "auto",
        "weights": stored_type(weights),
        "cache_tokens": tokens,
        "threads": arguments["threads"],
    }
    workers = Workers(start(), start_adapted, together=False)
    return NativeEngine(NAME, workers, model, _capabilities(context, details), translate=_translate, prepare=merge)


def _room(merged: AdapterFiles, model: NativeModel, context: int, value_bytes: int) -> int:
    """Tokens that a model merged with an adapter can keep, in a process of its own. Raises ModelError for too few."""
    weights = merged.path.stat().st_size * value_bytes // 2  # in float32 it is twice as large as its file
    tokens = cache_tokens(model, MAX_ROWS * model.context_length, value_bytes)
    if free_memory() < weights or tokens < context:
        raise ModelError(
            f"There is no room for adapter {merged.name}: the engine '{NAME}' runs it as a model of its own, of"
            f" {weights >> 20} MiB, and {free_memory() >> 20} MiB are free.",
            "Unload another adapter, or use --engine transformers, which runs several on one model.",
        )
    return tokens


def _capabilities(context: int, details: Mapping[str, Any]) -> Capabilities:
    """The library gives the log probability of the chosen token alone, after temperature and filters: no logprobs."""
    return Capabilities(
        context_length=context,
        grammars=frozenset({"json_schema", "regex"}),
        adapters=True,
        unsupported=frozenset({"logit_bias"}),
        details=details,
    )


def _translate(grammar: Grammar) -> tuple[str, str]:
    if grammar.kind == "json_schema":
        return "grammar", schema_ebnf(grammar.value)
    return "regex", xgrammar_regex(grammar)


class OpenVinoRunner:
    """The library's batch. Used by one thread, in the engine's process."""

    def __init__(
        self, weights: str, blocks: int, eos_ids: tuple[int, ...], precision: str | None, threads: int
    ) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        self._eos_ids = eos_ids
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if precision is not None:
            properties["INFERENCE_PRECISION_HINT"] = precision
        if precision == "f32":
            properties["KV_CACHE_PRECISION"] = "f32"
        try:
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                weights, self._scheduling(blocks), "CPU", properties
            )
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO cannot load {Path(weights).name}: {reason(error)}", "Use --engine transformers."
            ) from error
        self._handles: dict[int, Any] = {}
        self._cancelled: set[int] = set()
        self._waiting: deque[tuple[int, Job]] = deque()  # whose grammar may turn out to be unreadable
        self._unproven: int | None = None  # the one of them whose first token is awaited

    def _scheduling(self, blocks: int) -> Any:
        config = self._genai.SchedulerConfig()
        config.num_kv_blocks = blocks
        config.enable_prefix_caching = True
        config.dynamic_split_fuse = True
        config.max_num_seqs = MAX_ROWS
        config.max_num_batched_tokens = STEP_TOKENS
        return config

    @property
    def busy(self) -> bool:
        return bool(self._handles or self._waiting)

    def start(self, key: int, job: Job) -> None:
        if job.grammar is not None:
            self._waiting.append((key, job))
        else:
            self._add(key, job)

    def _add(self, key: int, job: Job) -> None:
        import numpy as np

        ids = self._openvino.Tensor(np.array([job.prompt], dtype=np.int64))
        self._handles[key] = self._pipeline.add_request(key, ids, self._generation(job))

    def _generation(self, job: Job) -> Any:
        config = self._genai.GenerationConfig()
        if self._eos_ids:
            config.eos_token_id = self._eos_ids[0]
            config.stop_token_ids = set(self._eos_ids)
        config.max_new_tokens = job.max_new_tokens
        sampling = job.sampling
        config.repetition_penalty = sampling.repetition_penalty
        config.frequency_penalty = sampling.frequency_penalty
        config.presence_penalty = sampling.presence_penalty
        if sampling.temperature > 0.0:
            config.do_sample = True
            config.temperature = sampling.temperature
            config.top_p = sampling.top_p
            config.min_p = min(sampling.min_p, _BELOW_1)
            if sampling.top_k:
                config.top_k = sampling.top_k
            config.rng_seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        if job.grammar is not None:
            kind, text = job.grammar
            config.structured_output_config = self._genai.StructuredOutputConfig(**{kind: text})
        return config

    def cancel(self, key: int) -> None:
        self._cancelled.add(key)
        if key in self._handles:
            self._handles[key].cancel()

    def step(self) -> list[Event]:
        """One forward pass of everything that runs."""
        events = self._prove_next()
        try:
            self._pipeline.step()
        except RuntimeError as error:
            raise BrokenError(error, [*events, *self._blame(error)]) from error
        for key, handle in list(self._handles.items()):
            events += self._events(key, handle)
        return events

    def _prove_next(self) -> list[Event]:
        """A grammar that the library cannot read fails the step, without saying whose it is: one new one at a time."""
        events: list[Event] = []
        while self._waiting and self._unproven is None:
            key, job = self._waiting.popleft()
            if key in self._cancelled:
                events.append(self._end(key, Progress(finish="cancelled")))
            else:
                self._add(key, job)
                self._unproven = key
        return events

    def _blame(self, error: RuntimeError) -> list[Event]:
        """The end of the request whose grammar was new, if there is one. The others cannot go on: the library was left
        in the middle of a step."""
        if self._unproven is None:
            return []
        unreadable = UsageError(f"OpenVINO cannot use this grammar: {reason(error)}", "Simplify it.")
        return [self._end(self._unproven, unreadable)]

    def _events(self, key: int, handle: Any) -> list[Event]:
        status = handle.get_status().name
        if key in self._cancelled:
            return [self._end(key, Progress(finish="cancelled"))]
        ids: list[int] = []
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
                finish = output.finish_reason.name
        if ids and key == self._unproven:
            self._unproven = None
        if status == "RUNNING":
            return [(key, Progress(tuple(ids)), False)] if ids else []
        if status == "IGNORED":
            return [self._end(key, ModelError("There is no room for this request in OpenVINO's cache.", "Shorten it."))]
        return [self._end(key, Progress(tuple(ids), finish="length" if ids and finish == "LENGTH" else "stop"))]

    def _end(self, key: int, payload: Any) -> Event:
        self._handles.pop(key, None)
        self._cancelled.discard(key)
        self._unproven = None if self._unproven == key else self._unproven
        return key, payload, True

    def close(self) -> None:
        for handle in self._handles.values():
            handle.cancel()
        del self._pipeline
