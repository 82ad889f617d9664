"""The llama_cpp engine: llama.cpp's slots, through xllamacpp, on any GGUF file.

llama.cpp reports the text of an answer and how many tokens it has, but not all of their ids: of a character that is
several tokens only the last is told. So this engine gives text and counts, and neither ids nor log probabilities, which
would lack the same tokens. Its frequency and presence penalties count the prompt, too, which no window that it takes
leaves out: they are refused.

A GGUF file stays as it is under LoRA adapters: llama.cpp takes them as files of their own when it starts. What is more
than LoRA is merged, and so are adapters of a model that is not such a file. An adapter for single requests is such a file
too; since llama.cpp takes no further one while it runs, a process that has it takes over (see `workers`), and requests
for different adapters take turns (see `turns`). Each request then names the scale of every adapter and its slot, and
prompts that have lost their slot are not kept: what llama.cpp keeps of those does not tell under which adapter it was
computed, nor does a request without scales (https://github.com/ggml-org/llama.cpp/issues/26207).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any

from calpaca.core.engine import Capabilities, FinishReason, Grammar
from calpaca.core.engines.answer import Progress
from calpaca.core.engines.dialect import lark_source
from calpaca.core.engines.native import Job, NativeEngine, cache_tokens, check_cpu, read_model, stored_type, threads
from calpaca.core.engines.prepared import gguf_with_lora, lora_file
from calpaca.core.engines.process import Event, Worker
from calpaca.core.engines.threads import Neighbours
from calpaca.core.engines.turns import Turns
from calpaca.core.engines.workers import Workers
from calpaca.core.errors import MissingExtraError, ModelError, UnsupportedError
from calpaca.core.files import AdapterFiles, ModelFiles
from calpaca.core.grammar import KINDS

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime

NAME = "llama_cpp"

SLOTS = 8
"""Requests that run at once; more wait. Each slot has room for a whole context."""

STEP_TOKENS = 512
"""Tokens of one step; a prompt can be given up between two."""

TYPES = {"float32": frozenset({"F32"}), "float16": frozenset({"F16"})}
"""Types of matrices for a dtype that is asked for. llama.cpp rounds what a matrix is multiplied with to its precision,
to 8 bits for a quantized one."""

_PAUSE = 0.005
"""Seconds that the process waits for tokens before it looks for new requests."""
_IDLE_CACHE = 512
"""MiB of main memory for the keys and values of prompts that have lost their slot."""


def open_engine(files: ModelFiles, runtime: Runtime) -> NativeEngine:
    """Prepare the weights and start the engine in a process of its own. Raises ModelError."""
    check_cpu(NAME, files.spec)
    if files.spec.dtype == "bfloat16":
        raise UnsupportedError(f"The engine '{NAME}' does not compute in bfloat16.", "Use --dtype float16 or float32.")
    check_installed()
    weights, adapters = gguf_with_lora(files, runtime, NAME, TYPES.get(files.spec.dtype))
    return start_engine(files, weights, runtime, adapters)


def check_installed() -> None:
    """Raise MissingExtraError where xllamacpp is not there. Imports nothing of it."""
    from importlib.util import find_spec

    if find_spec("xllamacpp") is None:
        raise MissingExtraError(f"The engine '{NAME}'", "llama-cpp", "xllamacpp")


def start_engine(
    files: ModelFiles,
    weights: Path,
    runtime: Runtime,
    adapters: Sequence[AdapterFiles] = (),
    *,
    slots: int = SLOTS,
    isolated: bool = True,
) -> NativeEngine:
    """The engine on a GGUF file, under GGUF LoRA files with their scales. Without `isolated` it runs in threads of this process.

    There are fewer slots where memory is short; where not even one whole context fits, the context is shorter.
    """
    neighbours = Neighbours()
    model = read_model(files, weights)
    exact = files.spec.dtype == "float32"
    tokens = cache_tokens(model, slots * model.context_length, 4 if exact else 2)
    slots = max(tokens // model.context_length, 1)
    context = min(model.context_length, tokens)
    arguments = {
        "weights": str(weights),
        "adapters": [(str(adapter.path), adapter.scale) for adapter in adapters],
        "slots": slots,
        "context": context,
        "exact": exact,
        "threads": threads(neighbours),
    }

    def start(beside: Sequence[AdapterFiles]) -> Worker:
        live = {adapter.name: (str(adapter.path), adapter.scale) for adapter in beside}
        target = "calpaca.core.engines.llama_cpp:LlamaCppRunner"
        return Worker(target, {**arguments, "live": live}, f"The engine '{NAME}'", isolated=isolated)

    workers = Workers(start([]), start, together=True)
    details = {
        "device": "cpu",
        "dtype": files.spec.dtype,
        "weights": stored_type(weights),
        "slots": slots,
        "threads": arguments["threads"],
    }
    return NativeEngine(
        NAME, workers, model, _capabilities(context, details), translate=_translate,
        prepare=lambda adapter: _as_gguf(files, adapter, runtime),
    )  # fmt: skip


def _capabilities(context: int, details: Mapping[str, Any]) -> Capabilities:
    return Capabilities(
        context_length=context,
        grammars=KINDS,
        adapters=True,
        unsupported=frozenset({"frequency_penalty", "presence_penalty"}),
        details=details,
    )


def _as_gguf(files: ModelFiles, adapter: AdapterFiles, runtime: Runtime) -> AdapterFiles:
    """An adapter as a GGUF file. Raises AdapterError for one of another base, UnsupportedError for more than LoRA."""
    try:
        return lora_file(files, adapter, runtime)
    except UnsupportedError as error:
        raise UnsupportedError(
            error.message, "Merge it with `calpaca models merge`, or load the model with --adapter."
        ) from error


def _translate(grammar: Grammar) -> tuple[str, str]:
    return "grammar", f"%llguidance {{}}\n{lark_source(grammar)}"


class LlamaCppRunner:
    """llama.cpp's server without its network: a thread for each slot waits for the tokens of one request.

    `exact` keeps keys and values in float32 and computes attention step by step, so that an answer does not depend on
    what else runs.
    """

    def __init__(
        self,
        weights: str,
        *,
        adapters: Sequence[tuple[str, float]],
        live: Mapping[str, tuple[str, float]],
        slots: int,
        context: int,
        exact: bool,
        threads: int,
    ) -> None:
        self._folder = TemporaryDirectory(prefix="calpaca-")
        parameters = _parameters(weights, [*adapters, *live.values()], slots, context, exact)
        parameters.cache_ram_mib = 0 if live else _IDLE_CACHE
        self._server = _open_server(parameters, Path(self._folder.name), threads)
        self._context = context
        self._fixed = [scale for _, scale in adapters]
        self._live = {name: scale for name, (_, scale) in live.items()}
        self._turns = Turns(slots)
        self._jobs: dict[int, Job] = {}  # that wait for their turn
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._alive: set[int] = set()
        self._cancelled: set[int] = set()
        self._queues: list[SimpleQueue[tuple[int, Job] | None]] = [SimpleQueue() for _ in range(slots)]
        self._slots = [Thread(target=self._serve, args=[slot], daemon=True) for slot in range(slots)]
        for slot in self._slots:
            slot.start()

    @property
    def busy(self) -> bool:
        return bool(self._alive)

    def start(self, key: int, job: Job) -> None:
        self._alive.add(key)
        self._jobs[key] = job
        self._turns.add(key, job.adapter, job.prompt)
        self._hand_on()

    def _hand_on(self) -> None:
        """Give slots to those whose turn it is."""
        while (given := self._turns.next()) is not None:
            key, slot = given
            self._queues[slot].put((key, self._jobs.pop(key)))

    def cancel(self, key: int) -> None:
        if key in self._alive:
            self._cancelled.add(key)
        if self._turns.remove(key):
            del self._jobs[key]
            self._events.put((key, Progress(finish="cancelled"), True))

    def step(self) -> list[Event]:
        """What the slots have reported, after a short wait where there is nothing yet."""
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=_PAUSE))
            while True:
                events.append(self._events.get_nowait())
        except Empty:
            pass
        for key, _, last in events:
            if last:
                self._alive.discard(key)
                self._cancelled.discard(key)
                self._turns.end(key)
        self._hand_on()
        return events

    def close(self) -> None:
        self._cancelled |= self._alive
        for queue in self._queues:
            queue.put(None)
        for slot in self._slots:
            slot.join()
        del self._server
        self._folder.cleanup()

    # In a slot's thread ---------------------------------------------------------------------------------------------
    def _serve(self, slot: int) -> None:
        while (given := self._queues[slot].get()) is not None:
            self._events.put(self._answer(slot, *given))

    def _answer(self, slot: int, key: int, job: Job) -> Event:
        """Run one request; its last event."""
        if key in self._cancelled:
            return key, Progress(finish="cancelled"), True
        told = 0
        last: Progress | Exception = Progress(finish="cancelled")

        def take(chunk: dict[str, Any]) -> bool:
            """Pass on one chunk; True ends the request."""
            nonlocal told, last
            if "error" in chunk:
                last = ModelError(f"llama.cpp failed: {chunk['error'].get('message', '')}", "Try another engine.")
                return True
            progress, told = _progress(chunk, told)
            if progress.finish is not None:
                last = progress
            elif progress != Progress():
                self._events.put((key, progress, False))
            return key in self._cancelled

        try:
            self._server.handle_completions({**_body(job, self._context), **self._adapted(slot, job)}, take)
        except Exception as error:
            last = ModelError(f"llama.cpp failed: {error}", "Try another engine.")
        return key, last, True

    def _adapted(self, slot: int, job: Job) -> dict[str, Any]:
        """Which adapters a request runs under: those of the model, and its own of those beside it."""
        if not self._live:
            return {}
        scales = [*self._fixed, *(scale if name == job.adapter else 0.0 for name, scale in self._live.items())]
        return {"id_slot": slot, "lora": [{"id": number, "scale": scale} for number, scale in enumerate(scales)]}


def _progress(chunk: dict[str, Any], told: int) -> tuple[Progress, int]:
    """A chunk in our words, and how many tokens were told of so far."""
    choice = chunk["choices"][0]
    tokens = max(int(chunk.get("timings", {}).get("predicted_n", told)), told)
    cached = int(chunk.get("prompt_progress", {}).get("cache", 0))
    reason: FinishReason | None = choice["finish_reason"]
    return Progress(text=choice["text"], tokens=tokens - told, finish=reason, cached=cached), tokens


def _body(job: Job, context: int) -> dict[str, Any]:
    sampling = job.sampling
    body: dict[str, Any] = {
        "prompt": list(job.prompt),
        "n_predict": job.max_new_tokens,
        "stream": True,
        "return_progress": True,  # chunks while the prompt is read: the request can be given up there
        "timings_per_token": True,  # the number of tokens
        "cache_prompt": True,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context,
        "logit_bias": [list(pair) for pair in sampling.logit_bias],
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if job.grammar is not None:
        kind, text = job.grammar
        body[kind] = text
    return body


def _parameters(weights: str, adapters: Sequence[tuple[str, float]], slots: int, context: int, exact: bool) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = weights
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in adapters]
    parameters.n_parallel = slots
    parameters.n_ctx = slots * context
    parameters.n_batch = STEP_TOKENS
    parameters.ctx_shift = False
    parameters.fit_params = False
    parameters.warmup = False
    parameters.ui = False
    parameters.n_gpu_layers = 0
    parameters.verbosity = 1
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters


def _open_server(parameters: Any, folder: Path, threads: int) -> Any:
    """llama.cpp's server always listens somewhere: here on a socket that only this user reaches, with a key."""
    import xllamacpp

    parameters.api_keys = [secrets.token_hex(16)]
    if os.name == "posix":
        parameters.hostnames = [str(folder / "unused.sock")]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    try:
        return xllamacpp.Server(parameters)
    except Exception as error:
        name = Path(parameters.model.path).name
        raise ModelError(f"llama.cpp cannot load {name}: {error}", "Use --engine transformers.") from error
