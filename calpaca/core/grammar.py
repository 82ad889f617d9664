"""Constrained decoding with llguidance: which tokens may come next under a JSON schema, regex or Lark grammar."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from calpaca.core.engine import Grammar
from calpaca.core.errors import UnsupportedError, UsageError
from calpaca.core.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = frozenset({"json_schema", "regex", "lark"})

# One way to write each JSON value, the one that instruct models were trained on: small models otherwise lose
# themselves in white space.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; the vocabulary is prepared at first use (about a second)."""

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int, eos_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._size = vocabulary_size
        self._eos_ids = eos_ids
        self._prepared: Any = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """Raises UsageError for an invalid grammar and UnsupportedError for a schema keyword it cannot honour."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), _source(grammar), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().split("\n")[0]
            kind = UnsupportedError if "nimplemented" in reason or "not supported" in reason else UsageError
            raise kind(f"This {grammar.kind.replace('_', ' ')} cannot be used: {reason}", "Simplify it.")
        return GrammarMatcher(matcher, self._size)

    def _vocabulary(self) -> Any:
        with self._lock:
            if self._prepared is None:
                from llguidance import LLTokenizer, TokenizerWrapper

                source = self._tokenizer.for_grammar()
                wrapped = source if isinstance(source, str) else TokenizerWrapper(source)
                self._prepared = LLTokenizer(wrapped, n_vocab=self._size, eos_token=self._eos_ids)
            return self._prepared


def _source(grammar: Grammar) -> str:
    """llguidance's own form of a grammar."""
    from llguidance import LLMatcher

    source: str
    if grammar.kind == "json_schema":
        if isinstance(grammar.value, str):
            raise UsageError("A JSON schema must be a mapping.", "Parse the text first.")
        source = LLMatcher.grammar_from_json_schema(dict(grammar.value), overrides=_JSON_STYLE)
    elif grammar.kind == "regex":
        source = LLMatcher.grammar_from_regex(str(grammar.value))
    else:
        source = LLMatcher.grammar_from_lark(str(grammar.value))
    return source


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._size = vocabulary_size

    @property
    def finished(self) -> bool:
        """The text is complete and nothing may follow; true before an end token was sampled."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """[vocabulary size] True for tokens that may come next."""
        import numpy as np

        mask = np.zeros((self._size + 31) // 32, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return np.unpackbits(mask.view(np.uint8), bitorder="little", count=self._size).astype(np.bool_)

    def accept(self, token_id: int) -> None:
        """Step on with a token that was allowed."""
        self._matcher.consume_token(token_id)
