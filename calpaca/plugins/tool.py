"""An app as a tool of LangChain: what `App.as_tool` makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.tools import StructuredTool, ToolException
from pydantic import BaseModel, Field, create_model

from calpaca.core.errors import CalpacaError
from calpaca.core.events import Event, Result, Source
from calpaca.plugins.app import App
from calpaca.plugins.exposure import open_options
from calpaca.plugins.options import SamplingOptions, read_options

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime


def app_as_tool(
    app: App, runtime: Runtime, presets: Mapping[str, Any], name: str, options: Collection[str] | None
) -> StructuredTool:
    """See `App.as_tool`."""

    def run(**given: Any) -> tuple[str, dict[str, Any]]:
        text = str(given.pop(app.input, "")) if app.input else ""
        try:
            runner = app.build(read_options(app.load_options(), {**presets, **_set(given)}, name), runtime)
            events = list(runner.events() if app.kind == "job" else runner.stream(text))
        except CalpacaError as error:
            raise ToolException(error.message) from error
        return _answer(app, events)

    return StructuredTool.from_function(
        run,
        name=name,
        description=app.summary,
        args_schema=_arguments(app, name, options),
        response_format="content_and_artifact",
        handle_tool_error=True,
        metadata={"effects": app.effects},
    )


def _arguments(app: App, name: str, options: Collection[str] | None) -> type[BaseModel]:
    """A model of what the tool is called with: the app's input, which is required, and some of its open options."""
    fields = app.load_options().model_fields
    taken: dict[str, Any] = {}
    if app.input is not None:
        taken[app.input] = (str, Field(..., description=fields[app.input].description))
    for each, info in open_options(app).items():
        if (options is None and each not in SamplingOptions.model_fields) or each in (options or ()):
            taken[each] = (info.annotation, info)
    return create_model(f"{name}_arguments", **taken)


def _set(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without those that say nothing."""
    return {name: value for name, value in given.items() if value is not None}


def _answer(app: App, events: Collection[Event]) -> tuple[str, dict[str, Any]]:
    """The answer as text, and the whole result with its sources beside it."""
    result = next(event for event in events if isinstance(event, Result))
    sources = [event for event in events if isinstance(event, Source)]
    return str(result.value.get(app.answer, "")), {"result": result.value, "sources": sources}
