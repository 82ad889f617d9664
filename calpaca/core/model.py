"""A loaded model: an engine, the chat template that belongs to it, and what identifies it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

from calpaca.core.engine import Conversation, ConversationEngine, Engine, Grammar, Handle, Request, Sampling
from calpaca.core.errors import ModelError, UnsupportedError
from calpaca.core.spec import ModelSpec
from calpaca.core.template import ChatTemplate, Message

if TYPE_CHECKING:
    from calpaca.core.files import AdapterFiles, ModelFiles
    from calpaca.core.runtime import Runtime

log = logging.getLogger("calpaca")


class Model:
    """Text and chat generation with one engine.

    `name` is what a person calls it, `files` what it was loaded from (None for an engine without files). `adapter`
    names one that its engine has loaded and that all its requests get.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        engine: Engine,
        template: ChatTemplate,
        files: ModelFiles | None = None,
        *,
        adapter: str | None = None,
    ) -> None:
        self.name = name
        self.spec = spec
        self.engine = engine
        self.template = template
        self.files = files
        self.adapter = adapter

    @classmethod
    def load(cls, spec: ModelSpec, runtime: Runtime) -> Model:
        """Find the weights, check them, and open an engine on them; or ask a server for it. Raises ModelError."""
        from calpaca.core.engine_choice import choose_engine
        from calpaca.core.files import find_files

        if not runtime.is_local(spec):
            remote: Engine = runtime.engines.get(spec.engine).load()(spec, runtime)
            return cls(str(remote.capabilities().details["model"]), spec, remote, remote.template)
        files = find_files(spec, runtime)
        if runtime.attaches and (attached := cls._attached(files, runtime)) is not None:
            return attached
        Thread(target=_warm, args=[files], daemon=True).start()
        engine_name = choose_engine(files, runtime) if spec.engine == "auto" else spec.engine
        engine = runtime.engines.get(engine_name).load()(files, runtime)
        return cls(files.name, spec, engine, engine.template, files)

    @classmethod
    def _attached(cls, files: ModelFiles, runtime: Runtime) -> Model | None:
        """The model as a running server of this user has it loaded; None where none has, or does not answer."""
        from calpaca.core.attaching import find_running

        try:
            found = find_running(files)
            if found is None:
                return None
            engine: Engine = runtime.engines.get(found.engine).load()(found, runtime)
        except ModelError as error:
            log.warning("No running server is asked, the model is loaded here. %s", error.message)
            return None
        log.info("Asking the running server at %s.", found.model)
        return cls(files.name, files.spec, engine, engine.template, files)

    def adapted(self, files: AdapterFiles) -> Model:
        """This model with an adapter that its engine has loaded under the name in `files`."""
        from dataclasses import replace

        from calpaca.core.spec import AdapterSpec

        added = AdapterSpec(source=str(files.path), scale=files.scale)
        spec = self.spec.model_copy(update={"adapters": (*self.spec.adapters, added)})
        own = self.files and replace(self.files, spec=spec, adapters=(*self.files.adapters, files))
        return Model(files.name, spec, self.engine, self.template, own, adapter=files.name)

    @property
    def fingerprint(self) -> str:
        """Digest of the contents of weights, adapters, tokenizer and template; without files, what the engine says."""
        if self.files is not None:
            return self.files.fingerprint
        return str(self.engine.capabilities().details.get("fingerprint", f"{self.engine.name}:{self.name}"))

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; None where a server does not tell."""
        return self.engine.capabilities().context_length

    def generate(
        self,
        prompt: str | tuple[int, ...],
        sampling: Sampling = Sampling(),
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> Handle:
        """Continue a text (bos is added where the model wants one) or token ids (taken as they are)."""
        if isinstance(prompt, str) and not self.engine.capabilities().conversations:
            prompt = tuple(self.engine.encode(prompt, special_tokens=True))
        return self.engine.submit(
            Request(prompt, sampling, grammar, adapter=self.adapter, prompt_logprobs=prompt_logprobs)
        )

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

        if self.engine.capabilities().conversations:
            conversation = Conversation(tuple(messages), tuple(tools))
            return self.engine.submit(Request("", sampling, grammar, self.adapter, conversation=conversation))
        stops = tuple(dict.fromkeys((*sampling.stop, *self.template.stop)))
        to_the_letter = grammar is not None and grammar.kind == "regex"  # it may ask for a space
        prompt = tuple(self.message_ids(messages, tools))
        sampling = replace(sampling, stop=stops)
        return self.engine.submit(Request(prompt, sampling, grammar, self.adapter, new_text=not to_the_letter))

    def message_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of the rendered prompt, exactly as `chat` sends them: no message can spell a control token.

        Raises UnsupportedError where a server renders it.
        """
        if self.engine.capabilities().conversations:
            raise UnsupportedError(
                f"The engine '{self.engine.name}' does not show the prompt that a conversation becomes.",
                "Model.count_tokens counts its tokens.",
            )
        return self.engine.encode(self.template.parts(messages, tools))

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the rendered prompt; an estimate on the high side where a server renders it and does not count."""
        if isinstance(self.engine, ConversationEngine):
            return self.engine.count_tokens(Conversation(tuple(messages), tuple(tools)))
        return len(self.message_ids(messages, tools))

    def close(self) -> None:
        self.engine.close()


def _warm(files: ModelFiles) -> None:
    """Hash the files while they are loaded; what goes wrong is raised when the fingerprint is asked for."""
    with suppress(Exception):
        _ = files.fingerprint
