"""Work on a task: the model calls tools until it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelCallLimitMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import BaseModel, Field

from calpaca.core.engine import Usage
from calpaca.core.errors import UsageError
from calpaca.core.events import Event, Notice, Result, Source, Step, Token, UsageReport
from calpaca.core.langchain import ChatCalpaca
from calpaca.core.runtime import Runtime
from calpaca.plugins.app import Turn
from calpaca_agent.app_tools import app_tools
from calpaca_agent.approval import Approval
from calpaca_agent.mcp_client import McpServers
from calpaca_agent.options import AgentOptions
from calpaca_agent.steering import Steering

INSTRUCTIONS = (
    "You solve tasks with tools. Call the tools that the task needs, one after the other, and use what they return. "
    "When you know enough, call final_answer, with the values that the tools returned."
)


class final_answer(BaseModel):  # noqa: N801  # the name of a tool, which models read
    """Answer the task, after the other tools have returned what it needs."""

    answer: str = Field(description="The answer, in the language of the task.")


FINAL = final_answer.__name__


class Agent(Runnable[str, Any]):
    """Works on tasks. `stream` gives events, a Step for every call of a tool; the last one is a Result."""

    def __init__(self, options: AgentOptions, runtime: Runtime, tools: Sequence[BaseTool] = ()) -> None:
        """`tools` are used beside those that the options name."""
        self.options = options
        self.runtime = runtime
        self.given = list(tools)

    def invoke(self, input: str, config: RunnableConfig | None = None, **given: Any) -> dict[str, Any]:
        """`history`, earlier turns of the conversation, may be `given`."""
        *_, result = self.stream(input, config, **given)
        value: dict[str, Any] = result.value
        return value

    def stream(self, input: str, config: RunnableConfig | None = None, **given: Any) -> Iterator[Any]:
        """Events of one task; `history`, earlier turns of the conversation, may be `given`.

        Raises UsageError without a tool, McpServerError for a server that cannot be used.
        """
        history: Sequence[Turn] = given.get("history", ())
        with ExitStack() as stack:
            tools = self._tools(stack)
            model = ChatCalpaca.from_model(
                self.runtime.model(self.options.spec()), self.options.sampling(self.runtime.settings)
            )
            yield from self._work(model, tools, [*history, {"role": "user", "content": input}], config)

    def _tools(self, stack: ExitStack) -> list[BaseTool]:
        tools = [*self.given, *app_tools(self.options.tools, self.runtime)]
        if self.options.mcp:
            tools += stack.enter_context(McpServers(self.options.mcp)).tools()
        names = [tool.name for tool in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"Two tools are called '{twice}'.", "Choose the apps with --tool, or leave out a server.")
        if not tools:
            raise UsageError(
                "There is no tool to use.",
                "Install an app, name documents in [apps.NAME] of the settings, or use --mcp.",
            )
        return tools

    def _work(
        self, model: BaseChatModel, tools: list[BaseTool], messages: list[Any], config: RunnableConfig | None
    ) -> Iterator[Event]:
        steps = self.options.max_steps
        agent: Any = create_agent(
            model, tools, system_prompt=INSTRUCTIONS,
            response_format=ToolStrategy(final_answer),  # so every step is a call, which grammar keeps valid
            middleware=[Steering(FINAL), Approval(self.options.approve), ModelCallLimitMiddleware(run_limit=steps, exit_behavior="end")],
        )  # fmt: skip
        asked: Any = {**(config or {}), "recursion_limit": 10 * steps + 20}  # the middleware ends it, with a message
        seen: list[AnyMessage] = []
        for update in agent.stream({"messages": messages}, asked, stream_mode="updates"):
            for messages_of_node in (part.get("messages", []) for part in update.values() if part):
                for message in messages_of_node:
                    seen.append(message)
                    yield from self._events(message, len(seen))
        yield from self._result(seen)

    @staticmethod
    def _events(message: AnyMessage, number: int) -> Iterator[Event]:
        if isinstance(message, AIMessage):
            for call in (call for call in message.tool_calls if call["name"] != FINAL):
                yield Step(f"{call['name']} {json.dumps(call['args'], ensure_ascii=False)}", number)
        elif isinstance(message, ToolMessage):
            if message.status == "error":
                yield Notice(f"{message.name}: {message.text}")
            artifact = message.artifact if isinstance(message.artifact, dict) else {}
            yield from (source for source in artifact.get("sources", []) if isinstance(source, Source))

    @staticmethod
    def _result(seen: Sequence[AnyMessage]) -> Iterator[Event]:
        answers = [message for message in seen if isinstance(message, AIMessage)]
        calls = {call["id"]: {"tool": call["name"], "arguments": call["args"], "returned": None}
                 for message in answers for call in message.tool_calls if call["name"] != FINAL}  # fmt: skip
        for message in seen:
            if isinstance(message, ToolMessage) and message.tool_call_id in calls:
                calls[message.tool_call_id]["returned"] = message.text
        final = [call["args"] for message in answers for call in message.tool_calls if call["name"] == FINAL]
        answer = str(final[-1].get("answer", "")) if final else ""
        if not final:
            yield Notice("The agent gave no answer within its steps; raise --max-steps.")
        yield Step("answer", len(seen), len(seen))
        yield Token(answer)
        usage = [message.usage_metadata for message in answers if message.usage_metadata is not None]
        yield UsageReport(
            Usage(sum(each["input_tokens"] for each in usage), sum(each["output_tokens"] for each in usage))
        )
        yield Result({"answer": answer, "calls": list(calls.values())})
