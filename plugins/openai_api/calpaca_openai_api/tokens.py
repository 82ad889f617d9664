"""Tokens of an answer with their log probabilities, each with the piece of the shown text that it stands for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calpaca.core.detokenizer import Detokenizer
from calpaca.core.engine import Chunk, Engine, TokenLogprob


@dataclass(frozen=True)
class Token:
    """A token and its piece of the text: pieces of all tokens joined are the text that is shown. The piece of a token
    that ends inside a character is empty, and the character belongs to the one that completes it. Only the first token
    of a prompt is not `scored`: nothing precedes it."""

    entry: TokenLogprob
    piece: str
    scored: bool = True

    @property
    def text(self) -> str:
        return self.piece or self.entry.text


class TokenReader:
    """Pairs the tokens of chunks with the text of chunks. Tokens that a stop text cut off stand for nothing and are left
    out, and so is the one that ends the answer unless `with_end`."""

    def __init__(self, engine: Engine, prompt: Sequence[int] = (), *, with_end: bool = False) -> None:
        # A server's tokenizer is asked over the network: its tokens are taken as it shows them.
        local = not engine.capabilities().conversations
        self._detokenizer = Detokenizer(engine, prompt) if local else None
        self._with_end = with_end
        self._held: deque[Token] = deque()
        self._shown = ""

    def read(self, chunk: Chunk) -> list[Token]:
        """The tokens whose text is shown by now."""
        for entry in chunk.logprobs:
            self._held.append(Token(entry, self._piece(entry)))
        self._shown += chunk.text
        given: list[Token] = []
        while (count := self._next()) is not None:
            for _ in range(count):
                token = self._held.popleft()
                self._shown = self._shown[len(token.piece) :]
                given.append(token)
        if chunk.finish_reason is None:
            return given
        given += self._rest()
        if self._with_end and chunk.stop is None:
            given += [Token(token.entry, "") for token in self._held]
        return given

    def _piece(self, entry: TokenLogprob) -> str:
        if self._detokenizer is None or entry.token_id < 0:
            return entry.text
        return self._detokenizer.add(entry.token_id)

    def _next(self) -> int | None:
        """How many tokens make the next whole piece, if all of it is shown."""
        for count, token in enumerate(self._held, 1):
            if token.piece:
                return count if len(token.piece) <= len(self._shown) else None
        return None

    def _rest(self) -> list[Token]:
        """Tokens for what is shown at the end: of one that a stop text cut, or an unfinished character."""
        rest: list[Token] = []
        while self._shown and self._held:
            token = self._held.popleft()
            last = bool(token.piece) or not self._held
            piece = self._shown if last else ""
            rest.append(Token(token.entry, piece))
            self._shown = self._shown[len(piece) :]
        return rest


def prompt_pieces(engine: Engine, token_ids: Sequence[int], text: str) -> tuple[str, ...]:
    """The piece of a prompt's text that each of its tokens stands for; joined they are the text, whatever the tokenizer
    makes of special tokens and white space."""
    detokenizer = Detokenizer(engine)
    pieces = [detokenizer.add(token_id) for token_id in token_ids]
    given, end = [], 0
    for piece in pieces:
        given.append(text[end : end + len(piece)])
        end += len(given[-1])
    given[-1] += text[end:]
    return tuple(given)


def shown_pieces(entries: Sequence[TokenLogprob | None], text: str) -> tuple[str, ...]:
    """The same as a server shows its tokens: asking it for each would be slow. The first token's is what is left."""
    pieces = ["" if entry is None else entry.text for entry in entries]
    pieces[0] = text[: max(len(text) - sum(map(len, pieces)), 0)]
    return tuple(pieces)


def prompt_tokens(
    pieces: Sequence[str], token_ids: Sequence[int], entries: Sequence[TokenLogprob | None], engine: Engine
) -> tuple[Token, ...]:
    """A prompt's tokens as the engine scored them."""
    first = TokenLogprob(token_ids[0], pieces[0] or engine.decode([token_ids[0]]), 0.0)
    return tuple(
        Token(entry or first, piece, scored=entry is not None) for piece, entry in zip(pieces, entries, strict=True)
    )


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """As a chat's choice has them."""
    return {"content": [_chat_token(token) for token in tokens], "refusal": None}


def _chat_token(token: Token) -> dict[str, Any]:
    top = [
        {"token": text, "logprob": value, "bytes": list(text.encode())} for _, text, value in token.entry.top
    ]  # fmt: skip
    return {
        "token": token.text,
        "logprob": token.entry.logprob,
        "bytes": list(token.piece.encode()),
        "top_logprobs": top,
    }


def completion_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """As a completion's choice has them; the first token stands at `offset` in the text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.piece)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.entry.logprob if token.scored else None for token in tokens],
        "top_logprobs": [_likeliest(token) if token.scored else None for token in tokens],
        "text_offset": offsets,
    }


def _likeliest(token: Token) -> dict[str, float]:
    """Alternatives by their text, the chosen one among them."""
    likeliest = {text: value for _, text, value in reversed(token.entry.top)}  # of two with one text the likelier stays
    return {**likeliest, token.text: token.entry.logprob}
