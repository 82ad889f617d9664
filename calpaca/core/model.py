"""A loaded model: an engine, the chat template that belongs to it, and what identifies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

from calpaca.core.engine import Engine, Grammar, Handle, Request, Sampling
from calpaca.core.spec import ModelSpec
from calpaca.core.template import ChatTemplate, Message

if TYPE_CHECKING:
    from calpaca.core.files import ModelFiles
    from calpaca.core.runtime import Runtime


class Model:
    """Text and chat generation with one engine.

    `name` is what a person calls it, `files` what it was loaded from (None for an engine without files).
    """

    def __init__(
        self, name: str, spec: ModelSpec, engine: Engine, template: ChatTemplate, files: ModelFiles | None = None
    ) -> None:
        self.name = name
        self.spec = spec
        self.engine = engine
        self.template = template
        self.files = files

    @classmethod
    def load(cls, spec: ModelSpec, runtime: Runtime) -> Model:
        """Find the weights, check them, and open an engine on them. Raises ModelError."""
        from calpaca.core.files import find_files

        files = find_files(spec, runtime)
        Thread(target=_warm, args=[files], daemon=True).start()
        engine_name = "transformers" if spec.engine == "auto" else spec.engine
        engine = runtime.engines.get(engine_name).load()(files, runtime)
        return cls(files.name, spec, engine, engine.template, files)

    @property
    def fingerprint(self) -> str:
        """Digest of the contents of weights, adapters, tokenizer and template."""
        return self.files.fingerprint if self.files is not None else f"{self.engine.name}:{self.name}"

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.capabilities().context_length

    def generate(
        self, prompt: str | tuple[int, ...], sampling: Sampling = Sampling(), *, grammar: Grammar | None = None
    ) -> Handle:
        """Continue a text (bos is added where the model wants one) or token ids (taken as they are)."""
        ids = tuple(self.engine.encode(prompt, special_tokens=True)) if isinstance(prompt, str) else prompt
        return self.engine.submit(Request(ids, sampling, grammar))

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        grammar: Grammar | None = None,
    ) -> Handle:
        """Answer a conversation. `tools` are OpenAI function schemas, shown to the model."""
        from dataclasses import replace

        stops = tuple(dict.fromkeys((*sampling.stop, *self.template.stop)))
        to_the_letter = grammar is not None and grammar.kind == "regex"  # it may ask for a space
        prompt = tuple(self.message_ids(messages, tools))
        return self.engine.submit(Request(prompt, replace(sampling, stop=stops), grammar, new_text=not to_the_letter))

    def message_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of the rendered prompt, exactly as `chat` sends them: no message can spell a control token."""
        return self.engine.encode(self.template.parts(messages, tools))

    def close(self) -> None:
        self.engine.close()


def _warm(files: ModelFiles) -> None:
    """Hash the files while they are loaded; what goes wrong is raised when the fingerprint is asked for."""
    with suppress(Exception):
        _ = files.fingerprint
