"""The transformers engine: any model that transformers loads, with adapters, batched between steps.

One worker thread owns the model. In every turn it takes waiting requests in, as long as there is room, runs one step
for all of them together, and lets go of those that are complete, so that no request waits for another's end.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from calpaca.core.adapters import Adapter, own_name
from calpaca.core.engine import Capabilities, Handle, Request, refuse_unsupported
from calpaca.core.engines.decoder import choose_decoder
from calpaca.core.engines.prefix import PrefixCache
from calpaca.core.engines.rope import usable_context
from calpaca.core.engines.row import Row
from calpaca.core.engines.schedule import Pace, choose_spans, find_leader, follows
from calpaca.core.engines.slots import SlotCache
from calpaca.core.engines.step import Span, Step
from calpaca.core.engines.threads import ThreadPolicy
from calpaca.core.errors import CalpacaError, ContextOverflowError, MissingExtraError, ModelError, UsageError
from calpaca.core.files import AdapterFiles, ModelFiles
from calpaca.core.grammar import KINDS, GrammarCompiler
from calpaca.core.template import NamedTemplate, choose_template

if TYPE_CHECKING:
    from torch import Tensor

    from calpaca.core.runtime import Runtime
    from calpaca.core.weights import LoadedWeights

log = logging.getLogger("calpaca")

MAX_ROWS = 64
"""Requests that run at once; more wait."""

DEFAULT_NEW_TOKENS = 512


def open_engine(files: ModelFiles, runtime: Runtime) -> TransformersEngine:  # noqa: ARG001  # the registry's signature
    """Load the weights and start the engine. Raises ModelError."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError("The engine 'transformers'", "torch", error.name or "torch") from error
    del torch, transformers
    from calpaca.core.weights import load_weights

    return TransformersEngine(load_weights(files), files.template)


class TransformersEngine:
    """Runs one loaded model, which it takes over. Thread-safe; see `calpaca.core.engine.Engine`."""

    name = "transformers"

    def __init__(self, weights: LoadedWeights, template: NamedTemplate | None = None) -> None:
        from calpaca.core.engines.live_adapters import LiveAdapters  # torch is imported when there is a model to run

        self._tokenizer = weights.tokenizer
        self._vocabulary_size = weights.vocabulary_size
        self._context_length = usable_context(weights.model.config.get_text_config(), weights.context_length)
        self._device = weights.model.device
        self._dtype = weights.model.dtype
        self.template = choose_template(weights.tokenizer, template)
        self._eos_ids = frozenset(weights.eos_ids)
        self._grammars = GrammarCompiler(weights.tokenizer, weights.vocabulary_size, list(weights.eos_ids))
        self._cache = SlotCache(weights)
        shapes = {own_name(name): tuple(parameter.shape) for name, parameter in weights.model.named_parameters()}
        like = weights.model.get_input_embeddings().weight
        self._decoder = choose_decoder(weights.model)
        self._adapters = LiveAdapters(self._decoder, like, shapes, len(weights.tokenizer))
        self._changes: deque[tuple[Callable[[], None], Future[None]]] = deque()  # to be made between two turns
        self._prefixes = PrefixCache(lambda: self._cache.free_memory)
        self._pace = Pace()
        self._threads: ThreadPolicy | None = None  # made by the worker, whose threads they are
        self._rows: list[Row] = []  # under way, in the order in which they came
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._run, name="calpaca-engine", daemon=True)
        self._worker.start()
        atexit.register(self.close)  # a worker inside torch while the interpreter goes down would crash it

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context_length=self._context_length,
            max_logprobs=20,
            grammars=KINDS,
            adapters=self._decoder.slots,
            unsupported=frozenset({"min_p", "frequency_penalty", "presence_penalty", "logit_bias"}),
            details={"device": str(self._device), "dtype": str(self._dtype).removeprefix("torch.")},
        )

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(text, special_tokens=special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def submit(self, request: Request) -> Handle:
        """Queue a request; see `Engine.submit`."""
        refuse_unsupported(self.name, self.capabilities(), request)
        prompt = self.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)
        if not prompt:
            raise UsageError("The prompt is empty.", "Give at least one token of text.")
        if max(prompt) >= self._vocabulary_size or min(prompt) < 0:
            raise UsageError(
                f"Token id {max(prompt)} is outside the vocabulary of {self._vocabulary_size}.",
                "Use ids of this model's own tokenizer.",
            )
        room = self._new_tokens(len(prompt), request.sampling.max_new_tokens)
        matcher = self._grammars.compile(request.grammar) if request.grammar is not None else None
        with self._changed:
            self._check_open()
            row = Row(
                request, prompt, adapter=self._adapters.number(request.adapter), max_new_tokens=room,
                tokenizer=self._tokenizer, eos_ids=self._eos_ids, matcher=matcher,
            )  # fmt: skip
            self._waiting.append(row)
            self._changed.notify()
        return row.handle

    def load_adapter(self, name: str, path: str | Path, scale: float = 1.0) -> None:
        """Load a LoRA adapter from its folder, for requests that name it; see `AdapterEngine`."""
        factors = self._adapters.read(Adapter(AdapterFiles(name, Path(path), scale)))
        self._between_turns(lambda: self._adapters.load(name, factors))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way with it go on to their end."""
        with self._changed:
            self._adapters.forget(name)

    def _between_turns(self, change: Callable[[], None]) -> None:
        """Let the worker make a change of the model, and wait for it."""
        done: Future[None] = Future()
        with self._changed:
            self._check_open()
            self._changes.append((change, done))
            self._changed.notify()
        done.result()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def _new_tokens(self, prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens the answer may have. Raises ContextOverflowError when that does not fit."""
        room = self._context_length - prompt_tokens
        new_tokens = min(DEFAULT_NEW_TOKENS, max(room, 1)) if wanted is None else wanted
        if new_tokens > room:
            raise ContextOverflowError(prompt_tokens, new_tokens, self._context_length)
        return new_tokens

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join()
        atexit.unregister(self.close)

    # The worker ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        import torch

        self._threads = ThreadPolicy() if self._device.type == "cpu" else None
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # whatever went wrong, the readers must learn of it
                    self._fail(error)
        self._end_all()

    def _wait(self) -> bool:
        """Sleep until there is work; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._rows or self._changes)
            return not self._closed

    def _turn(self) -> None:
        """Let cancelled rows go and new ones in, then run one step of all that are under way."""
        self._change()
        self._remove_cancelled()
        self._admit()
        self._restore()
        if not self._rows:
            return
        if self._threads is not None:
            self._threads.look()
        begin = time.perf_counter()
        step = Step(choose_spans(self._rows, self._pace, guesses=self._decoder.slots), self._device)
        self._adapters.select(step)
        logits = self._decoder(step)
        step.finish()
        finished = self._advance(step.spans, logits)
        self._note(len(step.ids), time.perf_counter() - begin)
        self._keep(finished | {span.row for span in step.spans if 0 < span.outputs < len(span.tokens)})
        self._drop(finished)

    def _note(self, tokens: int, seconds: float) -> None:
        """Learn from the time that a turn took."""
        self._pace.note(tokens, seconds)
        if self._threads is not None:
            self._threads.note(tokens, seconds)

    def _change(self) -> None:
        """Load the adapters that were asked for, and let go of forgotten ones that no row runs with."""
        while self._changes:
            change, done = self._changes.popleft()
            try:
                change()
            except Exception as error:  # for the one who asked
                done.set_exception(error)
            else:
                done.set_result(None)
        with self._changed:
            self._adapters.remove_unused({row.adapter for row in (*self._rows, *self._waiting)})

    def _advance(self, spans: list[Span], logits: Tensor) -> set[Row]:
        """Choose and hand out the next tokens of each row that has logits; the rows that are complete with them."""
        import torch

        highest, likeliest = logits.max(dim=-1)
        if not bool(torch.isfinite(highest).all()):
            raise ModelError(
                "The model produced numbers that are not finite (inf or nan).",
                "Its weights may be damaged, or it overflows: try --dtype float32 or bfloat16.",
            )
        finished = set()
        token_ids = likeliest.tolist()
        begin = 0
        for span in spans:
            end = begin + span.outputs
            if span.outputs and _accept(span, token_ids[begin:end], logits[begin:end]):
                finished.add(span.row)
            begin = end
        return finished

    def _admit(self) -> None:
        """Give waiting rows a slot, in their order, while there is room."""
        while len(self._rows) < MAX_ROWS and self._waiting:
            row = self._waiting[0]
            if self._prefixes.bytes:
                self._prefixes.shrink(self._prefixes.bytes - max(0, self._cache.missing(row.most_tokens)))
            try:
                row.place = self._cache.take(row.most_tokens)
            except ModelError as error:
                row.handle.fail(error)
            else:
                if row.place is None:
                    return
                row.leader = find_leader(row, self._rows)
                self._rows.append(row)
            with self._changed:
                self._waiting.popleft()

    def _restore(self) -> None:
        """Give rows that begin as earlier ones did what is kept of those."""
        for row in self._rows if self._decoder.slots else ():
            if row.place is not None and row.place.filled == 0 and not follows(row):
                row.cached_tokens = self._prefixes.restore(row.ids, row.adapter, row.place)

    def _keep(self, rows: set[Row]) -> None:
        """Keep what was computed for rows, for others that begin the same way."""
        for row in rows if self._decoder.slots else ():
            if row.place is not None:
                self._prefixes.keep(row.ids, row.adapter, row.place)

    def _drop(self, rows: set[Row]) -> None:
        """Free the slots of rows."""
        for row in rows:
            if row.place is not None:
                row.place.shelf.release(row.place)
                row.place = None
        self._rows = [row for row in self._rows if row not in rows]

    def _remove_cancelled(self) -> None:
        with self._changed:
            cancelled = {row for row in self._waiting if row.cancelled}
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
        running = {row for row in self._rows if row.cancelled}
        self._drop(running)
        for row in cancelled | running:
            row.finish("cancelled")

    def _fail(self, error: Exception) -> None:
        """End every row under way with the error, and start afresh."""
        if not isinstance(error, CalpacaError):
            log.debug("the engine failed", exc_info=error)
            error = _translated(error)
        rows, self._rows = self._rows, []
        self._cache.clear()
        for row in rows:
            row.handle.fail(error)  # does nothing to those that ended already

    def _end_all(self) -> None:
        with self._changed:
            rows = [*self._rows, *self._waiting]
            self._waiting.clear()
        self._rows = []
        self._cache.clear()
        for row in rows:
            row.finish("cancelled")
        while self._changes:
            self._changes.popleft()[1].set_exception(_closed())


def _accept(span: Span, likeliest: list[int], logits: Tensor) -> bool:
    """Take the tokens that follow from a span's logits [outputs, vocabulary], as far as its guesses were right; True
    when the answer is complete."""
    row, guesses = span.row, list(span.tokens[len(span.tokens) - span.outputs + 1 :])
    complete, right = False, 0
    for position, guess in enumerate([*guesses, None]):
        token_id = likeliest[position] if row.takes_likeliest else row.choose(logits[position].float())
        complete = row.accept(token_id, logits[position])
        if complete or token_id != guess:
            break
        right += 1
    if guesses:
        row.lookup.note(len(guesses), right, len(row.ids))
        span.place.filled = min(span.place.filled, len(row.ids) - 1)  # what stands behind was guessed wrong
    return complete


def _closed() -> ModelError:
    return ModelError("The engine is closed.", "Load the model again.")


def _translated(error: Exception) -> ModelError:
    """A library's exception as one a person can act on."""
    reason = str(error).split("\n", maxsplit=1)[0]
    if "memory" in reason.lower():
        return ModelError(
            f"There is not enough memory: {reason}", "Use --dtype bfloat16, a shorter prompt or a smaller model."
        )
    return ModelError(f"The model failed: {reason or type(error).__name__}", "Set CALPACA_DEBUG=1 to see where.")
