"""An agent with apps and MCP servers as its tools."""

from __future__ import annotations

from calpaca import App, hookimpl

calpaca_api = ">=1,<2"


@hookimpl
def register_apps() -> list[App]:
    """The agent. It may run what writes, so no server offers it as a model."""
    return [
        App(
            "agent",
            "Works on a task with other apps and MCP servers as tools.",
            "calpaca_agent.app:build",
            extra="torch",
            options="calpaca_agent.options:AgentOptions",
            effects="write",
            input="task",
            history=True,
        )
    ]
