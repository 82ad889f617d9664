"""The transformers engine: any model that transformers loads, with adapters, batched between steps."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import TYPE_CHECKING

from calpaca.core.adapters import Adapter
from calpaca.core.engine import Capabilities, Handle, Request, refuse_unsupported
from calpaca.core.engines.batch import Batch
from calpaca.core.engines.limits import check_bias, check_prompt, new_tokens
from calpaca.core.engines.rope import usable_context
from calpaca.core.engines.row import Row
from calpaca.core.errors import MissingExtraError
from calpaca.core.files import AdapterFiles, ModelFiles
from calpaca.core.grammar import KINDS, GrammarCompiler
from calpaca.core.template import NamedTemplate, choose_template

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca.core.weights import LoadedWeights


def open_engine(files: ModelFiles, runtime: Runtime) -> TransformersEngine:  # noqa: ARG001  # the registry's signature
    """Load the weights and start the engine. Raises ModelError."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError("The engine 'transformers'", "torch", error.name or "torch") from error
    del torch, transformers
    from calpaca.core.weights import load_weights

    return TransformersEngine(load_weights(files), files.template)


class TransformersEngine:
    """Runs one loaded model, which it takes over. Thread-safe; see `calpaca.core.engine.Engine`."""

    name = "transformers"

    def __init__(self, weights: LoadedWeights, template: NamedTemplate | None = None) -> None:
        self.template = choose_template(weights.tokenizer, template)
        self._tokenizer = weights.tokenizer
        self._vocabulary_size = weights.vocabulary_size
        self._context_length = usable_context(weights.model.config.get_text_config(), weights.context_length)
        self._eos_ids = frozenset(weights.eos_ids)
        self._grammars = GrammarCompiler(weights.tokenizer, weights.vocabulary_size, list(weights.eos_ids))
        self._details = {
            "device": str(weights.model.device),
            "dtype": str(weights.model.dtype).removeprefix("torch."),
        }
        self.batch = Batch(weights)
        atexit.register(self.close)  # a thread inside torch while the interpreter goes down would crash it

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context_length=self._context_length,
            max_logprobs=20,
            prompt_logprobs=True,
            grammars=KINDS,
            adapters=self.batch.decoder.slots,
            details=self._details,
        )

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(text, special_tokens=special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def submit(self, request: Request) -> Handle:
        """Queue a request; see `Engine.submit`."""
        refuse_unsupported(self.name, self.capabilities(), request)
        prompt = self.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)
        check_prompt(prompt, self._vocabulary_size)
        check_bias(request.sampling, self._vocabulary_size)
        row = Row(
            request, prompt, max_new_tokens=new_tokens(len(prompt), request.sampling.max_new_tokens, self._context_length),
            tokenizer=self._tokenizer, eos_ids=self._eos_ids,
            matcher=self._grammars.compile(request.grammar) if request.grammar is not None else None,
        )  # fmt: skip
        self.batch.submit(row, request.adapter)
        return row.handle

    def load_adapter(self, name: str, path: str | Path, scale: float = 1.0) -> None:
        """Load a LoRA adapter from its folder, for requests that name it; see `AdapterEngine`."""
        adapters = self.batch.adapters
        factors = adapters.read(Adapter(AdapterFiles(name, Path(path), scale)))
        self.batch.change(lambda: adapters.load(name, factors))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way with it go on to their end."""
        self.batch.forget_adapter(name)

    def close(self) -> None:
        self.batch.close()
        atexit.unregister(self.close)
