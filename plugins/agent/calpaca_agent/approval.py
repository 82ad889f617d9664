"""Tools that write run after a person has agreed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click
from langchain.agents.middleware import AgentMiddleware, ToolCallRequest
from langchain_core.messages import ToolMessage
from langgraph.types import Command

from calpaca_agent.options import Approve


class Approval(AgentMiddleware[Any, Any]):
    """Lets tools run that only read (`metadata["effects"] == "read"`), and asks before each call of another."""

    def __init__(self, approve: Approve) -> None:
        super().__init__()
        self.approve = approve

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        call = request.tool_call
        if self._may_run(request):
            return handler(request)
        return ToolMessage(
            f"Not run: nobody allowed the call of {call['name']}.", tool_call_id=call["id"], name=call["name"], status="error"
        )  # fmt: skip

    def _may_run(self, request: ToolCallRequest) -> bool:
        effects = (request.tool.metadata or {}).get("effects") if request.tool is not None else None
        if effects == "read" or self.approve == "always":
            return True
        if self.approve == "never" or sys.stdin is None or not sys.stdin.isatty():
            return False
        call = request.tool_call
        arguments = json.dumps(call["args"], ensure_ascii=False)
        return click.confirm(f"Run {call['name']} {arguments}?", default=False, err=True)
