"""Bytes of a text file to text."""

from __future__ import annotations

import codecs

from charset_normalizer import from_bytes

from calpaca.core.errors import DocumentError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LEGACY = ["gb18030", "big5", "shift_jis", "cp1252"]
"""Encodings that text without UTF-8 is tried in; the first wins where several read equally well."""

_TEXT_CONTROLS = frozenset(b"\t\n\r\f\b\x1b")
_SAMPLE = 65536
_MOST_CONTROLS = 0.02


def decode(data: bytes, name: str) -> tuple[str, str]:
    """Text and encoding of `data`. Line ends are kept.

    A byte order mark decides; then UTF-8, then what charset-normalizer finds among GB18030, Big5, Shift-JIS and
    Windows-1252. Raises DocumentError, with `name`, for binary data and for bytes that are no text in any of them.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _strict(data, encoding, name), encoding
    if _is_binary(data):
        raise DocumentError(f"{name} is a binary file, not text.", "Name a text or Markdown file.")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    best = from_bytes(data, cp_isolation=_LEGACY).best()
    if best is None:
        raise _unreadable(name)
    return _strict(data, best.encoding, name), best.encoding


def _strict(data: bytes, encoding: str, name: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _unreadable(name) from error


def _unreadable(name: str) -> DocumentError:
    return DocumentError(
        f"The encoding of {name} is unknown, or the file is damaged.", "Save it as UTF-8 and try again."
    )


def _is_binary(data: bytes) -> bool:
    sample = data[:_SAMPLE]
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in sample)
    return b"\0" in data or controls > _MOST_CONTROLS * len(sample)
