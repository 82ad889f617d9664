"""The transformers engine: any model that transformers loads, with adapters, batched between steps.

One worker thread owns the model. Between two steps it takes waiting requests into the running batch, as long as there
is room, and takes finished ones out, so that no request waits for another's end.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from calpaca.core.engine import Capabilities, Handle, Request, refuse_unsupported
from calpaca.core.engines.batch import Batch
from calpaca.core.engines.row import Row
from calpaca.core.errors import CalpacaError, ContextOverflowError, MissingExtraError, ModelError, UsageError
from calpaca.core.files import ModelFiles
from calpaca.core.grammar import KINDS, GrammarCompiler
from calpaca.core.template import NamedTemplate, choose_template

if TYPE_CHECKING:
    from torch import Tensor

    from calpaca.core.runtime import Runtime
    from calpaca.core.weights import LoadedWeights

log = logging.getLogger("calpaca")

MAX_ROWS = 32
"""Requests that run at once; more wait."""

PREFILL_TOKENS = 8192
"""Padded prompt tokens that are run at once."""

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
    """Runs one loaded model. Thread-safe; see `calpaca.core.engine.Engine`."""

    name = "transformers"

    def __init__(self, weights: LoadedWeights, template: NamedTemplate | None = None) -> None:
        self._weights = weights
        self._tokenizer = weights.tokenizer
        self._device = weights.model.device
        self.template = choose_template(weights.tokenizer, template)
        self._eos_ids = frozenset(weights.eos_ids)
        self._grammars = GrammarCompiler(weights.tokenizer, weights.vocabulary_size, list(weights.eos_ids))
        self._waiting: deque[Row] = deque()
        self._starting: list[Row] = []  # taken from the queue, on their way into the batch
        self._changed = threading.Condition()
        self._closed = False
        self._batch = Batch(weights.model, self._device)
        self._max_rows = MAX_ROWS if self._batch.can_join else 1
        self._worker = threading.Thread(target=self._run, name="calpaca-engine", daemon=True)
        self._worker.start()
        atexit.register(self.close)  # a worker inside torch while the interpreter goes down would crash it

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context_length=self._weights.context_length,
            max_logprobs=20,
            grammars=KINDS,
            details={"device": str(self._device), "dtype": str(self._weights.model.dtype).removeprefix("torch.")},
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
        if max(prompt) >= self._weights.vocabulary_size or min(prompt) < 0:
            raise UsageError(
                f"Token id {max(prompt)} is outside the vocabulary of {self._weights.vocabulary_size}.",
                "Use ids of this model's own tokenizer.",
            )
        room = self._new_tokens(len(prompt), request.sampling.max_new_tokens)
        matcher = self._grammars.compile(request.grammar) if request.grammar is not None else None
        row = Row(
            request, prompt, max_new_tokens=room, tokenizer=self._tokenizer, eos_ids=self._eos_ids, matcher=matcher
        )
        with self._changed:
            if self._closed:
                raise ModelError("The engine is closed.", "Load the model again.")
            self._waiting.append(row)
            self._changed.notify()
        return row.handle

    def _new_tokens(self, prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens the answer may have. Raises ContextOverflowError when that does not fit."""
        room = self._weights.context_length - prompt_tokens
        new_tokens = min(DEFAULT_NEW_TOKENS, max(room, 1)) if wanted is None else wanted
        if new_tokens > room:
            raise ContextOverflowError(prompt_tokens, new_tokens, self._weights.context_length)
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
            self._changed.wait_for(lambda: self._closed or self._waiting or self._batch.rows)
            return not self._closed

    def _turn(self) -> None:
        """One step of the running rows, then the first step of new ones."""
        self._remove_cancelled()
        if self._batch.rows:
            self._advance(self._batch.rows, self._batch.step())
        for rows in self._next_rows():
            self._advance(rows, self._batch.admit(rows))

    def _advance(self, rows: list[Row], logits: Tensor) -> None:
        """Choose and hand out the next token of each row, and drop the rows that are complete."""
        import torch

        likeliest = logits.argmax(dim=-1).tolist()
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(
                "The model produced numbers that are not finite (inf or nan).",
                "Its weights may be damaged, or it overflows: try --dtype float32 or bfloat16.",
            )
        finished = set()
        for position, row in enumerate(list(rows)):
            token_id = likeliest[position] if row.takes_likeliest else row.choose(logits[position])
            if row.accept(token_id, logits[position]):
                finished.add(row)
        self._batch.drop(finished)

    def _next_rows(self) -> list[list[Row]]:
        """Waiting rows that there is room for, in groups whose padded prompts are run together."""
        with self._changed:
            room = min(self._max_rows - len(self._batch.rows), len(self._waiting))
            self._starting = [self._waiting.popleft() for _ in range(room)]
        groups: list[list[Row]] = []
        for row in sorted(self._starting, key=lambda row: len(row.ids)):
            if groups and (len(groups[-1]) + 1) * len(row.ids) <= PREFILL_TOKENS:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _remove_cancelled(self) -> None:
        with self._changed:
            cancelled = [row for row in self._waiting if row.cancelled]
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
        running = {row for row in self._batch.rows if row.cancelled}
        self._batch.drop(running)
        for row in (*cancelled, *running):
            row.finish("cancelled")

    def _fail(self, error: Exception) -> None:
        """End every running row with the error, and start afresh."""
        if not isinstance(error, CalpacaError):
            log.debug("the engine failed", exc_info=error)
            error = _translated(error)
        rows = [*self._batch.rows, *self._starting]
        self._batch.clear()
        for row in rows:
            row.handle.fail(error)  # does nothing to those that ended already

    def _end_all(self) -> None:
        with self._changed:
            rows = [*self._batch.rows, *self._waiting]
            self._waiting.clear()
        self._batch.clear()
        for row in rows:
            row.finish("cancelled")


def _translated(error: Exception) -> ModelError:
    """A library's exception as one a person can act on."""
    reason = str(error).split("\n", maxsplit=1)[0]
    if "memory" in reason.lower():
        return ModelError(
            f"There is not enough memory: {reason}", "Use --dtype bfloat16, a shorter prompt or a smaller model."
        )
    return ModelError(f"The model failed: {reason or type(error).__name__}", "Set CALPACA_DEBUG=1 to see where.")
