"""`calpaca mcp`: the installed apps for MCP clients."""

from __future__ import annotations

import asyncio

import click


@click.command()
@click.option("--app", "names", multiple=True, metavar="NAME",
              help="App or named instance to serve; repeat for several. By default all that answer and only read.")  # fmt: skip
@click.option("--http", "port", type=click.IntRange(0, 65535), metavar="PORT",
              help="Serve at http://127.0.0.1:PORT/mcp instead of stdin and stdout.")  # fmt: skip
def mcp(names: tuple[str, ...], port: int | None) -> None:
    """Serve the installed apps as tools to MCP clients.

    Without --http a client starts this command itself, and speaks with it over stdin and stdout.
    """
    from calpaca.plugins.wiring import runtime
    from calpaca_agent.mcp_server import mcp_server

    server = mcp_server(names, runtime())
    if port is None:
        asyncio.run(server.run_stdio_async())
    else:
        click.echo(f"Serving MCP at http://127.0.0.1:{port}/mcp", err=True)
        asyncio.run(server.run_streamable_http_async(port=port))
