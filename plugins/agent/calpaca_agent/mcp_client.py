"""Tools of MCP servers, as LangChain tools. (langchain-mcp-adapters needs an SDK before 2.)"""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from langchain_core.tools import BaseTool, StructuredTool, ToolException
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult, Tool

from calpaca.core.errors import CalpacaError

T = TypeVar("T")
_SECONDS = 30.0
"""How long a server may take to start, and to list its tools."""


class McpServerError(CalpacaError):
    """An MCP server cannot be reached or started."""


class McpServers:
    """Connections to MCP servers, open while the object is entered. Each is a command line or a URL."""

    def __init__(self, servers: Sequence[str]) -> None:
        self.servers = servers
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp-clients", daemon=True)
        self._stop: asyncio.Event | None = None
        self._tools: list[BaseTool] = []

    def __enter__(self) -> Self:
        self._thread.start()
        ready: asyncio.Future[None] = self._do(self._new_future())
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(ready), self._loop)
        try:
            self._do(_wait(ready))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def tools(self) -> list[BaseTool]:
        """All tools of all servers. `metadata["effects"]` is `read` for those that say so, else `write`."""
        return self._tools

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _new_future(self) -> asyncio.Future[None]:
        self._stop = asyncio.Event()
        return asyncio.get_running_loop().create_future()

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        """Open all connections, hold them until the end, and close them in the task that opened them."""
        assert self._stop is not None
        try:
            async with AsyncExitStack() as stack:
                for server in self.servers:
                    self._tools += await self._opened(server, stack)
                ready.set_result(None)
                await self._stop.wait()
        except Exception as error:
            if not ready.done():
                ready.set_exception(error)

    async def _opened(self, server: str, stack: AsyncExitStack) -> list[BaseTool]:
        try:
            async with asyncio.timeout(_SECONDS):
                client = await stack.enter_async_context(Client(_address(server)))
                listed = await client.list_tools()
        except Exception as error:
            raise McpServerError(
                f"The MCP server '{server}' cannot be used: {_reason(error)}.",
                "Give a command line that starts one, or its URL, such as http://127.0.0.1:8000/mcp.",
            ) from error
        return [self._as_tool(client, tool) for tool in listed.tools]

    def _as_tool(self, client: Client, tool: Tool) -> BaseTool:
        def run(**arguments: Any) -> str:
            return _text(self._do(client.call_tool(tool.name, arguments)))

        reads = tool.annotations is not None and tool.annotations.read_only_hint
        return StructuredTool.from_function(
            run,
            name=tool.name,
            description=tool.description or tool.name,
            args_schema=tool.input_schema,
            handle_tool_error=True,
            metadata={"effects": "read" if reads else "write"},
        )

    def _end(self) -> None:
        if self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._serving.exception()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _wait(future: asyncio.Future[None]) -> None:
    await future


def _address(server: str) -> str | StdioServerParameters:
    if server.startswith(("http://", "https://")):
        return server
    command, *arguments = shlex.split(server)
    return StdioServerParameters(command=command, args=arguments)


def _text(result: CallToolResult) -> str:
    """The text of a result. Raises ToolException where the server reports an error."""
    parts = [getattr(block, "text", f"[{block.type}]") for block in result.content]
    text = "\n".join(parts)
    if result.is_error:
        raise ToolException(text or "The tool failed.")
    return text


def _reason(error: BaseException) -> str:
    """What went wrong, out of a group of one."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".strip(": ").rstrip(".")
