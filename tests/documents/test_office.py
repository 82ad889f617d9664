import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from calpaca.core.errors import DocumentError, MissingExtraError
from calpaca.documents.formats import archive
from calpaca.documents.loaders import load_file
from calpaca.documents.retrieval import Search, retrieve

docx = pytest.importorskip("docx", reason="needs calpaca[office]")
openpyxl = pytest.importorskip("openpyxl", reason="needs calpaca[office]")
pptx = pytest.importorskip("pptx", reason="needs calpaca[office]")


def word() -> bytes:
    document = docx.Document()
    document.core_properties.title = "Handbook"
    document.add_heading("Handbook", 0)
    document.add_paragraph("The llama hums.")
    document.add_heading("Food", 2)
    document.add_paragraph("Grass", style="List Bullet")
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ["Name", "Age", "Dolly", "7"], strict=True):
        cell.text = text
    wide = document.add_table(1, 3)
    wide.cell(0, 0).merge(wide.cell(0, 1)).text = "Both"
    wide.cell(0, 2).text = "One"
    document.add_paragraph("# no heading")
    return saved(document.save)


def slides() -> bytes:
    show = pptx.Presentation()
    first = show.slides.add_slide(show.slide_layouts[1])
    first.shapes.title.text = "Llamas"
    first.placeholders[1].text = "They hum.\nThey eat grass."
    first.notes_slide.notes_text_frame.text = "Mention the wool."
    show.slides.add_slide(show.slide_layouts[6])
    third = show.slides.add_slide(show.slide_layouts[6])
    group = third.shapes.add_group_shape()
    group.shapes.add_textbox(0, 0, 99, 99).text_frame.text = "Whales swim."
    cells = third.shapes.add_table(2, 2, 0, 0, 99, 99).table
    for number, text in enumerate(["Name", "Age", "Willy", "9"]):
        cells.cell(number // 2, number % 2).text = text
    return saved(show.save)


def workbook() -> bytes:
    book = openpyxl.Workbook()
    book.active.title = "Animals"
    for row in [("Name", "Age"), ("Dolly", 7), (None, None), ("Willy\nthe whale", 9.5)]:
        book.active.append(row)
    book.create_sheet("Empty")
    book.create_sheet("Keepers").append(["Ada"])
    return saved(book.save)


def saved(save: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


MAKERS = {"docx": word, "pptx": slides, "xlsx": workbook}


@pytest.fixture
def write(tmp_path: Path):
    def write(kind: str, data: bytes) -> Path:
        file = tmp_path / f"file.{kind}"
        file.write_bytes(data)
        return file

    return write


def test_a_word_document_is_read_with_headings_lists_and_tables(runtime, write) -> None:
    (document,) = load_file(write("docx", word()), runtime.loaders)
    assert document.metadata["title"] == "Handbook"
    assert document.page_content.split("\n\n") == [
        "# Handbook",
        "The llama hums.",
        "## Food",
        "- Grass",
        "| Name | Age |\n| --- | --- |\n| Dolly | 7 |",
        "| Both |  | One |",
        "\\# no heading",
    ]


def test_slides_are_pages_and_one_without_text_is_reported(runtime, write) -> None:
    documents = load_file(write("pptx", slides()), runtime.loaders)
    assert [(each.page_content, each.metadata["page"], each.metadata.get("scanned")) for each in documents] == [
        ("# Llamas\n\nThey hum.\n\nThey eat grass.\n\nMention the wool.", 1, None),
        ("", 2, True),
        ("Whales swim.\n\n| Name | Age |\n| --- | --- |\n| Willy | 9 |", 3, None),
    ]


def test_rows_of_a_sheet_are_lines_with_the_names_of_their_columns(runtime, write) -> None:
    documents = load_file(write("xlsx", workbook()), runtime.loaders)
    assert [(each.page_content, each.metadata["page"], each.metadata["heading"]) for each in documents] == [
        ("Name; Age\nName: Dolly; Age: 7\n\nName: Willy the whale; Age: 9.5", 1, "Animals"),
        ("Ada", 3, "Keepers"),
    ]


def test_a_passage_of_a_workbook_names_sheet_and_row(make_index, sync, write) -> None:
    index = make_index(write("xlsx", workbook()), chunk_size=8)
    sync(index)
    best = retrieve(index.store, "Name: Willy the whale; Age: 9.5", Search(k=1))[0]
    assert (best.page, best.start, best.end, best.metadata["heading"]) == (1, 4, 4, "Animals")


# Files that cannot be read --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_cut_short_is_damaged(runtime, write, kind: str) -> None:
    data = MAKERS[kind]()
    for length in (0, 3, len(data) // 2, len(data) - 5):
        with pytest.raises(DocumentError, match="is damaged or cut short"):
            load_file(write(kind, data[:length]), runtime.loaders)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_of_something_else_is_no_document(runtime, write, kind: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as other:
        other.writestr("hello.txt", "hello")
    with pytest.raises(DocumentError, match="cannot be read"):
        load_file(write(kind, buffer.getvalue()), runtime.loaders)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_locked_file_is_named_as_such(runtime, write, kind: str) -> None:
    with pytest.raises(DocumentError, match="locked by a password"):
        load_file(write(kind, bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504)), runtime.loaders)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_zip_bomb_is_refused_before_it_unpacks(runtime, write, kind: str) -> None:
    buffer = io.BytesIO(MAKERS[kind]())
    with (
        zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
        bomb.open("bomb.xml", "w") as part,
    ):
        for _ in range((archive.MOST_MARKUP_BYTES >> 20) + 1):
            part.write(bytes(1 << 20))
    assert len(buffer.getvalue()) < 2 << 20
    with pytest.raises(DocumentError, match=r"would unpack to 2\d\d MiB"):
        load_file(write(kind, buffer.getvalue()), runtime.loaders)


def test_a_bad_file_in_a_folder_does_not_stop_the_others(make_index, sync, notices, write) -> None:
    write("docx", word())
    index = make_index(write("pptx", b"PK").parent)
    assert [line for line in notices(sync(index)) if "file.pptx is damaged" in line]
    assert index.store.similarity_search("llama", k=1)


def test_without_the_extra_the_rest_of_a_folder_is_indexed(make_index, sync, notices, write, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "docx", None)
    monkeypatch.delitem(sys.modules, "calpaca.documents.formats.docx", raising=False)
    file = write("docx", word())
    (file.parent / "a.txt").write_text("Llamas hum.")
    index = make_index(file.parent)
    assert [line for line in notices(sync(index)) if "file.docx" in line and "calpaca[office]" in line]
    assert len(index) == 1 and list(index.failed) == [file]


@pytest.mark.parametrize(("kind", "package"), [("docx", "docx"), ("pptx", "pptx"), ("xlsx", "openpyxl")])
def test_without_the_extra_the_error_says_what_to_install(runtime, write, monkeypatch, kind: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"calpaca.documents.formats.{kind}", raising=False)
    with pytest.raises(MissingExtraError) as caught:
        load_file(write(kind, b""), runtime.loaders)
    assert "calpaca[office]" in caught.value.hint


FOOTNOTES = (
    '<w:footnotes xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
    '<w:footnote w:type="separator" w:id="0"><w:p><w:r><w:t>line</w:t></w:r></w:p></w:footnote>'
    '<w:footnote w:id="2"><w:p><w:r><w:t>Since </w:t></w:r><w:r><w:t>1962.</w:t></w:r></w:p></w:footnote>'
    "</w:footnotes>"
)


def test_footnotes_headers_and_footers_of_a_word_document_are_read(runtime, tmp_path: Path) -> None:
    from docx.opc.constants import CONTENT_TYPE, RELATIONSHIP_TYPE
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part

    document = docx.Document()
    document.add_paragraph("The llama hums.")
    document.sections[0].header.paragraphs[0].text = "Confidential"
    document.add_section().footer.paragraphs[0].text = "Larkmoor farm"
    name = PackURI("/word/footnotes.xml")
    part = Part(name, CONTENT_TYPE.WML_FOOTNOTES, FOOTNOTES.encode(), document.part.package)
    document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)
    document.save(tmp_path / "a.docx")
    (read,) = load_file(tmp_path / "a.docx", runtime.loaders)
    assert read.page_content.split("\n\n") == ["The llama hums.", "[2] Since 1962.", "Confidential", "Larkmoor farm"]


def test_a_source_in_a_word_document_names_heading_and_paragraph_rather_than_lines(make_index, sync, tmp_path) -> None:
    document = docx.Document()
    for title, text in (("Care", "The llama hums."), ("Food", "The whale eats krill.")):
        document.add_heading(title, 1)
        document.add_paragraph(text)
    document.save(tmp_path / "a.docx")
    index = make_index(tmp_path / "a.docx", chunk_size=8)
    sync(index)
    best = retrieve(index.retriever, "What does the whale eat?", Search(1, "hybrid"))[0]
    assert (best.start, best.end) == (None, None)
    assert (best.metadata["heading"], best.metadata["paragraph"]) == ("Food", 3)
