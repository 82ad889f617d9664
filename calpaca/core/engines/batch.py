"""The rows under way on one model, and the thread that runs them.

In every turn the thread takes waiting rows in, as long as there is room, runs one step for all of them together, and
lets go of those that are complete, so that no request waits for another's end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from calpaca.core.adapters import own_name
from calpaca.core.engines.decoder import choose_decoder
from calpaca.core.engines.prefix import PrefixCache
from calpaca.core.engines.row import Row
from calpaca.core.engines.schedule import FEWEST, Pace, choose_spans, find_leader, follows
from calpaca.core.engines.slots import SlotCache
from calpaca.core.engines.step import Span, Step
from calpaca.core.engines.threads import ThreadPolicy
from calpaca.core.errors import CalpacaError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from calpaca.core.weights import LoadedWeights

log = logging.getLogger("calpaca")

MAX_ROWS = 64
"""Rows that run at once; more wait."""

SCORED_BYTES = 128 << 20
"""What the logits of prompts that are scored may take in a step."""


class Batch:
    """Takes a loaded model over. `submit`, `change`, `forget_adapter` and `close` are for any thread."""

    def __init__(self, weights: LoadedWeights) -> None:
        from calpaca.core.engines.live_adapters import LiveAdapters  # torch is imported when there is a model to run
        from calpaca.core.engines.packed import least_rows

        model = weights.model
        self._device = model.device
        self._most_scored = max(FEWEST, SCORED_BYTES // (weights.vocabulary_size * model.dtype.itemsize))
        self.cache = SlotCache(weights)
        shapes = {own_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
        like = model.get_input_embeddings().weight
        self.decoder = choose_decoder(model)
        self._least_tokens = least_rows(like)
        self.adapters = LiveAdapters(self.decoder, like, shapes, len(weights.tokenizer))
        self.prefixes = PrefixCache(lambda: self.cache.free_memory)
        self.pace = Pace()
        self.rows: list[Row] = []  # under way, in the order in which they came
        self.waiting: deque[Row] = deque()
        self._changes: deque[tuple[Callable[[], None], Future[None]]] = deque()  # to be made between two turns
        self._threads: ThreadPolicy | None = None  # made by the thread whose it is
        self._changed = threading.Condition()
        self._prepared = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="calpaca-engine", daemon=True)
        self._thread.start()

    # For any thread ------------------------------------------------------------------------------------------------
    def submit(self, row: Row, adapter: str | None) -> None:
        """Queue a row. Raises AdapterError for an unknown adapter, ModelError when the batch is closed."""
        with self._changed:
            self._check_open()
            row.adapter = self.adapters.number(adapter)
            self.waiting.append(row)
            self._changed.notify()

    def change(self, change: Callable[[], None]) -> None:
        """Have a change of the model made between two turns, and wait for it. Raises what it raises."""
        done: Future[None] = Future()
        with self._changed:
            self._check_open()
            self._changes.append((change, done))
            self._changed.notify()
        done.result()

    def forget_adapter(self, name: str) -> None:
        """Take no more rows for an adapter. Raises AdapterError for one that is not loaded."""
        with self._changed:
            self.adapters.forget(name)

    def close(self) -> None:
        """Cancel all rows and end the thread. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    # The thread ----------------------------------------------------------------------------------------------------
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
        """Sleep until there is work; False when the batch is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._prepared or self.waiting or self.rows or self._changes
            )
            return not self._closed

    def _turn(self) -> None:
        """Let cancelled rows go and new ones in, then run one step of all that are under way."""
        if not self._prepared:
            self._prepared = not self.decoder.prepare()
            return
        self._change()
        self._remove_cancelled()
        self._admit()
        self._restore()
        if not self.rows:
            return
        if self._threads is not None:
            self._threads.look()
        begin = time.perf_counter()
        spans = choose_spans(self.rows, self.pace, guesses=self.decoder.slots, most_scored=self._most_scored)
        step = Step(spans, self._device, self._least_tokens)
        self.adapters.select(step)
        logits = self.decoder(step)
        step.finish()
        finished = _advance(step.spans, logits)
        self._note(step.tokens, time.perf_counter() - begin)
        self._keep(finished | {span.row for span in spans if span.chooses and len(span.tokens) > 1 + span.guesses})
        self._drop(finished)

    def _note(self, tokens: int, seconds: float) -> None:
        """Learn from the time that a turn took."""
        self.pace.note(tokens, seconds)
        if self._threads is not None:
            self._threads.note(tokens, seconds)

    def _change(self) -> None:
        """Make the changes that were asked for, and let go of forgotten adapters that no row runs with."""
        while self._changes:
            change, done = self._changes.popleft()
            try:
                change()
            except Exception as error:  # for the one who asked
                done.set_exception(error)
            else:
                done.set_result(None)
        with self._changed:
            self.adapters.remove_unused({row.adapter for row in (*self.rows, *self.waiting)})

    def _admit(self) -> None:
        """Give waiting rows a slot, in their order, while there is room."""
        while len(self.rows) < MAX_ROWS and self.waiting:
            row = self.waiting[0]
            if self.prefixes.bytes:
                self.prefixes.shrink(self.prefixes.bytes - max(0, self.cache.missing(row.most_tokens)))
            try:
                row.place = self.cache.take(row.most_tokens)
            except ModelError as error:
                row.handle.fail(error)
            else:
                if row.place is None:
                    return
                row.leader = find_leader(row, self.rows)
                self.rows.append(row)
            with self._changed:
                self.waiting.popleft()

    def _restore(self) -> None:
        """Give rows that begin as earlier ones did what is kept of those."""
        for row in self.rows if self.decoder.slots else ():
            if row.place is not None and row.place.filled == 0 and not row.scores_prompt and not follows(row):
                row.cached_tokens = self.prefixes.restore(row.ids, row.adapter, row.place)

    def _keep(self, rows: set[Row]) -> None:
        """Keep what was computed for rows, for others that begin the same way."""
        for row in rows if self.decoder.slots else ():
            if row.place is not None:
                self.prefixes.keep(row.ids, row.adapter, row.place)

    def _drop(self, rows: set[Row]) -> None:
        """Free the slots of rows."""
        for row in rows:
            if row.place is not None:
                row.place.shelf.release(row.place)
                row.place = None
        self.rows = [row for row in self.rows if row not in rows]

    def _remove_cancelled(self) -> None:
        with self._changed:
            cancelled = {row for row in self.waiting if row.cancelled}
            self.waiting = deque(row for row in self.waiting if not row.cancelled)
        running = {row for row in self.rows if row.cancelled}
        self._drop(running)
        for row in cancelled | running:
            row.finish("cancelled")

    def _fail(self, error: Exception) -> None:
        """End every row under way with the error, and start afresh."""
        if not isinstance(error, CalpacaError):
            log.debug("the engine failed", exc_info=error)
            error = _translated(error)
        rows, self.rows = self.rows, []
        self.cache.clear()
        for row in rows:
            row.handle.fail(error)  # does nothing to those that ended already

    def _end_all(self) -> None:
        with self._changed:
            rows = [*self.rows, *self.waiting]
            self.waiting.clear()
        self.rows = []
        self.cache.clear()
        for row in rows:
            row.finish("cancelled")
        while self._changes:
            self._changes.popleft()[1].set_exception(_closed())


def _advance(spans: list[Span], logits: Tensor) -> set[Row]:
    """Hand the logits [outputs, vocabulary] of a step out to its rows; those that are complete with them.

    Raises ModelError for numbers that are not finite.
    """
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
        choosing, end = begin + span.scored, begin + span.outputs
        if span.scored:
            span.row.score(logits[begin:choosing])
        if span.chooses and _accept(span, token_ids[choosing:end], logits[choosing:end]):
            finished.add(span.row)
        begin = end
    return finished


def _accept(span: Span, likeliest: list[int], logits: Tensor) -> bool:
    """Take the tokens that follow from logits [1 + guesses, vocabulary], as far as the guesses were right; True when the
    answer is complete."""
    row, guesses = span.row, span.tokens[len(span.tokens) - span.guesses :]
    if row.complete:  # only its prompt was to be scored
        return row.finish("length")
    complete, right = False, 0
    for position, guess in enumerate([*guesses, None]):
        token_id = likeliest[position] if row.takes_likeliest else row.choose(logits[position].float())
        complete = row.accept(token_id, logits[position])
        if complete or token_id != guess:
            break
        right += 1
    if guesses:
        row.lookup.note(len(guesses), right)
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
