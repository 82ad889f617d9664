"""Configuration files: one JSON object each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calpaca.core.errors import CorruptFileError, ModelNotFoundError


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file. Raises ModelNotFoundError when there is no file, CorruptFileError when it is damaged."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{file.parent} has no {file.name}.", "Fetch it from where the weights came."
        ) from error
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{file} cannot be read: {error}.", "Fetch the file again.") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{file} holds no JSON object.", "Fetch the file again.")
    return content
