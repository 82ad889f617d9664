"""How often an agent gets a task right that takes two tools: randomised tasks in English and Chinese.

Run: python bench/agent.py [--model NAME_OR_FILE] [--tasks 10] [--seed 0] [--engine auto]

The price of a thing has to be looked up by one tool, and its multiple computed by another. A task counts when the answer
has the right value and both tools were called. Prints every task, its calls and its answer.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from langchain_core.tools import BaseTool, tool

from calpaca import runtime
from calpaca_agent.agent import Agent
from calpaca_agent.options import AgentOptions

THINGS = {"lamp": "灯", "chair": "椅子", "book": "书", "cup": "杯子", "clock": "钟"}


@dataclass(frozen=True)
class Task:
    """What is asked, the tools with their data, and the value that the answer must have."""

    text: str
    tools: list[BaseTool]
    wanted: int
    called: frozenset[str]


def task_of(number: int, draw: random.Random) -> Task:
    """A thing, its price, a count; every second task in Chinese."""
    chinese = bool(number % 2)
    english, price, count = draw.choice(list(THINGS)), draw.randint(11, 97), draw.randint(3, 19)
    thing = THINGS[english] if chinese else english
    text = f"{count}个{thing}一共多少钱？" if chinese else f"How much do {count} {thing}s cost together?"

    @tool
    def price_of(thing: str) -> str:
        """Look up the price of one thing, by its name."""
        known = english in thing.lower() or THINGS[english] in thing
        return f"{price}" if known else f"There is no {thing} here; there is: {english} ({THINGS[english]})."

    @tool
    def total(price: int, count: int) -> str:
        """The cost of several things: the price of one, times their count."""
        return str(price * count)

    return Task(text, [price_of, total], price * count, frozenset({"price_of", "total"}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=None)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    options = AgentOptions(
        model=arguments.model, engine=arguments.engine, temperature=0, max_new_tokens=128, approve="always"
    )
    right = 0
    with runtime() as shared:
        for number in range(arguments.tasks):
            task = task_of(number, draw)
            value = Agent(options, shared, task.tools).invoke(task.text)
            called = {call["tool"] for call in value["calls"]}
            good = str(task.wanted) in value["answer"].replace(",", "") and task.called <= called
            right += good
            calls = "; ".join(f"{call['tool']}{call['arguments']} = {call['returned']}" for call in value["calls"])
            print(
                f"{'right' if good else 'WRONG'}  {task.text}  [{calls}]  {value['answer']!r}  (wanted {task.wanted})"
            )
    print(f"{right} of {arguments.tasks} right")


if __name__ == "__main__":
    main()
