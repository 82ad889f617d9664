"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from calpaca.core.engine import Grammar, Handle, Sampling, TokenLogprob, Usage
from calpaca.core.errors import UsageError
from calpaca.core.model import Model
from calpaca.core.tools import answer_grammar
from calpaca_openai_api.bodies import MOST_CHOICES, CompletionBody
from calpaca_openai_api.faults import ApiError, unsupported
from calpaca_openai_api.generation import Piece, generated, total_usage
from calpaca_openai_api.sampling import (
    Defaults,
    for_choice,
    refuse_fields,
    refuse_what_the_engine_cannot,
    structured_grammar,
)
from calpaca_openai_api.tokens import TokenReader, completion_logprobs, prompt_pieces, prompt_tokens, shown_pieces
from calpaca_openai_api.wire import Envelope, usage_fields

DEFAULT_TOKENS = 16
"""Longest answer of a request that does not say, as OpenAI documents it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine gets it: its tokens, or its text where the engine does not take tokens. `pieces` are what
    each token stands for in the text, where they are to be scored."""

    text: str
    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()

    @property
    def for_engine(self) -> str | tuple[int, ...]:
        return self.ids or self.text


@dataclass(frozen=True)
class CompletionPlan:
    """A completion request, ready to be started. `candidates` answers are made to each prompt, the likeliest are given."""

    body: CompletionBody
    model: Model
    prompts: list[Prompt]
    sampling: Sampling | None
    grammar: Grammar | None

    @property
    def candidates(self) -> int:
        return max(self.body.best_of or 1, self.body.choices)

    @property
    def prompt_logprobs(self) -> int | None:
        """Alternatives beside each token of the prompt; None where the prompt is not scored."""
        return self.body.logprobs if self.body.scores_prompt else None

    def start(self) -> list[Handle]:
        """Ask the engine for every candidate, those of the first prompt first."""
        assert self.sampling is not None
        return [
            self.model.generate(
                prompt.for_engine,
                for_choice(self.sampling, candidate),
                grammar=self.grammar,
                prompt_logprobs=self.prompt_logprobs,
            )
            for prompt in self.prompts
            for candidate in range(self.candidates)
        ]

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answers as they come; with `best_of`, when all are there."""
        if self.sampling is None:
            for index, prompt in enumerate(self.prompts):
                for choice in range(self.body.choices):
                    yield Piece(index * self.body.choices + choice, finish="length", usage=Usage(len(prompt.ids)))
            return
        many = self.candidates > self.body.choices
        async with aclosing(self._best() if many else self._all()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    async def _all(self) -> AsyncIterator[Piece]:
        assert self.sampling is not None
        wanted, engine = self.sampling.logprobs is not None, self.model.engine
        prompts = [prompt for prompt in self.prompts for _ in range(self.candidates)]
        # The token that ends an answer is listed too: lm-eval counts on one token more than its prompt.
        readers = [TokenReader(engine, prompt.ids, with_end=True) if wanted else None for prompt in prompts]
        async with aclosing(generated(self.start)) as chunks:  # type: ignore[type-var]
            async for index, chunk in chunks:
                reader, prompt = readers[index], prompts[index]
                scores = chunk.prompt_logprobs
                yield Piece(
                    index,
                    chunk.text,
                    tuple(reader.read(chunk)) if reader is not None else (),
                    chunk.token_ids,
                    finish=chunk.finish_reason,
                    stop=chunk.stop,
                    usage=chunk.usage,
                    prompt=prompt_tokens(_pieces(prompt, scores), prompt.ids, scores, engine) if scores else (),
                )

    async def _best(self) -> AsyncIterator[Piece]:
        """The likeliest candidates of each prompt, by the mean log probability of their tokens."""
        found: dict[int, list[Piece]] = {}
        async for piece in self._all():
            found.setdefault(piece.index, []).append(piece)
        answers = [_joined(found[index]) for index in sorted(found)]
        for prompt in range(len(self.prompts)):
            own = answers[prompt * self.candidates : (prompt + 1) * self.candidates]
            spent = total_usage([answer.usage for answer in own if answer.usage is not None])
            ranked = sorted(own, key=_likelihood, reverse=True)[: self.body.choices]
            for rank, answer in enumerate(ranked):
                usage = spent if rank == 0 else Usage(spent.prompt_tokens)  # all candidates count, once
                yield replace(answer, index=prompt * self.body.choices + rank, usage=usage)


def _pieces(prompt: Prompt, scores: Sequence[TokenLogprob | None]) -> Sequence[str]:
    """What each token of a scored prompt stands for; as a server shows its tokens, where one runs the model."""
    return prompt.pieces or shown_pieces(scores, prompt.text)


def _joined(pieces: list[Piece]) -> Piece:
    """All pieces of a choice as one."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        prompt=pieces[0].prompt,
    )


def _likelihood(answer: Piece) -> float:
    values = [token.entry.logprob for token in answer.tokens]
    return sum(values) / len(values) if values else 0.0


def plan_completion(body: CompletionBody, model: Model, defaults: Defaults) -> CompletionPlan:
    """Check a request against what the model can do, and tokenise its prompts. Raises ApiError, UsageError."""
    _refuse_completion_fields(body)
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = None
    if most or body.scores_prompt:
        logprobs = 0 if body.logprobs is None and (body.best_of or 1) > body.choices else body.logprobs
        sampling = defaults.sampling(body, most, logprobs)
        refuse_what_the_engine_cannot(body, model.engine.capabilities(), sampling)
    if body.scores_prompt and not model.engine.capabilities().prompt_logprobs:
        raise unsupported("echo", "the engine that runs this model gives no logprobs of a prompt.")
    grammar = structured_grammar(body)
    if body.response_format is not None and grammar is None:
        wanted = body.response_format.model_dump(exclude_none=True)
        try:
            grammar = answer_grammar((), "none", wanted, tokens=most)
        except UsageError as error:
            raise ApiError(400, str(error), param="response_format") from error
    if grammar is not None and grammar.kind not in model.engine.capabilities().grammars:
        raise unsupported("response_format", "the engine that runs this model cannot hold it to that.")
    prompts = [_prompt(prompt, model, scored=body.scores_prompt) for prompt in body.prompts]
    return CompletionPlan(body, model, prompts, sampling, grammar)


def _refuse_completion_fields(body: CompletionBody) -> None:
    refuse_fields(body)
    if not body.prompts or any(prompt == [] for prompt in body.prompts):
        raise ApiError(400, "The prompt is empty.", param="prompt")
    if len(body.prompts) * max(body.choices, body.best_of or 1) > MOST_CHOICES:
        raise ApiError(400, f"A request may have {MOST_CHOICES} answers at most.", param="prompt")
    if body.suffix:
        raise unsupported("suffix", "the models here continue a text and do not fill gaps.")
    if body.best_of is not None and body.best_of < body.choices:
        raise ApiError(400, "'best_of' must be at least 'n'.", param="best_of")
    if body.best_of is not None and body.best_of > body.choices and body.stream:
        raise ApiError(400, "'best_of' cannot be streamed.", param="best_of")


def _prompt(prompt: str | list[int], model: Model, *, scored: bool) -> Prompt:
    engine = model.engine
    if not engine.capabilities().token_ids:
        if isinstance(prompt, str):
            return Prompt(prompt)
        raise unsupported("prompt", "the engine that runs this model takes text and no token ids.")
    remote = engine.capabilities().conversations
    if not isinstance(prompt, str):
        text, ids = engine.decode(prompt), prompt
    elif remote and not scored:
        return Prompt(prompt)  # the server behind it decides what is put around a text
    else:
        text, ids = prompt, engine.encode(prompt, special_tokens=True)
    return Prompt(text, tuple(ids), prompt_pieces(engine, ids, text) if scored and ids and not remote else ())


class CompletionForm:
    """How completions are written down: CreateCompletionResponse, also for each piece of a stream."""

    def __init__(self, plan: CompletionPlan, envelope: Envelope) -> None:
        self._body = plan.body
        self._prompts = plan.prompts
        self._envelope = envelope
        self._lengths: dict[int, int] = {}  # of the text given out, by choice
        self._usage: dict[int, Usage] = {}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        choices = [
            self._choice(_joined([piece for piece in pieces if piece.index == index]))
            for index in range(len(self._prompts) * self._body.choices)
        ]
        return {**self._envelope.fields("text_completion"), "choices": choices, "usage": usage_fields(self.usage())}

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        chunk = {**self._envelope.fields("text_completion"), "choices": [self._choice(piece)]}
        yield {**chunk, "usage": None} if self._body.wants_usage else chunk

    def last_events(self) -> Iterator[dict[str, Any]]:
        if self._body.wants_usage:
            yield {**self._envelope.fields("text_completion"), "choices": [], "usage": usage_fields(self.usage())}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        text, offset = piece.text, self._lengths.get(piece.index, 0)
        if self._body.echo and piece.index not in self._lengths:
            text = self._prompts[piece.index // self._body.choices].text + text
        self._lengths[piece.index] = offset + len(text)
        if piece.usage is not None:
            self._usage[piece.index] = piece.usage
        tokens = (*piece.prompt, *piece.tokens)
        logprobs = completion_logprobs(tokens, offset) if self._body.logprobs is not None else None
        choice = {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}
        if self._body.return_token_ids:
            choice |= {"token_ids": list(piece.token_ids), "stop_reason": piece.stop}
        return choice

    def usage(self) -> Usage:
        """Of all choices: each prompt counts once."""
        total = Usage()
        for prompt in range(len(self._prompts)):
            own = range(prompt * self._body.choices, (prompt + 1) * self._body.choices)
            total += total_usage([self._usage[index] for index in own if index in self._usage])
        return total
