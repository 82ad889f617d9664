"""The app `agent`."""

from __future__ import annotations

from calpaca.core.errors import UsageError
from calpaca.core.runtime import Runtime
from calpaca.plugins.instances import find_instance
from calpaca_agent.agent import Agent
from calpaca_agent.options import AgentOptions

__all__ = ["Agent", "build"]


def build(options: AgentOptions, runtime: Runtime) -> Agent:
    """An agent with the tools and the model that the options name; both are opened when it is asked.

    Raises UsageError for a tool that there is not, ModelNotFoundError for an unknown model.
    """
    for name in options.tools:
        if find_instance(name, runtime).app.name == "agent":
            raise UsageError("An agent cannot be its own tool.", "Leave --tool agent out.")
    runtime.check(options.spec())
    options.sampling(runtime.settings)
    return Agent(options, runtime)
