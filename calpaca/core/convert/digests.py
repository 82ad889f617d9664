"""Digests of an original checkpoint's tensors as Hugging Face has them, so that both forms can be compared."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from calpaca.core.checkpoint.manifest import TensorRecord
from calpaca.core.checkpoint.plan import PlannedTensor
from calpaca.core.convert.names import HF_EMBEDDINGS, HF_OUTPUT
from calpaca.core.convert.parts import open_original


def original_records(folder: Path, *, tied: bool = False) -> dict[str, TensorRecord]:
    """The record of every whole tensor under its Hugging Face name, by reading all parts once.

    `tied` leaves the output layer out where it is the embeddings, as a model with tied embeddings has it.
    """
    tensors = open_original(folder).tensors
    with ThreadPoolExecutor(2) as pool:  # hashing releases Python's lock
        digests = list(pool.map(_digest, tensors))
    records = {
        tensor.name: TensorRecord("consolidated.00.pth", tensor.dtype, tensor.shape, digest)
        for tensor, digest in zip(tensors, digests, strict=True)
    }
    if tied and records[HF_OUTPUT].sha256 == records[HF_EMBEDDINGS].sha256:
        del records[HF_OUTPUT]
    return records


def _digest(tensor: PlannedTensor) -> str:
    digest = hashlib.sha256()
    for chunk in tensor.chunks():
        digest.update(chunk)
    return digest.hexdigest()
