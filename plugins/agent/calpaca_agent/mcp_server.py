"""The installed apps as tools of an MCP server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

from langchain_core.tools import BaseTool
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import calpaca
from calpaca.core.runtime import Runtime
from calpaca_agent.app_tools import chosen_instances


def mcp_server(names: Sequence[str], runtime: Runtime) -> MCPServer[Any]:
    """A server with the chosen apps, by default all that answer and only read. Raises UsageError for an unknown name."""
    server: MCPServer[Any] = MCPServer("calpaca", version=calpaca.__version__, log_level="WARNING")
    for instance in chosen_instances(names, runtime):
        tool = instance.app.as_tool(runtime, presets=instance.presets, name=instance.name)
        server.add_tool(
            _function(tool),
            name=instance.name,
            description=instance.app.summary,
            annotations=ToolAnnotations(read_only_hint=instance.app.effects == "read"),
            structured_output=False,
        )
    return server


def _function(tool: BaseTool) -> Callable[..., Coroutine[Any, Any, str]]:
    """A coroutine function with the tool's arguments as its signature, which the SDK makes the schema from."""

    async def call(**arguments: Any) -> str:
        request = {"type": "tool_call", "id": tool.name, "name": tool.name, "args": arguments}
        message = await asyncio.to_thread(tool.invoke, request)
        if message.status == "error":
            raise ToolError(message.text)
        return str(message.text)

    call.__signature__ = inspect.Signature(_parameters(tool.args_schema), return_annotation=str)  # type: ignore[attr-defined]
    return call


def _parameters(arguments: Any) -> list[inspect.Parameter]:
    assert issubclass(arguments, BaseModel)
    return [_parameter(name, info) for name, info in arguments.model_fields.items()]


def _parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    default = inspect.Parameter.empty if info.is_required() else info.get_default(call_default_factory=True)
    annotation: Any = Annotated[info.annotation, info]  # type: ignore[name-defined]  # a type at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
