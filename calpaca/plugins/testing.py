"""The test kit for plugin authors: an engine that answers from a script, and a model and runtime on top of it.

from calpaca.testing import fake_runtime

runtime = fake_runtime(["The llama is a camelid."])
assert runtime.model().generate("What is a llama?").result().text == "The llama is a camelid."
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from calpaca.core.engine import (
    Capabilities,
    Chunk,
    FinishReason,
    Grammar,
    Handle,
    Request,
    Sampling,
    Timings,
    TokenLogprob,
    Usage,
    refuse_unsupported,
)
from calpaca.core.engines.limits import check_bias
from calpaca.core.errors import ContextOverflowError, ModelError, UsageError
from calpaca.core.model import Model
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings, read_settings
from calpaca.core.spec import ModelSpec
from calpaca.core.template import NAMED_TEMPLATES, ChatTemplate
from calpaca.plugins.wiring import build_runtime

if TYPE_CHECKING:
    from calpaca.core.embedding import Embedder

Answers = Iterable[str | Exception] | Callable[[str], str | Exception]

# Token ids are the bytes of UTF-8, so that a Chinese character takes three tokens; the numbers of the vocabulary and of
# the end-of-sequence token are those of llguidance's byte tokenizer.
_VOCABULARY = 262
_EOS = 261
_ALPHABET = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
_CLOSING = np.array([*b'"}]'])
_WHITESPACE = np.array([*b" \n\r\t"])
_UNLIKELY = -40.0
_SCRIPTED = 100.0


class FakeEngine:
    """An Engine without weights.

    `answers` is the script: texts given in turn and then over again, or a function of the prompt's text; an exception
    among them is what the request ends with. Without a script the engine babbles: a fixed pseudo-random distribution
    of tokens that depends on the prompt, so that sampling, seeds and log probabilities mean something. An answer that
    the request's grammar forbids is replaced by the shortest text that the grammar allows.

    Answers are streamed by word or by character, `delay` seconds apart. `requests` and `prompts` record what was asked,
    `running` counts the requests under way and `peak` the most there were at once.
    """

    name = "fake"
    template = ChatTemplate(
        NAMED_TEMPLATES["chatml"].source, {"bos_token": "", "eos_token": "<|im_end|>"}, NAMED_TEMPLATES["chatml"].stop
    )

    def __init__(
        self,
        answers: Answers | None = None,
        *,
        by: Literal["word", "character"] = "word",
        delay: float = 0.0,
        context_length: int = 32_768,
        slots: int = 8,
    ) -> None:
        self.requests: list[Request] = []
        self.prompts: list[str] = []
        self.running = 0
        self.peak = 0
        self._script = _script(answers)
        self._piece = re.compile(r"\s*(?:\w+|.)" if by == "word" else ".", re.ASCII | re.DOTALL)
        self._delay = delay
        self._context_length = context_length
        self._lock = threading.Lock()
        self._slots = ThreadPoolExecutor(slots, thread_name_prefix="fake-engine")
        self._closed = threading.Event()

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context_length=self._context_length,
            max_logprobs=20,
            prompt_logprobs=True,
            grammars=frozenset({"json_schema", "regex", "lark"}),
        )

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:  # noqa: ARG002  # it has none
        return list("".join(text).encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def submit(self, request: Request) -> Handle:
        if self._closed.is_set():
            raise ModelError("The fake engine is closed.", "Make another one.")
        refuse_unsupported(self.name, self.capabilities(), request)
        check_bias(request.sampling, _VOCABULARY)
        ids = self.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)
        room = _room(len(ids), request.sampling.max_new_tokens, self._context_length)
        matcher = _matcher(request.grammar) if request.grammar is not None else None
        prompt = self.decode(ids)
        cancelled = threading.Event()
        with self._lock:
            self.requests.append(request)
            self.prompts.append(prompt)
            answer = self._script(prompt)
            self.running += 1
            self.peak = max(self.peak, self.running)
        work = _Work(request, ids, room, answer, matcher, Handle(cancelled.set), cancelled)
        self._slots.submit(self._run, work)
        return work.handle

    def close(self) -> None:
        self._closed.set()
        self._slots.shutdown(wait=False)

    def _run(self, work: _Work) -> None:
        try:
            for chunk in self._chunks(work):
                if chunk.finish_reason is not None:
                    self._leave()
                work.handle.put(chunk)
        except Exception as error:  # whatever the script says; the reader gets it
            self._leave()
            work.handle.fail(error)

    def _leave(self) -> None:
        with self._lock:
            self.running -= 1

    def _chunks(self, work: _Work) -> Iterator[Chunk]:
        """The whole answer is known before its first piece is given out, so a stop text cannot leak."""
        tokens, finish = work.tokens()
        text = bytes(tokens).decode(errors="ignore")
        cut, stop = _first_stop(text, work.sampling.stop)
        if stop is not None:
            text, finish = text[:cut], "stop"
        used, given = len(tokens), 0
        for piece in self._piece.findall(text):
            if work.cancelled.wait(self._delay) or self._closed.is_set():
                finish, stop, used = "cancelled", None, given
                break
            part = tuple(tokens[given : given + len(piece.encode())])
            yield Chunk(piece, part, work.logprobs(part, given), prompt_logprobs=work.prompt_logprobs(given))
            given += len(part)
        rest = () if stop is not None or finish == "cancelled" else tuple(tokens[given:])
        seconds = time.monotonic() - work.started
        yield Chunk(
            "", rest, work.logprobs(rest, given), finish, stop, Usage(len(work.prompt), used), Timings(seconds, seconds),
            work.prompt_logprobs(given),
        )  # fmt: skip


@dataclass
class _Work:
    """One request in hand, and the tokens that answer it."""

    request: Request
    prompt: list[int]
    room: int | None
    answer: str | Exception | None
    matcher: Any
    handle: Handle
    cancelled: threading.Event
    started: float = field(default_factory=time.monotonic)

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    def tokens(self) -> tuple[list[int], FinishReason]:
        """The answer before stop texts are applied, without the end-of-sequence token."""
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None or not self._allowed(self.answer):
            return self._babble()
        tokens = list(self.answer.encode())
        if self.room is not None and len(tokens) >= self.room:
            return tokens[: self.room], "length"
        return tokens, "stop"

    def _allowed(self, text: str) -> bool:
        if self.matcher is None:
            return True
        tokens = list(text.encode())
        fits = self.matcher.try_consume_tokens(tokens) == len(tokens) and self.matcher.is_accepting()
        self.matcher.reset()
        return bool(fits)

    def _babble(self) -> tuple[list[int], FinishReason]:
        random = np.random.default_rng(self.sampling.seed)
        tokens: list[int] = []
        while len(tokens) < (512 if self.room is None else self.room):
            logits = _logits(self.prompt, len(tokens))
            if self.matcher is not None:
                logits[_CLOSING], logits[_EOS], logits[_WHITESPACE] = 20.0, 21.0, 2 * _UNLIKELY
                allowed = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
                logits[np.unpackbits(allowed, bitorder="little")[:_VOCABULARY] == 0] = -np.inf
            token = _choose(logits, self.sampling, tokens, random)
            if token == _EOS:
                return tokens, "stop"
            tokens.append(token)
            if self.matcher is not None:
                self.matcher.consume_token(token)
        return tokens, "length"

    def logprobs(self, tokens: Sequence[int], start: int) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the tokens from position `start` on, if the request asks for them."""
        if self.sampling.logprobs is None:
            return ()
        return tuple(self._logprob(token, start + index) for index, token in enumerate(tokens))

    def _logprob(self, token: int, position: int) -> TokenLogprob:
        logits = _logits(self.prompt, position)
        if self.answer is not None:
            logits[token] += _SCRIPTED
        return _logprob(logits, token, self.sampling.logprobs or 0)

    def prompt_logprobs(self, given: int) -> tuple[TokenLogprob | None, ...]:
        """Those of the prompt's tokens, with the first chunk, before which nothing was `given`. Every token has the
        probability that it would have as the first of an answer."""
        count = self.request.prompt_logprobs
        if count is None or given:
            return ()
        scored = (
            _logprob(_logits(self.prompt[:end], 0), self.prompt[end], count) for end in range(1, len(self.prompt))
        )
        return (None, *scored)


def _logits(prompt: list[int], position: int) -> NDArray[np.float64]:
    """[vocabulary] for the token at a position of the answer; the end grows likelier with every token."""
    random = np.random.default_rng((zlib.crc32(bytes(prompt)), position))
    logits = np.full(_VOCABULARY, _UNLIKELY)
    logits[_ALPHABET] = random.normal(0.0, 2.0, len(_ALPHABET))
    logits[_EOS] = 0.05 * position - 4.0
    return logits


def _logprob(logits: NDArray[np.float64], token: int, alternatives: int) -> TokenLogprob:
    logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    likeliest = np.argsort(-logs, kind="stable")[:alternatives]
    top = tuple((int(other), _byte_text(int(other)), float(logs[other])) for other in likeliest)
    return TokenLogprob(token, _byte_text(token), float(logs[token]), top)


def _byte_text(token: int) -> str:
    return bytes([token]).decode(errors="replace") if token < 256 else ""


def _script(answers: Answers | None) -> Callable[[str], str | Exception | None]:
    """The script as a function of the prompt."""
    if answers is None:
        return lambda _: None
    if callable(answers):
        return answers
    given = [answers] if isinstance(answers, str) else list(answers)
    turns = itertools.cycle(given)
    return lambda _: next(turns)


def _room(prompt: int, wanted: int | None, context_length: int) -> int | None:
    """How many tokens may follow; None is all that the script has. Raises ContextOverflowError."""
    least = 1 if wanted is None else wanted
    if prompt + least > context_length:
        raise ContextOverflowError(prompt, least, context_length)
    return wanted


def _matcher(grammar: Grammar) -> Any:
    """llguidance's matcher over bytes. Raises UsageError for a grammar that it cannot read."""
    import llguidance

    text = grammar.value if isinstance(grammar.value, str) else json.dumps(grammar.value)
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), llguidance.grammar_from(grammar.kind, text), log_level=0
    )
    if matcher.is_error():
        raise UsageError(f"The {grammar.kind} grammar cannot be used: {matcher.get_error()}.", "Simplify it.")
    return matcher


def _choose(logits: NDArray[np.float64], sampling: Sampling, before: list[int], random: np.random.Generator) -> int:
    """The next token."""
    for token, value in sampling.logit_bias:
        logits[token] += value
    seen, counts = np.unique(np.array(before, dtype=int), return_counts=True)
    penalty = sampling.repetition_penalty
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    logits[seen] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    order = np.argsort(-logits, kind="stable")
    if sampling.temperature == 0:
        return int(order[0])
    order = order[: sampling.top_k or None]
    scaled = np.exp((logits[order] - logits[order[0]]) / sampling.temperature)
    probabilities = scaled / scaled.sum()
    likely = int((probabilities >= sampling.min_p * probabilities[0]).sum())
    kept = min(int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1, likely)
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(random.choice(order[:kept], p=probabilities))


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """Where the first stop text begins, and which it is."""
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    return min(found) if found else (len(text), None)


class FakeEmbedder:
    """An Embedder without weights: hashed counts of characters' pairs, so that texts which share words are near."""

    name = "fake"
    max_tokens = 512
    batch_size = 64

    def __init__(self, dimensions: int = 64) -> None:
        self.dimensions = dimensions
        self.texts: list[str] = []

    @property
    def fingerprint(self) -> str:
        return f"fake-{self.dimensions}"

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts.extend(texts)
        return (
            np.stack([self.embed_query(text) for text in texts])
            if texts
            else np.zeros((0, self.dimensions), np.float32)
        )

    def embed_query(self, text: str) -> NDArray[np.float32]:
        vector = np.full(self.dimensions, 1e-3, np.float32)
        for first, second in itertools.pairwise(f" {text.lower()} "):
            vector[zlib.crc32((first + second).encode()) % self.dimensions] += 1.0
        return vector / np.float32(np.linalg.norm(vector))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


class FakeRuntime(Runtime):
    """A runtime whose every model is `fake` and whose every embedding model is `fake_embedder`."""

    def __init__(self, model: Model, embedder: Embedder, settings: Settings) -> None:
        super().__init__(settings)
        self.fake = model
        self.fake_embedder = embedder

    def check(self, model: ModelSpec | str | None = None) -> ModelSpec:
        return self.spec(model)

    def check_embedding(self, name: str) -> None:
        """Any name will do."""

    def model(self, model: ModelSpec | str | None = None) -> Model:  # noqa: ARG002
        return self.fake

    def loaded(self, model: ModelSpec | str | None = None) -> Model | None:  # noqa: ARG002
        return self.fake

    def embedder(self, name: str | None = None) -> Embedder:  # noqa: ARG002
        return self.fake_embedder


def fake_model(answers: Answers | None = None, **options: Any) -> Model:
    """A model on a `FakeEngine`, which `options` are passed to."""
    engine = FakeEngine(answers, **options)
    return Model("fake", ModelSpec(model="fake"), engine, engine.template)


def fake_runtime(
    answers: Answers | None = None,
    *,
    embedder: Embedder | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> FakeRuntime:
    """A runtime with the installed plugins that answers from a script; `options` are passed to the `FakeEngine`."""
    fake = FakeRuntime(fake_model(answers, **options), embedder or FakeEmbedder(), settings or read_settings())
    built = build_runtime(fake.settings)
    for registry in ("engines", "sources", "loaders", "stores", "apps", "plugins"):
        setattr(fake, registry, getattr(built, registry))
    return fake
