"""The texts to sum up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calpaca.core.errors import CalpacaError, DocumentError
from calpaca.core.registry import Component, Registry
from calpaca.documents.loaders import find_files, load_file
from calpaca.documents.sentences import Form


@dataclass(frozen=True)
class SourceText:
    """One document's text: all that its loader gave, pages parted by a blank line."""

    name: str
    text: str
    form: Form = "text"


@dataclass
class Source:
    """The texts in order, and files of a folder that could not be read, with the reason."""

    texts: list[SourceText] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def characters(self) -> int:
        return sum(len(each.text) for each in self.texts)


def read_source(paths: Sequence[Path], loaders: Registry[Component]) -> Source:
    """Read files and folders.

    A file of a folder that cannot be read is noted and skipped. Raises DocumentError for a file that is named itself, for
    an empty document, and when there is nothing to read at all.
    """
    found, source = find_files(paths, loaders), Source()
    for path in found:
        try:
            source.texts.append(_read(path, loaders))
        except CalpacaError as error:
            if path in found.named:
                raise
            source.failed[str(path)] = error.message
    if not source.texts:
        raise DocumentError(
            f"None of the {len(source.failed)} files can be read." if source.failed else "There is no file to read.",
            next(iter(source.failed.values()), "Name a document with --file."),
        )
    return source


def _read(path: Path, loaders: Registry[Component]) -> SourceText:
    documents = load_file(path, loaders)
    form: Form = documents[0].metadata.get("format", "text")
    return SourceText(str(path), "\n\n".join(document.page_content for document in documents), form)
