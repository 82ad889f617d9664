"""Web pages, with their headings, lists, tables and preformatted text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from selectolax.lexbor import LexborHTMLParser, LexborNode

from calpaca.core.encoding import decode
from calpaca.documents.formats import markdown

_LEFT_OUT = [
    *("script", "style", "noscript", "template", "nav", "aside", "iframe", "svg", "canvas", "object"),
    *("button", "select", "input", "textarea", "dialog"),
]
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_BLOCKS = frozenset(
    [
        *("address", "article", "blockquote", "body", "center", "dd", "details", "div", "dl", "dt", "fieldset"),
        *("figcaption", "figure", "footer", "form", "header", "hr", "html", "li", "main", "ol", "p", "section"),
        *("summary", "tbody", "td", "tfoot", "th", "thead", "tr", "ul", *_HEADINGS, "table", "pre"),
    ]
)
_DECLARED = re.compile(rb"<(?:meta[^>]+charset|\?xml[^>]+encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


class HtmlLoader(BaseLoader):
    """One document per page, written as Markdown; scripts, menus and forms are left out.

    Metadata: `source` (path), `sha256` of the file, `format` (`markdown`), and `title` if the page has one. A page
    without a first-level heading gets its title as one.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is no text."""
        data = Path(self.path).read_bytes()
        text, title = read_page(page_text(data, self.path))
        named = {"title": title} if title else {}
        digest = hashlib.sha256(data).hexdigest()
        yield Document(
            text, metadata={"source": self.path, "sha256": digest, "format": "markdown", "converted": True, **named}
        )


def page_text(data: bytes, name: str) -> str:
    """Markup as text, in the encoding that it declares if it is read by that one, else in the detected one.

    Raises DocumentError for binary data.
    """
    declared = _DECLARED.search(data[:2048])
    if declared:
        try:
            return data.decode(declared[1].decode("ascii"))
        except (LookupError, UnicodeDecodeError):
            pass
    return decode(data, name)[0]


def read_page(html: str) -> tuple[str, str]:
    """Markdown and title of a page, however broken its markup is: it is parsed as browsers do (HTML 5)."""
    tree = LexborHTMLParser(html)
    title = markdown.one_line(node.text()) if (node := tree.css_first("head title")) else ""
    tree.strip_tags(_LEFT_OUT)
    if tree.body is None:
        return "", title
    parts = list(_parts(tree.body))
    if title and tree.css_first("h1") is None:
        parts.insert(0, markdown.heading(1, title))
    return markdown.join(parts), title


def _parts(root: LexborNode) -> Iterator[str]:
    """The blocks of an element in reading order. Walks with a stack of its own: pages nest deeper than Python may."""
    line: list[str] = []  # text of the paragraph in hand
    bullet = ""
    stack: list[LexborNode | None] = [root]  # None: the end of a block
    while stack:
        node = stack.pop()
        if node is not None and node.tag == "-text":
            line.append(node.text_content or "")
            continue
        if node is not None and node.tag == "br":
            line.append("\n")
            continue
        is_block = node is None or node.tag in _BLOCKS
        if is_block and (text := _paragraph(line)):
            yield bullet + text
            bullet = ""
        if is_block:
            line = []
        if node is None:
            continue
        whole = _whole(node)
        if whole is not None:
            yield whole
            continue
        bullet = "- " if node.tag == "li" else bullet
        if is_block:
            stack.append(None)
        stack.extend(reversed(list(node.iter(include_text=True))))


def _paragraph(line: list[str]) -> str:
    lines = "".join(part if part == "\n" else re.sub(r"\s+", " ", part) for part in line).split("\n")
    return markdown.paragraph("\n".join(text for text in map(markdown.one_line, lines) if text))


def _whole(node: LexborNode) -> str | None:
    """An element that is written at once; None for one whose children are walked."""
    if node.tag in _HEADINGS:
        return markdown.heading(int(str(node.tag)[1]), node.text())
    if node.tag == "pre":
        return markdown.fence(node.text())
    if node.tag == "table" and node.css_first("table table") is None:
        rows = [[cell.text(separator=" ") for cell in row.css("th, td")] for row in node.css("tr")]
        return markdown.table(rows) if max(map(len, rows), default=0) > 1 else None  # one column: for the layout
    return None
