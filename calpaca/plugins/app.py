"""The App contract: what a plugin offers to run, described once for every face."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from calpaca.core.errors import PluginError
from calpaca.core.events import Event
from calpaca.core.jobs import JobRecord
from calpaca.core.registry import Component, load_target

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool
    from pydantic import BaseModel

    from calpaca.core.runtime import Runtime


Turn = Mapping[str, str]
"""A message of a conversation: `role` (`user` or `assistant`) and `content`."""


class AnswerRunner(Protocol):
    """What `build` of an `answer` app returns: a LangChain Runnable that answers an input.

    `stream` gives events, the last one a `Result`; `invoke` gives that result's value. Where the app declares `history`,
    both take the earlier turns of the conversation as `history`, a sequence of Turns, oldest first.
    """

    def invoke(self, input: str, config: Any = None, **kwargs: Any) -> dict[str, Any]: ...

    def stream(self, input: str, config: Any = None, **kwargs: Any) -> Iterator[Event]: ...


class JobRunner(Protocol):
    """What `build` of a `job` app returns: a handle on work that is recorded in the ledger and can be resumed."""

    @property
    def id(self) -> str: ...

    def status(self) -> JobRecord: ...

    def events(self) -> Iterator[Event]:
        """Do the work, reporting on it; the last event is a `Result`. Closing the iterator cancels."""
        ...

    def cancel(self) -> None: ...


@dataclass(frozen=True)
class App(Component):
    """Something a plugin offers to run.

    `target` is `module:function`, called with (options, runtime); `options` is `module:PydanticModel`. Flags, form
    fields and the JSON schema come from that model. `input` names the option that holds the question or text, `answer`
    the key of the result that holds the answer. `kind` `answer` returns an AnswerRunner, `job` a JobRunner; an `answer`
    app returns a JobRunner too where its options ask for work on its answers, such as measuring them. `effects` says whether it writes anything a person would miss. Only `answer` apps that only read are served as models.
    `history` says that the runner's `stream` and `invoke` take the earlier turns of a conversation. `documents` names the
    option that may give documents in place of the input, for an app whose input is itself a document: what is piped into
    such an app is one text, not a question a line.
    """

    options: str = ""
    kind: Literal["answer", "job"] = "answer"
    effects: Literal["read", "write"] = "read"
    input: str | None = None
    answer: str = "answer"
    history: bool = False
    documents: str | None = None

    def load_options(self) -> type[BaseModel]:
        """Import the options model."""
        model: type[BaseModel] = load_target(self.options, feature=f"App '{self.name}'", extra=self.extra)
        return model

    def as_tool(
        self,
        runtime: Runtime,
        *,
        presets: Mapping[str, Any] | None = None,
        name: str = "",
        options: Collection[str] | None = None,
    ) -> BaseTool:
        """The app as a LangChain tool, for agents.

        It is called with the app's input and with `options`: names of options that outsiders may set, by default all of
        the app's own. `presets` are the rest of its options, such as files. It gives the answer as text, and as the
        artifact the whole result and its sources; `metadata["effects"]` says whether it writes.
        """
        from calpaca.plugins.tool import app_as_tool

        return app_as_tool(self, runtime, presets or {}, name or self.name, options)

    def build(self, options: BaseModel, runtime: Runtime) -> Any:
        """Import and call the app's builder."""
        runner = self.load()(options, runtime)
        wanted = ("stream", "events") if self.kind == "answer" else ("events",)
        if not any(callable(getattr(runner, name, None)) for name in wanted):
            raise PluginError(
                f"App '{self.name}' is of kind '{self.kind}', but what it built has no {wanted[0]}().",
                "Report this to the plugin's author.",
            )
        return runner
