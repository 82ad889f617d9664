"""From conversations and texts to token ids, with a mark on every token that is learnt.

An answer is learnt in exactly the context that chat and server give it: the prompt is rendered by the same template and
encoded in the same parts, and what the template writes after it, up to the token that ends the turn, is the answer. A
conversation becomes one example where each later prompt begins with the ids of the turns before it. Where it does not
(SentencePiece joins the space before an answer with its first word), or where the template ends an answer without
a token, every answer becomes an example of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from calpaca.core.errors import ModelError
from calpaca.core.template import ChatTemplate, Message, describe_tools, normalise
from calpaca.core.tokenizer import Tokenizer
from calpaca_trainer.conversation import Conversation

LossOn = Literal["all", "last"]
Parts = tuple[str, ...]

_PROBE: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
_BATCH = 1000  # conversations whose texts are encoded together


@dataclass(frozen=True)
class Example:
    """Token ids, and the spans [start, end) of those that are learnt."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def learnt(self) -> int:
        """Tokens that count in the loss; nothing predicts the first of an example."""
        return sum(end - max(start, 1) for start, end in self.spans)


@dataclass(frozen=True)
class TooLong:
    """A turn that does not fit, with its length in tokens."""

    tokens: int


@dataclass(frozen=True)
class _Turn:
    """The prompt of an answer and the answer, as parts to encode."""

    prompt: Parts
    answer: Parts

    @property
    def whole(self) -> Parts:
        return (*self.prompt[:-1], self.prompt[-1] + self.answer[0], *self.answer[1:])


class ConversationRenderer:
    """Renders conversations for one template, tokenizer and maximal length.

    Raises ModelError for a template that writes something else before an answer than it does when it asks for one.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, eos_ids: Sequence[int], *, loss_on: LossOn, max_length: int
    ) -> None:
        self._template, self._encoder = template, _Encoder(tokenizer)
        self._eos = dict.fromkeys((*eos_ids, *_stop_ids(template, tokenizer)))
        self._loss_on, self._max_length, self._closing = loss_on, max_length, ""
        probe = self._turn(_PROBE, 1, ())
        ids = self._encoder.encode(probe.answer)
        self._ends_turns = any(index in self._eos for index in ids)
        self._closing = "" if self._ends_turns else "".join(probe.answer).partition("b")[2]
        self._separable = self._encoder.encode(probe.prompt) + ids == self._encoder.encode(probe.whole)

    def render(self, conversations: Iterable[Conversation]) -> Iterator[list[Example | TooLong]]:
        """The examples of each conversation."""
        source = iter(conversations)
        while batch := list(islice(source, _BATCH)):
            turns = [self._turns(conversation) for conversation in batch]
            prompts = self._encoder.encode_all([turn.prompt for each in turns for turn in each])
            answers = self._encoder.encode_all(self._answers(turns))
            pairs = zip(prompts, answers, (turn for each in turns for turn in each), strict=True)
            for each in turns:
                yield self._examples([self._ids(*next(pairs)) for _ in each])

    def _answers(self, turns: list[list[_Turn]]) -> list[Parts]:
        """Answers alone, or after their prompts where a text's tokens depend on what stands before it."""
        return [turn.answer if self._separable else turn.whole for each in turns for turn in each]

    def _ids(self, prompt: list[int], answer: list[int], turn: _Turn) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of its answer."""
        if not self._separable:
            begins = answer[: len(prompt)] == prompt
            answer = answer[len(prompt) :] if begins else self._encoder.encode(turn.answer)
        return prompt, answer if self._ends_turns else [*answer, next(iter(self._eos))]

    def _turns(self, conversation: Conversation) -> list[_Turn]:
        """The turns that are learnt."""
        takes_tools = self._template.takes_tools
        described = conversation.messages if takes_tools else describe_tools(conversation.messages, conversation.tools)
        messages = normalise(described, keep_tool_messages=takes_tools)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers if self._loss_on == "all" else answers[-1:]
        return [self._turn(messages, number, conversation.tools if takes_tools else ()) for number in wanted]

    def _turn(self, messages: Sequence[Message], number: int, tools: Sequence[Any]) -> _Turn:
        prompt = self._template.parts(messages[:number], tools)
        whole = self._template.parts(messages[: number + 1], tools, answer=False)
        length = sum(map(len, prompt))
        if "".join(whole)[:length] != "".join(prompt):
            raise ModelError(
                "The chat template cannot be trained on: where it asks for an answer it writes something else than before"
                " an answer that is there.",
                "Choose another with --chat-template.",
            )
        answer = _after(whole, length)
        if self._closing and answer[-1].endswith(self._closing):
            answer = (*answer[:-1], answer[-1].removesuffix(self._closing))
        return _Turn(prompt, answer)

    def _examples(self, turns: list[tuple[list[int], list[int]]]) -> list[Example | TooLong]:
        """One example for as many turns as share their ids, within the maximal length."""
        examples: list[Example | TooLong] = []
        for prompt, answer in turns:
            end = len(prompt) + self._end(answer)
            if end > self._max_length:
                examples.append(TooLong(end))
                continue
            span, ids = (len(prompt), end), prompt + answer
            last = examples[-1] if examples else None
            if isinstance(last, Example) and self._ends_turns and ids[: len(last.ids)] == last.ids:
                examples[-1] = Example(ids, (*last.spans, span))
            else:
                examples.append(Example(ids, (span,)))
        return [_cut(each) if isinstance(each, Example) else each for each in examples]

    def _end(self, answer: list[int]) -> int:
        """Tokens of an answer up to and with the one that ends it; what the template writes after that is not learnt."""
        return min((answer.index(index) + 1 for index in self._eos if index in answer), default=len(answer))


def _cut(example: Example) -> Example:
    """Without what follows the last token that is learnt."""
    return Example(example.ids[: example.spans[-1][1]], example.spans)


def _after(parts: Parts, length: int) -> Parts:
    """What follows the first `length` characters, cut where it was cut."""
    for number, part in enumerate(parts):
        if length < len(part) or number == len(parts) - 1:
            return (part[length:], *parts[number + 1 :])
        length -= len(part)
    return ("",)


def _stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Tokens that the template names as the end of an answer."""
    ids = (tokenizer.token_id(text) for text in template.stop if text in tokenizer.control_tokens)
    return [index for index in ids if index is not None]


class TextRenderer:
    """Renders plain texts: each with the tokens that begin and end a text, cut to the maximal length, all learnt."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int, *, max_length: int) -> None:
        self._encoder, self._eos_id, self._max_length = _Encoder(tokenizer), eos_id, max_length
        # A text that spells a control token is only text; the template does nothing but find those.
        self._plain = ChatTemplate("{{ messages[0].content }}", {}, control_tokens=tokenizer.control_tokens)

    def render(self, texts: Iterable[str]) -> Iterator[list[Example | TooLong]]:
        """The examples of each text."""
        source = iter(texts)
        while batch := list(islice(source, _BATCH)):
            parts = [self._plain.parts([{"role": "user", "content": text}], answer=False) for text in batch]
            for ids in self._encoder.encode_all(parts, special_tokens=True):
                ended = [*ids, self._eos_id]
                pieces = (ended[at : at + self._max_length] for at in range(0, len(ended), self._max_length))
                yield [Example(piece, ((0, len(piece)),)) for piece in pieces if len(piece) > 1]


class _Encoder:
    """Encodes many texts at once where the tokenizer can; the ids are those of `Tokenizer.encode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        hf = getattr(tokenizer, "hf", None)
        self._backend = hf.backend_tokenizer if hf is not None and hf.is_fast else None

    def encode(self, parts: Parts) -> list[int]:
        return self._tokenizer.encode(parts if len(parts) > 1 else parts[0])

    def encode_all(self, texts: Sequence[Parts], *, special_tokens: bool = False) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer.encode(parts, special_tokens=special_tokens) for parts in texts]
        whole = [parts[0] for parts in texts if len(parts) == 1]
        encoded = iter(self._backend.encode_batch_fast(whole, add_special_tokens=special_tokens))
        return [
            next(encoded).ids if len(parts) == 1 else self._tokenizer.encode(parts, special_tokens=special_tokens)
            for parts in texts
        ]
