"""Tokenizer, chat template and the tokens that end an answer, as chat and server take them, without any weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core.errors import ModelError
from calpaca.core.files import ModelFiles
from calpaca.core.fingerprint import file_digest
from calpaca.core.template import ChatTemplate, choose_template
from calpaca.core.tokenizer import Tokenizer, load_tokenizer
from calpaca_trainer.dataset import Rendering, Stage
from calpaca_trainer.recipe import DataOptions
from calpaca_trainer.rendering import ConversationRenderer, TextRenderer

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Prompting:
    """How texts become tokens. The first of `eos_ids` is the tokenizer's own."""

    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    eos_ids: tuple[int, ...]

    @property
    def template_digest(self) -> str:
        """sha256 of the template's source."""
        return hashlib.sha256(self.template.source.encode()).hexdigest()

    def rendering(self, options: DataOptions, stage: Stage) -> Rendering:
        """How rows become examples."""
        key: dict[str, Any] = {
            "stage": stage,
            "tokenizer": {name: file_digest(self.folder / name) for name in _FILES if (self.folder / name).is_file()},
            "eos": list(self.eos_ids),
            "max_length": options.max_length,
        }
        if stage == "pretrain":
            texts = TextRenderer(self.tokenizer, self.eos_ids[0], max_length=options.max_length)
            return Rendering(stage, texts, key, options.unit)
        key |= {
            "template": self.template_digest,
            "special": dict(self.template.special_tokens),
            "loss": options.loss_on,
        }
        conversations = ConversationRenderer(
            self.template, self.tokenizer, self.eos_ids, loss_on=options.loss_on, max_length=options.max_length
        )
        return Rendering(stage, conversations, key)

    def answers(self, options: DataOptions) -> ConversationRenderer:
        """What renders a prompt with one answer to it."""
        return ConversationRenderer(
            self.template, self.tokenizer, self.eos_ids, loss_on="last", max_length=options.max_length
        )


def load_prompting(files: ModelFiles) -> Prompting:
    """The prompting of a model with its adapters. Raises ModelError when nothing ends an answer."""
    tokenizer = load_tokenizer(files.tokenizer, trust_remote_code=files.spec.trust_remote_code)
    own = tokenizer.token_id(tokenizer.special_tokens.get("eos_token", ""))
    stated = [_stated_eos(files.weights / name) for name in ("generation_config.json", "config.json")]
    ids = tuple(dict.fromkeys(index for index in (own, *stated[0], *stated[1]) if index is not None))
    if not ids:
        raise ModelError(
            f"Neither the tokenizer in {files.tokenizer} nor the model's configuration names a token that ends an answer.",
            'Set "eos_token" in tokenizer_config.json.',
        )
    return Prompting(files.tokenizer, tokenizer, choose_template(tokenizer, files.template), ids)


def _stated_eos(file: Path) -> list[int]:
    """`eos_token_id` of a configuration: a number, a list, or nothing."""
    if not file.is_file():
        return []
    value = json.loads(file.read_text("utf-8")).get("eos_token_id")
    return value if isinstance(value, list) else [value] if isinstance(value, int) else []
