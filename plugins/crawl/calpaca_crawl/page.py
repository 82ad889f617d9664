"""A page as a document: its main text as Markdown, title, date, language and links."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from calpaca.core.errors import DocumentError

_DECLARED = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w-]+)""", re.IGNORECASE)


@dataclass(frozen=True)
class Page:
    """What is kept of a page. `text` is Markdown; `date` is YYYY-MM-DD; `file` names a kept PDF."""

    url: str
    title: str = ""
    text: str = ""
    date: str | None = None
    language: str | None = None
    file: str | None = None

    def written(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_page(url: str, body: bytes, declared: str | None) -> Page:
    """Extract a page. `declared` is the encoding that its server names."""
    from trafilatura.core import bare_extraction, determine_returnstring
    from trafilatura.settings import Document, Extractor

    options = Extractor(output_format="markdown", comments=False, with_metadata=True, url=url)
    found = bare_extraction(decoded(body, declared), options=options)
    if not isinstance(found, Document):
        return Page(url)
    options.with_metadata = False  # title and date are fields of ours, and no header of the text
    text = determine_returnstring(found, options).strip()
    return Page(url, found.title or "", text, found.date, language(text))


def decoded(body: bytes, declared: str | None) -> str:
    """The text of a page, by the encoding that it or its server names, if it holds; else by the one it really has."""
    from calpaca.core.encoding import decode

    named = _DECLARED.search(body[:4096])
    for encoding in (declared, named.group(1).decode("ascii", "replace") if named else None):
        try:
            if encoding:
                return body.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    try:
        return decode(body, "a page")[0]
    except DocumentError:
        return body.decode("utf-8", errors="replace")


def language(text: str) -> str | None:
    """The language's ISO 639-1 code; None for too little text."""
    import py3langid

    return str(py3langid.classify(text[:1000])[0]) if len(text) >= 20 else None
