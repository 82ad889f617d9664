"""A server's streamed answer, event by event, as chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from calpaca.core.detokenizer import StopScanner
from calpaca.core.engine import Chunk, FinishReason, TokenLogprob, Usage
from calpaca.core.errors import ModelError

DONE = "[DONE]"

_FINISHED: Mapping[str, FinishReason] = {"stop": "stop", "eos": "stop", "stop_sequence": "stop", "length": "length"}


class AnswerReader:
    """Reads the events of one answer of the server at `where`.

    `tops` is how many alternatives to a token are wanted; `stops` are stop texts that the server does not know of: the
    answer is complete when one of them comes, whatever the server sends after it.
    """

    def __init__(self, where: str, tops: int = 0, stops: tuple[str, ...] = ()) -> None:
        self.finish: FinishReason | None = None
        self.stop: str | None = None
        self.text = ""
        self._where = where
        self._tops = tops
        self._scanner = StopScanner(stops)
        self._usage: Usage | None = None
        self._tokens = 0

    def read(self, data: str) -> Chunk | None:
        """The piece that an event carries, if it carries one.

        Raises ModelError for an error of the server, and for what is no answer of an OpenAI-compatible one.
        """
        event = self._parse(data)
        if isinstance(event.get("usage"), dict):
            self._usage = _usage(event["usage"])
        choices = event.get("choices") or [None]
        try:
            return self._read_choice(choices[0]) if choices[0] is not None else None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._strange(data) from error

    def _parse(self, data: str) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError as error:
            raise self._strange(data) from error
        if not isinstance(event, dict):
            raise self._strange(data)
        if event.get("error"):
            raise ModelError(
                f"The server {self._where} failed while it answered: {said(event)}", "Look at the server's own log."
            )
        return event

    def _strange(self, data: str) -> ModelError:
        return ModelError(
            f"The server {self._where} sent an event that is no piece of an answer: {data[:80]!r}.",
            "Is it an OpenAI-compatible one?",
        )

    def _read_choice(self, choice: dict[str, Any]) -> Chunk | None:
        delta = choice.get("delta") or {}
        if delta.get("tool_calls"):
            raise ModelError(f"The server {self._where} called a tool that it was not offered.", "Try another model.")
        text = str(choice.get("text") or delta.get("content") or "")
        logprobs = read_logprobs(choice.get("logprobs"), self._tops)
        ids = tuple(map(int, choice.get("token_ids") or ()))
        if len(ids) == len(logprobs):
            logprobs = tuple(
                TokenLogprob(token, each.text, each.logprob, each.top)
                for token, each in zip(ids, logprobs, strict=True)
            )
        elif not ids:
            ids = tuple(each.token_id for each in logprobs if each.token_id >= 0)
        self._tokens += len(ids) or bool(text)
        text = self._scanner.add(text)
        self._end(choice)
        if self._scanner.matched is not None:
            self.finish, self.stop = "stop", self._scanner.matched
        elif self.finish is not None:
            text += self._scanner.finish()
        self.text += text
        return Chunk(text, ids, logprobs) if text or ids else None

    def _end(self, choice: dict[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if reason is None:
            return
        if reason not in _FINISHED:
            raise ModelError(
                f"The server {self._where} ended the answer for the reason '{reason}'.", "The answer is not whole."
            )
        self.finish = _FINISHED[reason]
        ended_by = choice.get("stop_reason")
        self.stop = ended_by if isinstance(ended_by, str) else None

    @property
    def stopped(self) -> bool:
        """Whether a stop text that the server does not know of has come."""
        return self._scanner.matched is not None

    def usage(self, prompt_estimate: int) -> Usage:
        """What the server counted; else one token for each piece, marked as estimated."""
        return self._usage or Usage(prompt_estimate, self._tokens, estimated=True)


class ScoreReader(AnswerReader):
    """Reads the log probabilities of the tokens of `prompt`, which come with the prompt's text in one event."""

    def __init__(self, where: str, prompt: Sequence[int], tops: int) -> None:
        super().__init__(where, tops)
        self._prompt = prompt
        self._given = False

    def _read_choice(self, choice: dict[str, Any]) -> Chunk | None:
        self._end(choice)
        if self.finish is not None:
            self.finish = "length"  # whatever token a server made, and did not show
        found = choice.get("logprobs")
        if self._given or not found:
            return None
        self._given = True
        names, values = found["tokens"], found["token_logprobs"]
        if len(names) < len(self._prompt):
            raise ValueError(f"log probabilities of {len(names)} tokens, not {len(self._prompt)}")
        likeliest = found.get("top_logprobs") or [None] * len(names)
        scored = zip(self._prompt[1:], names[1:], values[1:], likeliest[1:], strict=False)  # a further token may follow
        entries = (
            TokenLogprob(token_id, text, float(value), _alternatives(top, self._tops))
            for token_id, text, value, top in scored
        )
        return Chunk("", prompt_logprobs=(None, *entries))

    def usage(self, prompt_estimate: int) -> Usage:  # noqa: ARG002  # the prompt was sent as tokens
        """The prompt's tokens; vLLM counts one that it makes and does not show."""
        return Usage(len(self._prompt), 0)


def _usage(counts: Mapping[str, Any]) -> Usage:
    details = counts.get("prompt_tokens_details") or {}
    return Usage(
        int(counts.get("prompt_tokens") or 0),
        int(counts.get("completion_tokens") or 0),
        int(details.get("cached_tokens") or 0),
    )


def read_logprobs(found: Any, tops: int) -> tuple[TokenLogprob, ...]:
    """Log probabilities in the form of chats (a list of entries) or of completions (lists side by side)."""
    if not found:
        return ()
    if found.get("content") is not None:
        return tuple(_entry(entry, tops) for entry in found["content"])
    tokens = found.get("tokens") or []
    likeliest = found.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        TokenLogprob(-1, token, float(logprob), _alternatives(top, tops))
        for token, logprob, top in zip(tokens, found["token_logprobs"], likeliest, strict=True)
    )


def _alternatives(top: Mapping[str, float] | None, tops: int) -> tuple[tuple[int, str, float], ...]:
    """Alternatives of a completion, which are told by their texts alone."""
    return _best([(-1, text, float(value)) for text, value in (top or {}).items()], tops)


def _entry(entry: Mapping[str, Any], tops: int) -> TokenLogprob:
    others = [(int(top.get("id", -1)), top["token"], float(top["logprob"])) for top in entry.get("top_logprobs") or ()]
    return TokenLogprob(int(entry.get("id", -1)), entry["token"], float(entry["logprob"]), _best(others, tops))


def _best(others: list[tuple[int, str, float]], tops: int) -> tuple[tuple[int, str, float], ...]:
    return tuple(sorted(others, key=lambda each: -each[2])[:tops])


def said(body: Any) -> str:
    """The message of an error, in any of the forms that servers give it."""
    error = body.get("error") if isinstance(body, dict) else body
    match error:
        case {"message": str(message)}:
            return message
        case str(message):
            return message
    match body:
        case {"message": str(message)} | {"detail": str(message)}:
            return message
        case {"detail": [{"msg": str(message)}, *_]}:
            return message
    return json.dumps(body, ensure_ascii=False)[:200]
