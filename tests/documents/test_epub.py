import io
import zipfile
from pathlib import Path

import pytest

from calpaca.core.errors import DocumentError
from calpaca.documents.loaders import load_file

CONTAINER = """<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Of Llamas</dc:title></metadata>
<manifest><item id="two" href="text/chapter%202.xhtml"/><item id="one" href="one.xhtml"/><item id="cover" href="c.xhtml"/></manifest>
<spine><itemref idref="cover"/><itemref idref="one"/><itemref idref="two"/></spine></package>"""
BOOK = {
    "META-INF/container.xml": CONTAINER,
    "OEBPS/book.opf": PACKAGE,
    "OEBPS/c.xhtml": "<html><body><img src='cover.png'/></body></html>",
    "OEBPS/one.xhtml": "<html><head><title>I</title></head><body><h1>Wool</h1><p>Llamas hum.</p></body></html>",
    "OEBPS/text/chapter 2.xhtml": "<html><body><h1>Food</h1><p>羊驼吃草。</p></body></html>",
}


@pytest.fixture
def load(runtime, tmp_path: Path):
    def load(parts: dict[str, str], cut: int | None = None):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, text in parts.items():
                archive.writestr(name, text)
        file = tmp_path / "book.epub"
        file.write_bytes(buffer.getvalue()[:cut])
        return load_file(file, runtime.loaders)

    return load


def encryption(part: str) -> dict[str, str]:
    space = "http://www.w3.org/2001/04/xmlenc#"
    reference = f'<CipherData xmlns="{space}"><CipherReference URI="{part}"/></CipherData>'
    return {"META-INF/encryption.xml": f"<encryption>{reference}</encryption>"}


def test_chapters_come_in_reading_order_with_their_place_and_the_title(load) -> None:
    assert [(each.page_content, each.metadata["page"], each.metadata["title"]) for each in load(BOOK)] == [
        ("# Wool\n\nLlamas hum.", 2, "Of Llamas"),
        ("# Food\n\n羊驼吃草。", 3, "Of Llamas"),
    ]


def test_scrambled_fonts_are_no_protection_of_the_text(load) -> None:
    assert len(load(BOOK | encryption("OEBPS/font.otf"))) == 2


@pytest.mark.parametrize(
    ("parts", "cut", "message"),
    [
        (BOOK | encryption("OEBPS/text/chapter%202.xhtml"), None, "protected against copying"),
        (BOOK, -30, "damaged or cut short"),
        ({"readme.txt": "hello"}, None, "is no EPUB book"),
        (BOOK | {"OEBPS/book.opf": "<package>"}, None, "is no EPUB book"),
        (BOOK | {"META-INF/container.xml": "<container/>"}, None, "is no EPUB book"),
        ({name: BOOK[name] for name in list(BOOK)[:3]}, None, "is no EPUB book"),
    ],
)
def test_a_book_that_cannot_be_read_is_a_clear_error(load, parts, cut, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        load(parts, cut)
