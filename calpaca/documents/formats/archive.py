"""Zip archives that hold a document: DOCX, PPTX, XLSX, EPUB."""

from __future__ import annotations

import hashlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

from calpaca.core.errors import DocumentError

MOST_BYTES = 1 << 30
"""Unpacked size of all parts together that is still read."""

MOST_MARKUP_BYTES = 256 << 20
"""The same for the parts that are parsed; a tree of XML takes about ten times its size in memory."""

_COMPOUND_FILE = bytes.fromhex("d0cf11e0a1b11ae1")
"""First bytes of Microsoft's Compound File: documents of before 2007, and newer ones that a password locks
([MS-CFB], [MS-OFFCRYPTO])."""

_ENCRYPTED = 0x1


def describe_archive(path: str, form: str) -> dict[str, str | bool]:
    """Check an archive; the metadata that all documents in it share: `source`, `sha256` of the file, `format`, and
    `converted` where lines of the text are none of the file.

    Raises as `check_archive`.
    """
    check_archive(path)
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"source": path, "sha256": digest, "format": form, "converted": form != "rows"}


def check_archive(path: str) -> None:
    """Look at an archive's table of contents before anything is unpacked.

    zipfile never unpacks more of a part than the table says, so the sizes there are a bound. Raises OSError, and
    DocumentError when the file is no archive, is damaged, is locked, or would unpack to too much.
    """
    with Path(path).open("rb") as file:
        if file.read(len(_COMPOUND_FILE)) == _COMPOUND_FILE:
            raise DocumentError(
                f"{path} is locked by a password, or has the format of before 2007.",
                "Open it in an office program and save a copy as .docx, .pptx or .xlsx without a password.",
            )
    try:
        with ZipFile(path) as archive:
            parts = archive.infolist()
    except BadZipFile as error:
        raise DocumentError(f"{path} is damaged or cut short: {error}.", "Copy or download the file again.") from error
    if any(part.flag_bits & _ENCRYPTED for part in parts):
        raise DocumentError(f"{path} is locked by a password.", "Save a copy without one and name that.")
    _check_sizes(path, parts)


def _check_sizes(path: str, parts: list[ZipInfo]) -> None:
    markup = sum(part.file_size for part in parts if part.filename.lower().endswith((".xml", ".rels", "html", ".htm")))
    for size, most in ((sum(part.file_size for part in parts), MOST_BYTES), (markup, MOST_MARKUP_BYTES)):
        if size > most:
            raise DocumentError(
                f"{path} would unpack to {size >> 20:,} MiB, more than the {most >> 20:,} MiB that are read.",
                "Split it into several files, if you trust where it comes from.",
            )
