"""One request inside a running batch: its tokens so far, how its next one is chosen, and what its reader gets."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from calpaca.core.detokenizer import Detokenizer, StopScanner, held_back
from calpaca.core.engine import Chunk, FinishReason, Handle, Request, Timings, TokenLogprob, Usage
from calpaca.core.engines.lookup import PromptLookup
from calpaca.core.engines.slots import Place
from calpaca.core.grammar import GrammarMatcher
from calpaca.core.sampling import LogitsProcessor, new_generator, sample, score
from calpaca.core.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Row:
    """State of one request. `cancel` is for any thread, everything else for the one that runs the batch."""

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        *,
        max_new_tokens: int,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        matcher: GrammarMatcher | None,
    ) -> None:
        self.ids = list(prompt)
        self.adapter = 0  # its number among the live ones
        self.place: Place | None = None  # the slot with what is kept of `ids`
        self.leader: Row | None = None  # a row with the same beginning, whose prompt runs first
        self.cached_tokens = 0
        self.lookup = PromptLookup()
        self.handle = Handle(self.cancel)
        self._sampling = request.sampling
        self._processor = LogitsProcessor(request.sampling, len(prompt))
        self.scores_prompt = request.prompt_logprobs is not None  # then the model must see all of it
        self._alternatives = request.prompt_logprobs or 0
        self._scores: list[TokenLogprob | None] = [None] if self.scores_prompt else []  # as far as they are known
        self._prompt_tokens = len(prompt)
        self._max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._matcher = matcher
        self._detokenizer = Detokenizer(tokenizer, () if request.new_text else prompt)
        self._scanner = StopScanner(request.sampling.stop)
        self._pending: list[int] = []
        self._pending_logprobs: list[TokenLogprob] = []
        self._submitted = time.perf_counter()
        self._first_token: float | None = None
        self._cancelled = threading.Event()
        self._generator: torch.Generator | None = None

    @property
    def most_tokens(self) -> int:
        """How long prompt and answer together can get."""
        return self._prompt_tokens + self._max_new_tokens

    @property
    def pending(self) -> int:
        """How many of `ids` the model has not seen."""
        assert self.place is not None
        return len(self.ids) - self.place.filled

    def draft(self, free: int) -> list[int]:
        """Guesses for the tokens after the next one; see `PromptLookup`."""
        return self.lookup.draft(self.ids, free, self.most_tokens - len(self.ids) - 1)

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is simply the one with the highest logit, which a batch can find for all rows."""
        sampling = self._sampling
        return self._matcher is None and sampling.temperature == 0.0 and not self._processor.active

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits [vocabulary] (float32)."""
        import torch

        logits = self._processor(logits, self.ids)
        if self._matcher is not None:
            allowed = torch.from_numpy(self._matcher.allowed()).to(logits.device)
            logits = logits.masked_fill(~allowed, float("-inf"))
        if self._sampling.temperature == 0.0:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = new_generator(self._sampling.seed, logits.device)
        return sample(logits, self._sampling, self._generator)

    def score(self, logits: Tensor) -> None:
        """Take the logits [tokens, vocabulary] that the next unscored tokens of the prompt have."""
        begin = len(self._scores)
        expected = self.ids[begin : begin + len(logits)]
        self._scores += score(logits, expected, self._alternatives, self._tokenizer)

    @property
    def complete(self) -> bool:
        """Whether nothing more is to be generated."""
        return len(self.ids) >= self.most_tokens

    def accept(self, token_id: int, logits: Tensor) -> bool:
        """Take the chosen token and give its text to the reader; True when the answer is complete."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        self.ids.append(token_id)
        self._pending.append(token_id)
        if self._sampling.logprobs is not None:
            self._pending_logprobs += score(logits[None], [token_id], self._sampling.logprobs, self._tokenizer)
        if token_id in self._eos_ids:
            return self.finish("stop")
        if self._matcher is not None:
            self._matcher.accept(token_id)
        text = self._scanner.add(self._detokenizer.add(token_id))
        if self._scanner.matched is not None or (self._matcher is not None and self._matcher.finished):
            return self.finish("stop", text)
        if self.complete:
            return self.finish("length", text)
        if text:
            self.handle.put(Chunk(text, *self._take_pending(), prompt_logprobs=self._take_scores()))
        return False

    def finish(self, reason: FinishReason, text: str = "") -> bool:
        """End the answer; what was held back is given out unless a stop text ended it."""
        text += held_back(self._detokenizer, self._scanner)
        if self._scanner.matched is not None and reason == "length":
            reason = "stop"
        now = time.perf_counter()
        self.handle.put(
            Chunk(
                text,
                *self._take_pending(),
                finish_reason=reason,
                stop=self._scanner.matched,
                usage=Usage(self._prompt_tokens, len(self.ids) - self._prompt_tokens, self.cached_tokens),
                timings=Timings((self._first_token or now) - self._submitted, now - self._submitted),
                prompt_logprobs=self._take_scores(),
            )
        )
        return True

    def _take_pending(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        taken = (tuple(self._pending), tuple(self._pending_logprobs))
        self._pending, self._pending_logprobs = [], []
        return taken

    def _take_scores(self) -> tuple[TokenLogprob | None, ...]:
        """The prompt's log probabilities, once, for the first chunk; none where the row ends before they are known."""
        if len(self._scores) < self._prompt_tokens:
            return ()
        taken, self._scores = tuple(self._scores), []
        return taken
