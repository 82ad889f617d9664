"""Input embeddings and output layer as one tensor: what an adapter does to one of them and to the other.

PEFT keeps both ends of a tie apart where modules were trained whole, and in step where tokens were. A low-rank change
of one end is another matter: PEFT adds it to the shared tensor, so that the merged model computes something else than
base and adapter do, and advises to untie the base before. Here the base is untied then.
"""

from __future__ import annotations

from collections.abc import Sequence

from calpaca.core.adapters import HEAD, Adapter
from calpaca.core.merge.base_model import BaseModel, same_bytes
from calpaca.core.merge.changes import Change, Rows


def replacements(adapter: Adapter, base: BaseModel, tied: bool) -> dict[str, str]:
    """Names of the model's tensors that are replaced: the adapter's tensor that is taken.

    A module that was trained whole (`modules_to_save`) stands beside the base's, so the other end of a tie keeps its
    values. Embeddings that were only saved because they had grown are one tensor at both ends.
    """
    replaced = {name: name for name in adapter.replaced}
    ends = [name for name in (str(base.embedding), HEAD) if name in replaced]
    if not tied or not ends or (_was_trained(adapter, ends) and not adapter.config.get("ensure_weight_tying")):
        return replaced
    if len(ends) == 2 and not _same(adapter, *ends):
        return replaced
    return {**replaced, str(base.embedding): ends[0], HEAD: ends[0]}


def _was_trained(adapter: Adapter, names: Sequence[str]) -> bool:
    saved = tuple(adapter.config.get("modules_to_save") or ())
    return any(name.removesuffix(".weight").endswith(saved) for name in names) if saved else False


def tie_rows(changes: dict[str, list[Change]], adapter: Adapter, base: BaseModel) -> dict[str, list[Change]]:
    """Tokens that were trained in tied embeddings are those of the output layer, too."""
    embedding = str(base.embedding)
    rows = [change for change in changes.get(embedding, ()) if isinstance(change, Rows)]
    own = [change for change in changes.get(HEAD, ()) if isinstance(change, Rows)]
    if not rows or (own and not _same(adapter, rows[0].name, own[0].name)):
        return changes
    others = [change for change in changes.get(HEAD, ()) if not isinstance(change, Rows)]
    return {**changes, HEAD: [*rows, *others]}


def _same(adapter: Adapter, a: str, b: str) -> bool:
    return same_bytes(adapter.checkpoint, adapter.keys[a], adapter.checkpoint, adapter.keys[b])
