"""What keeps small models on course: a question after each result, and an end to calls that repeat."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage


class Steering(AgentMiddleware[Any, Any]):
    """Asks the model below the newest result whether that solves the task, and once it has made a call for the second
    time, leaves it the answer alone. What the conversation keeps is not changed."""

    def __init__(self, final: str) -> None:
        """`final` is the name of the tool that answers."""
        super().__init__()
        self.final = final

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        messages = list(request.messages)
        if messages and isinstance(messages[-1], ToolMessage):
            asked = f"{messages[-1].text}\n\nDoes this solve the task? Then call {self.final}."
            messages[-1] = messages[-1].model_copy(update={"content": asked})
        tools = [] if _repeats(messages) else request.tools
        return handler(request.override(messages=messages, tools=tools))


def _repeats(messages: Sequence[AnyMessage]) -> bool:
    """Whether a call has been made twice since the last message of a person."""
    start = max((index for index, message in enumerate(messages) if isinstance(message, HumanMessage)), default=0)
    calls = [call for message in messages[start:] if isinstance(message, AIMessage) for call in message.tool_calls]
    made = [json.dumps([call["name"], call["args"]], sort_keys=True) for call in calls]
    return len(set(made)) < len(made)
