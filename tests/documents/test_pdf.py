from pathlib import Path

import pytest

from calpaca.core.errors import DocumentError
from calpaca.documents.loaders import load_file
from calpaca.documents.retrieval import Search, retrieve

pytest.importorskip("pypdfium2", reason="needs calpaca[pdf]")


def pdf(*pages: str, trailer: str = "") -> bytes:
    """A PDF whose pages show a line of text each; an empty one shows nothing. pdfium finds the objects by itself."""
    kids = " ".join(f"{10 + 2 * number} 0 R" for number in range(len(pages)))
    parts = [
        "1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj",
        f"2 0 obj<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>endobj",
        "3 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj",
    ]
    for number, text in enumerate(pages):
        drawn = f"BT /F 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        page, stream = 10 + 2 * number, 11 + 2 * number
        parts.append(
            f"{page} 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>"
            f"/Contents {stream} 0 R>>endobj\n{stream} 0 obj<</Length {len(drawn)}>>stream\n{drawn}\nendstream endobj"
        )
    return ("%PDF-1.4\n" + "\n".join(parts) + f"\ntrailer<</Root 1 0 R{trailer}>>\n%%EOF").encode()


@pytest.fixture
def write(tmp_path: Path):
    def write(data: bytes) -> Path:
        file = tmp_path / "paper.pdf"
        file.write_bytes(data)
        return file

    return write


def test_every_page_is_a_document_with_its_number(runtime, write) -> None:
    documents = load_file(write(pdf("The llama sleeps.", "The whale swims.")), runtime.loaders)
    assert [(each.page_content.strip(), each.metadata["page"]) for each in documents] == [
        ("The llama sleeps.", 1), ("The whale swims.", 2),
    ]  # fmt: skip


def test_a_page_without_text_is_reported_and_the_rest_is_indexed(make_index, sync, notices, write) -> None:
    index = make_index(write(pdf("The llama sleeps.", "", "The whale swims.")))
    assert [line for line in notices(sync(index)) if "page(s) 2 have no text" in line]
    assert len(index) == 2


def test_a_passage_knows_its_page_and_pages_are_not_joined(make_index, sync, write) -> None:
    index = make_index(write(pdf("The llama sleeps.", "The whale swims.")))
    sync(index)
    passages = retrieve(index.store, "The whale swims.", Search(k=2))
    assert {(passage.text, passage.page) for passage in passages} == {("The llama sleeps.", 1), ("The whale swims.", 2)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pdf("", ""), "has no text: its 2 page"),
        (b"%PDF-1.4 and then nothing", "no PDF, or it is damaged"),
        (b"", "no PDF, or it is damaged"),
        (
            pdf(
                "secret",
                trailer=f"/ID[<00><00>]/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{'00' * 32}>/U<{'00' * 32}>>>",
            ),
            "locked by a password",
        ),
    ],
)
def test_a_file_that_gives_no_text_is_a_clear_error(runtime, write, data, message) -> None:
    with pytest.raises(DocumentError, match=message):
        load_file(write(data), runtime.loaders)
