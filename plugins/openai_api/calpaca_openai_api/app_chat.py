"""Chats with an app: the last user message is its input, those before it its history, the text of its last step the
answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from calpaca.core.engine import Usage
from calpaca.core.events import Event, Notice, Result, Source, Step, Token, UsageReport
from calpaca.plugins.app import App, Turn
from calpaca_openai_api.app_runs import AppRuns
from calpaca_openai_api.bodies import ChatBody
from calpaca_openai_api.chat import refuse_chat_fields
from calpaca_openai_api.faults import ApiError, unsupported
from calpaca_openai_api.generation import Piece
from calpaca_openai_api.messages import text_of


@dataclass(frozen=True)
class AppPlan:
    """A chat request to an app, ready to be run."""

    runs: AppRuns
    conversation: _Conversation
    options: dict[str, Any]

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes; the last piece carries sources and notices."""
        reader = _EventReader(self.runs.app.answer, self.conversation.notices)
        text, history = self.conversation.text, self.conversation.history
        async with aclosing(self.runs.events(self.options, text, history)) as events:  # type: ignore[type-var]
            async for event in events:
                text = reader.read(event)
                if text:
                    yield Piece(0, text)
        yield reader.last()


def plan_app(body: ChatBody, runs: AppRuns) -> AppPlan:
    """Check a request against what the app can be told. Raises ApiError."""
    refuse_chat_fields(body)
    options = dict(body.options or {})
    runs.check(options)
    refused = {
        "n": body.choices != 1,
        "logprobs": body.logprobs,
        "tools": body.tools,
        "tool_choice": body.tool_choice not in (None, "none", "auto"),
        "response_format": body.response_format is not None and body.response_format.type != "text",
        "structured_outputs": body.structured_outputs,
        "return_token_ids": body.return_token_ids,
    }
    for name, asked in refused.items():
        if asked:
            raise unsupported(name, f"'{runs.app.name}' is an app and no language model.")
    return AppPlan(runs, _conversation(body, runs.app), {**_sampling(body, runs), **options})


def _sampling(body: ChatBody, runs: AppRuns) -> dict[str, Any]:
    """The request's sampling as options of the app. Raises ApiError for a field that it does not have."""
    asked = {
        "max_new_tokens": ("max_tokens", body.most_tokens),
        "temperature": ("temperature", body.temperature),
        "top_p": ("top_p", body.top_p or None),
        "top_k": ("top_k", body.top_k),
        "repetition_penalty": ("repetition_penalty", body.repetition_penalty),
        "seed": ("seed", body.seed),
        "stop": ("stop", list(body.stops) or None),
    }
    for option, (field, value) in asked.items():
        if value is not None and not runs.takes(option):
            raise unsupported(field, f"the app '{runs.app.name}' has no such option.")
    return {option: value for option, (_, value) in asked.items() if value is not None}


@dataclass(frozen=True)
class _Conversation:
    """What an app is given of a chat, and what the client is told about the rest."""

    text: str
    history: tuple[Turn, ...]
    notices: tuple[str, ...]


def _conversation(body: ChatBody, app: App) -> _Conversation:
    """Raises ApiError when no user has said anything."""
    texts = [text_of(message, f"messages.{index}") for index, message in enumerate(body.messages)]
    last = max((index for index, message in enumerate(body.messages) if message.role == "user"), default=None)
    if last is None:
        raise ApiError(400, "There is no message of a user, which is what an app answers.", param="messages")
    turns = tuple(
        {"role": message.role, "content": text}
        for message, text in zip(body.messages[:last], texts, strict=False)
        if message.role in ("user", "assistant") and text
    )
    notices = []
    if turns and not app.history:
        notices.append(
            f"Not used: the messages before the last question ({len(turns)}). The app '{app.name}' answers each question "
            "by itself."
        )
    rest = len(body.messages) - 1 - len(turns)
    if rest:
        notices.append(
            f"Not used: messages that are neither the last question nor a turn before it ({rest}), such as system "
            f"messages. The app '{app.name}' has instructions of its own."
        )
    return _Conversation(texts[last], turns if app.history else (), tuple(notices))


class _EventReader:
    """Reads an app's events: which text is the answer, what it rests on, what it took."""

    def __init__(self, answer: str, notices: Sequence[str]) -> None:
        self._answer = answer
        self._is_last_step = True
        self._answered = False
        self._rest = ""
        self._sources: list[dict[str, Any]] = []
        self._notices = list(notices)
        self._usage = Usage()

    def read(self, event: Event) -> str:
        """The text to show."""
        match event:
            case Step():
                self._is_last_step = event.index == event.total
            case Token() if self._is_last_step:
                self._answered = self._answered or bool(event.text)
                return event.text
            case Source():
                self._sources.append({**asdict(event)})
            case Notice():
                self._notices.append(event.text)
            case UsageReport():
                self._usage = event.usage
            case Result() if not self._answered:
                self._rest = str(event.value.get(self._answer, ""))
        return ""

    def last(self) -> Piece:
        """The last piece: the whole answer where none was streamed."""
        extension: dict[str, object] = {"sources": self._sources, "notices": self._notices}
        return Piece(0, self._rest, finish="stop", usage=self._usage, extension=extension)
