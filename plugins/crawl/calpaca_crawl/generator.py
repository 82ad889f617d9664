"""A model that is asked for rows, held to a schema as long as it keeps to one."""

from __future__ import annotations

from dataclasses import dataclass

from calpaca.core.engine import Grammar, Handle, Sampling
from calpaca.core.model import Model
from calpaca_crawl.task import Task


@dataclass
class Generator:
    """A loaded model. `constrained` is switched off for a server that turns out not to know JSON schemas."""

    model: Model
    constrained: bool = True

    def __post_init__(self) -> None:
        self.constrained = self.constrained and "json_schema" in self.model.engine.capabilities().grammars

    def submit(self, task: Task, sampling: Sampling) -> Handle:
        grammar = Grammar("json_schema", task.schema) if self.constrained and task.schema is not None else None
        return self.model.chat([{"role": "user", "content": task.prompt}], sampling, grammar=grammar)

    def prompt_tokens(self, task: Task) -> int:
        """Tokens of the prompt; where a server does not count them, an estimate on the high side."""
        return self.model.count_tokens([{"role": "user", "content": task.prompt}])

    def takes_seeds(self) -> bool:
        return self.model.engine.capabilities().seed
