"""The agent on a scripted model: which tools it has, what may run, what comes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from langchain_core.tools import tool

from calpaca.core.errors import UsageError
from calpaca.core.events import Notice, Result, Source, Step
from calpaca_agent.agent import Agent
from calpaca_agent.app import build
from calpaca_agent.mcp_client import McpServerError, McpServers
from calpaca_agent.options import AgentOptions

HANDBOOK = "# Keys\n\nThe key of the archive is kept by Mrs Abendroth.\n"


def call(name: str, **arguments) -> str:
    return json.dumps({"name": name, "arguments": arguments})


@tool
def price_of(thing: str) -> str:
    """Look up a price."""
    return "13"


price_of.metadata = {"effects": "read"}


@tool
def order(thing: str) -> str:
    """Order a thing."""
    return f"{thing} is on its way"


@pytest.fixture
def agent(calpaca_runtime):
    """`agent(answers, tools, **options)`: an agent of these tools alone, and its scripted model."""

    def make(answers, tools=(price_of,), **options):
        runtime = calpaca_runtime(answers)
        for owner in {runtime.apps.owner(name) for name in runtime.apps.names()}:
            runtime.apps.withdraw(owner)
        return Agent(AgentOptions(**options), runtime, tools), runtime.fake.engine

    return make


def test_calls_are_steps_and_what_they_return_leads_to_the_answer(agent) -> None:
    runner, engine = agent([call("price_of", thing="lamp"), call("final_answer", answer="It costs 13.")])
    *events, result = runner.stream("What does a lamp cost?")
    assert [event.name for event in events if isinstance(event, Step)] == ['price_of {"thing": "lamp"}', "answer"]
    assert isinstance(result, Result)
    assert result.value == {
        "answer": "It costs 13.",
        "calls": [{"tool": "price_of", "arguments": {"thing": "lamp"}, "returned": "13"}],
    }
    assert "What does a lamp cost?" in engine.prompts[0]
    assert "13" in engine.prompts[1].rsplit("What does a lamp cost?", 1)[1]


def test_every_answer_of_the_model_is_held_to_the_tools_schemas(agent) -> None:
    runner, engine = agent([call("final_answer", answer="Yes.")])
    runner.invoke("Is it?")
    assert engine.requests[0].grammar is not None


def test_a_tool_that_writes_runs_only_when_it_is_allowed(agent) -> None:
    script = [call("order", thing="lamp"), call("final_answer", answer="Done.")]
    for approve, returned in {"always": "lamp is on its way", "never": "Not run", "ask": "Not run"}.items():
        runner, _ = agent(script, [order], approve=approve)
        *events, result = runner.stream("Order a lamp.")
        assert returned in result.value["calls"][0]["returned"]
        assert any(isinstance(event, Notice) for event in events) is (approve != "always")


@pytest.mark.parametrize(("typed", "runs"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_a_person_is_asked(agent, monkeypatch, typed, runs) -> None:
    asked = []
    monkeypatch.setattr("calpaca_agent.approval.click.confirm", lambda text, **_: asked.append(text) or typed == "y\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    runner, _ = agent([call("order", thing="lamp"), call("final_answer", answer="Done.")], [order])
    result = runner.invoke("Order a lamp.")
    assert asked == ['Run order {"thing": "lamp"}?']
    assert ("on its way" in result["calls"][0]["returned"]) is runs


def test_a_call_that_repeats_leaves_the_answer_alone(agent) -> None:
    again = call("price_of", thing="lamp")
    runner, engine = agent([again, again, call("final_answer", answer="13")])
    assert runner.invoke("What does a lamp cost?")["answer"] == "13"
    assert "price_of" in str(engine.requests[1].grammar)
    assert "price_of" not in str(engine.requests[2].grammar)


def test_an_agent_without_an_answer_says_so(agent) -> None:
    runner, _ = agent([call("price_of", thing=str(number)) for number in range(9)], max_steps=3)
    *events, result = runner.stream("What do nine lamps cost?")
    assert result.value["answer"] == ""
    assert len(result.value["calls"]) == 3
    assert any("raise --max-steps" in event.text for event in events if isinstance(event, Notice))


def test_the_history_stands_before_the_task(agent) -> None:
    runner, engine = agent([call("final_answer", answer="Yes.")])
    told = [{"role": "user", "content": "I look for lamps."}, {"role": "assistant", "content": "Good."}]
    runner.invoke("Are there any?", history=told)
    prompt = engine.prompts[0]
    assert prompt.index("I look for lamps.") < prompt.index("Are there any?")


# Apps as tools -------------------------------------------------------------------------------------------------------


def test_an_installed_app_answers_as_a_tool_with_its_sources(calpaca_runtime, tmp_path, monkeypatch) -> None:
    from calpaca.core.settings import Settings

    (tmp_path / "handbook.md").write_text(HANDBOOK)
    settings = Settings(apps={"handbook": {"app": "retrieval_qa", "files": [str(tmp_path / "handbook.md")]}})
    script = [
        call("handbook", question="Who keeps the key?"),
        "Mrs Abendroth keeps it.",
        call("final_answer", answer="Mrs Abendroth."),
    ]
    runtime = calpaca_runtime(script, settings=settings)
    *events, result = build(AgentOptions(tools=["handbook"]), runtime).stream("Whom do I ask for the key?")
    assert result.value["answer"] == "Mrs Abendroth."
    assert "Abendroth" in result.value["calls"][0]["returned"]
    assert [Path(event.source).name for event in events if isinstance(event, Source)] == ["handbook.md"]


def test_a_tool_that_is_not_there_and_an_agent_of_itself_are_refused(calpaca_runtime) -> None:
    with pytest.raises(UsageError, match="nothing_here"):
        build(AgentOptions(tools=["nothing_here"]), calpaca_runtime([]))
    with pytest.raises(UsageError, match="its own tool"):
        build(AgentOptions(tools=["agent"]), calpaca_runtime([]))


def test_an_app_as_a_tool_takes_its_input_and_its_open_options(calpaca_runtime) -> None:
    runtime = calpaca_runtime(["A summary."])
    made = runtime.apps.get("summarize").as_tool(runtime)
    assert "text" in made.args_schema.model_fields
    assert {"strategy", "length"} < set(made.args_schema.model_fields)
    assert {"files", "model", "temperature"}.isdisjoint(made.args_schema.model_fields)
    assert made.invoke({"text": "The keeper rang twice.", "length": "short"}) == "A summary."
    assert made.metadata == {"effects": "read"}
    bare = runtime.apps.get("summarize").as_tool(runtime, options=())
    assert set(bare.args_schema.model_fields) == {"text"}


# MCP -----------------------------------------------------------------------------------------------------------------

SERVER = """
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

server = MCPServer("shop")

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def price_of(thing: str) -> str:
    "Look up a price."
    if thing != "lamp":
        raise ToolError("there are only lamps")
    return "13"

@server.tool()
def order(thing: str) -> str:
    "Order a thing."
    return "ordered"

server.run()
"""


@pytest.fixture
def shop(tmp_path) -> str:
    file = tmp_path / "shop.py"
    file.write_text(SERVER)
    return f"{sys.executable} {file}"


def test_tools_of_an_mcp_server_are_called_and_those_that_do_not_say_that_they_read_may_write(agent, shop) -> None:
    script = [
        call("price_of", thing="lamp"), call("price_of", thing="bed"), call("order", thing="lamp"),
        call("final_answer", answer="13"),
    ]  # fmt: skip
    runner, _ = agent(script, (), mcp=[shop])
    returned = [each["returned"] for each in runner.invoke("What does a lamp cost?")["calls"]]
    assert returned[0] == "13"
    assert "only lamps" in returned[1]
    assert "nobody allowed" in returned[2]


@pytest.mark.parametrize("server", ["no-such-program --x", f"{sys.executable} -c pass", "http://127.0.0.1:9/mcp"])
def test_a_server_that_cannot_be_used_is_named(server) -> None:
    with pytest.raises(McpServerError) as error, McpServers([server]):
        pass
    assert server in error.value.message


@pytest.mark.slow
def test_an_mcp_client_lists_and_calls_an_app(tmp_path) -> None:
    """The whole way: the program serves summarize over stdin and stdout, on the embedded model."""
    with McpServers([f"{sys.executable} -m calpaca mcp --app summarize"]) as servers:
        (summarize,) = servers.tools()
        assert (summarize.name, summarize.metadata) == ("summarize", {"effects": "read"})
        assert "length" in summarize.args_schema["properties"]
        text = summarize.invoke({"text": "The keeper of the tower rang the bell twice.", "length": "short"})
        assert text
