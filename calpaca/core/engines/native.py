"""What engines on native libraries share: the library runs in a process of its own and sees token ids only; texts,
templates, stop texts and limits are dealt with here, as for every other engine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core import gguf
from calpaca.core.adapters import Adapter
from calpaca.core.engine import Capabilities, Grammar, Handle, Request, Sampling, refuse_unsupported
from calpaca.core.engines.answer import Answer
from calpaca.core.engines.limits import check_bias, check_prompt, new_tokens
from calpaca.core.engines.process import Worker
from calpaca.core.engines.threads import Neighbours, threads_beside
from calpaca.core.engines.workers import Workers
from calpaca.core.errors import UnsupportedError
from calpaca.core.files import AdapterFiles, ModelFiles
from calpaca.core.machine import computing_threads
from calpaca.core.spec import ModelSpec
from calpaca.core.template import NamedTemplate, choose_template
from calpaca.core.tokenizer import Tokenizer, load_tokenizer
from calpaca.core.weights import check_vocabulary, free_memory

log = logging.getLogger("calpaca")

_LOOK_SECONDS = 0.1
"""For which other processes are watched at least; reading the files usually takes longer."""


@dataclass(frozen=True)
class Job:
    """A request as a native library takes it. `grammar` is in the library's own form, `adapter` one of those beside
    the model."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    grammar: tuple[str, str] | None
    adapter: str | None = None


@dataclass(frozen=True)
class NativeModel:
    """What is known of a model from the files alone. `cache_values` are the numbers kept for each token of context."""

    tokenizer: Tokenizer
    template: NamedTemplate | None
    context_length: int
    vocabulary_size: int
    eos_ids: tuple[int, ...]
    cache_values: int


def read_model(files: ModelFiles, weights: Path) -> NativeModel:
    """Read tokenizer, configuration and the header of the prepared weights. Raises ModelError."""
    tokenizer = load_tokenizer(files.tokenizer, trust_remote_code=files.spec.trust_remote_code)
    header = gguf.read_header(weights)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    vocabulary = shapes["token_embd.weight"][-1]
    check_vocabulary(len(tokenizer), vocabulary)

    def number(key: str, default: int = 0) -> int:
        return int(header.of_architecture(key) or default)

    heads = number("attention.head_count", 1)
    head_size = number("attention.key_length", number("embedding_length") // heads)
    return NativeModel(
        tokenizer,
        files.template,
        attended_length(files, number("context_length")),
        vocabulary,
        _eos_ids(files.weights, tokenizer),
        2 * number("block_count") * number("attention.head_count_kv", heads) * head_size,
    )


def attended_length(files: ModelFiles, context_length: int) -> int:
    """How long a text may be for a library that lets each token see all before it; says so where the model has a window,
    which makes that shorter."""
    from calpaca.core.convert.json_file import read_object

    file = files.weights / "config.json"
    config = read_object(file) if file.is_file() else {}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if not window or window >= context_length:
        return context_length
    log.warning(
        "%s looks back %d tokens, which this engine cannot: the context is as long. --engine transformers has all of it.",
        files.name,
        window,
    )
    return int(window)


def _eos_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: those of the generation config, the config and the tokenizer."""
    from calpaca.core.convert.json_file import read_object

    declared: list[Any] = [
        read_object(folder / name).get("eos_token_id")
        for name in ("generation_config.json", "config.json")
        if (folder / name).is_file()
    ]
    declared.append(tokenizer.token_id(tokenizer.special_tokens.get("eos_token", "")))
    flat = [index for value in declared for index in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(int(index) for index in flat if index is not None))


def cache_tokens(model: NativeModel, wanted: int, value_bytes: int) -> int:
    """How many tokens' keys and values there is room for: at most `wanted`, and a quarter of the free memory."""
    return min(wanted, max(free_memory() // 4 // (model.cache_values * value_bytes), 1))


def threads(neighbours: Neighbours) -> int:
    """The number of threads that OMP_NUM_THREADS asks for, as for every other library, else one for each core that other
    processes leave.

    Native engines keep their number: beside two busy processes on two cores llama.cpp gave 27 tokens/s with one thread
    and 4 with two, OpenVINO 23 and 16.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if neighbours.age < _LOOK_SECONDS:
        time.sleep(_LOOK_SECONDS)
    return threads_beside(neighbours.cores(), computing_threads())


def check_cpu(engine: str, spec: ModelSpec) -> None:
    """Refuse, by name, what a spec asks of the transformers engine."""
    if spec.device not in {"auto", "cpu"}:
        raise UnsupportedError(
            f"The engine '{engine}' runs on the CPU here, not on {spec.device}.", "Use --engine transformers."
        )
    if spec.quantization not in {None, "8bit"}:
        raise UnsupportedError(
            f"The engine '{engine}' has no {spec.quantization} quantization of its own.",
            "Use --quantization 8bit, or name a GGUF file that is quantized already.",
        )


class NativeEngine:
    """An engine whose library runs in workers. Thread-safe; see `calpaca.core.engine.AdapterEngine`.

    `translate` turns a grammar into the library's form, and raises UsageError or UnsupportedError; `prepare` does so with
    an adapter's files, and raises AdapterError or UnsupportedError.
    """

    def __init__(
        self,
        name: str,
        workers: Workers,
        model: NativeModel,
        capabilities: Capabilities,
        *,
        translate: Callable[[Grammar], tuple[str, str]],
        prepare: Callable[[AdapterFiles], AdapterFiles],
    ) -> None:
        self.name = name
        self.workers = workers
        self.template = choose_template(model.tokenizer, model.template)
        self._model = model
        self._capabilities = capabilities
        self._limit = capabilities.context_length or model.context_length
        self._translate = translate
        self._prepare = prepare
        self._eos_ids = frozenset(model.eos_ids)

    @property
    def worker(self) -> Worker:
        """The one that runs the model alone."""
        return self.workers.base

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        return self._model.tokenizer.encode(text, special_tokens=special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        return self._model.tokenizer.decode(token_ids)

    def submit(self, request: Request) -> Handle:
        """Hand a request to the worker; see `Engine.submit`."""
        refuse_unsupported(self.name, self._capabilities, request)
        prompt = self.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)
        sampling = request.sampling
        check_prompt(prompt, self._model.vocabulary_size)
        check_bias(sampling, self._model.vocabulary_size)
        job = Job(
            tuple(prompt), new_tokens(len(prompt), sampling.max_new_tokens, self._limit), sampling,
            self._translate(request.grammar) if request.grammar is not None else None, request.adapter,
        )  # fmt: skip
        return self._hand_over(request, job)

    def _hand_over(self, request: Request, job: Job) -> Handle:
        with self.workers.using(job.adapter) as worker:
            key = worker.new_key()
            answer = Answer(
                request, list(job.prompt), max_new_tokens=job.max_new_tokens, tokenizer=self._model.tokenizer,
                eos_ids=self._eos_ids, release=lambda: worker.cancel(key),
            )  # fmt: skip
            worker.start(key, job, answer)
        return answer.handle

    def load_adapter(self, name: str, path: str | Path, scale: float = 1.0) -> None:
        """Prepare a LoRA adapter from its folder, and start a process that runs it; see `AdapterEngine`.

        Raises UnsupportedError also for one with another vocabulary, ModelError where there is no room for it.
        """
        files = AdapterFiles(name, Path(path), scale)
        self._check_vocabulary(Adapter(files))
        self.workers.load(self._prepare(files))

    def _check_vocabulary(self, adapter: Adapter) -> None:
        own = len(self._model.tokenizer)
        if (adapter.vocabulary or 0) > self._model.vocabulary_size or (adapter.tokenizer_size or 0) > own:
            raise UnsupportedError(
                f"Adapter {adapter.files.name} has {adapter.vocabulary} tokens and the model {own}: it cannot run beside"
                " others.",
                "Merge it with `calpaca models merge`, or load the model with --adapter.",
            )

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way with it go on to their end."""
        self.workers.unload(name)

    def close(self) -> None:
        self.workers.close()


def stored_type(weights: Path) -> str:
    """ggml's name of the type that most of a GGUF file's weights are stored in, such as `F16`."""
    return gguf.read_header(weights).main_type or "unknown"
