"""The Hugging Face form of an original checkpoint, made once and kept in the cache by contents."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from calpaca.core.checkpoint.write import write_model
from calpaca.core.convert.conversion import Target, plan_conversion
from calpaca.core.convert.tokenizer_files import MODEL_FILE
from calpaca.core.disk import megabytes
from calpaca.core.errors import UsageError
from calpaca.core.fingerprint import file_digest, fingerprint
from calpaca.core.jobs import Ledger
from calpaca.core.paths import cache_dir

logger = logging.getLogger("calpaca")

_RECIPE = 1  # part of the cache's key: a better conversion must not find the older one's result


def hugging_face_folder(original: Path, jobs: Ledger) -> Path:
    """The Hugging Face folder of an original checkpoint, converted where that has not been done yet.

    Raises what `plan_conversion` and `write_model` raise.
    """
    folder = _place(original)
    if folder.is_dir():
        return folder
    conversion = plan_conversion(original, Target(form="hf"))
    assert conversion.plan is not None
    logger.info(
        "%s: it is converted to a Hugging Face folder of %s, once.", conversion.source, megabytes(conversion.plan.size)
    )
    for note in conversion.notes:
        logger.warning("%s", note)
    try:
        write_model(conversion.plan, folder, jobs)
    except UsageError:
        if not folder.is_dir():  # another process was faster
            raise
    return folder


def _place(original: Path) -> Path:
    """By the parts, `params.json` and the tokenizer, which may lie in the folder above."""
    beside, above = original / MODEL_FILE, original.absolute().parent / MODEL_FILE
    tokenizer = "" if beside.is_file() or not above.is_file() else file_digest(above)
    key = hashlib.sha256(f"{fingerprint(original)} {tokenizer} {_RECIPE}".encode()).hexdigest()
    return cache_dir() / "converted" / key[:32]
