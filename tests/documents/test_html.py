from pathlib import Path

import pytest

from calpaca.documents.formats.html import read_page
from calpaca.documents.loaders import load_file

PAGE = """<!doctype html><html><head><title>The  Llama
Farm</title><style>p {color: red}</style><script>alert("tracked")</script></head>
<body><nav><a href="/">Home</a></nav>
<h1>Animals</h1><p>Llamas <b>hum</b> when<br>they are content.</p>
<h2>Food <em>and</em> water</h2><ul><li>Grass</li><li>Hay <ul><li>fresh</li></ul></li></ul>
<table><tr><th>Name</th><th>Age</th></tr><tr><td>Dolly</td><td>7 | 8</td></tr></table>
<pre>  def hum():
    return 1</pre><div>Loose text<p># not a heading</p>the end</div></body></html>"""


@pytest.fixture
def load(runtime, tmp_path: Path):
    def load(data: bytes, name: str = "page.html"):
        file = tmp_path / name
        file.write_bytes(data)
        (document,) = load_file(file, runtime.loaders)
        return document

    return load


def test_a_page_is_read_as_markdown_without_scripts_and_menus(load) -> None:
    document = load(PAGE.encode())
    assert document.metadata["title"] == "The Llama Farm"
    assert document.page_content.split("\n\n") == [
        "# Animals",
        "Llamas hum when\nthey are content.",
        "## Food and water",
        "- Grass",
        "- Hay",
        "- fresh",
        "| Name | Age |\n| --- | --- |\n| Dolly | 7 \\| 8 |",
        "```\ndef hum():\n    return 1\n```",
        "Loose text",
        "\\# not a heading",
        "the end",
    ]


def test_passages_of_a_page_carry_their_headings(make_index, sync, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    index = make_index(tmp_path / "page.html")
    sync(index)
    found = index.store.similarity_search("Grass", k=50)
    assert "Animals > Food and water" in {
        each.metadata.get("heading") for each in found if "Grass" in each.page_content
    }


def test_the_title_heads_a_page_that_has_no_heading_of_its_own() -> None:
    assert read_page("<title>Opening hours</title><p>Daily.") == ("# Opening hours\n\nDaily.", "Opening hours")


@pytest.mark.parametrize(
    "broken", ["<p>Llamas <b>hum</p></div></i>", "<table><td>Llamas hum", "Llamas hum<", "<p>Llamas hum<!--"]
)
def test_broken_markup_is_read_as_browsers_read_it(broken: str) -> None:
    assert read_page(broken)[0].startswith("Llamas hum")


def test_deep_nesting_is_no_recursion() -> None:
    assert read_page("<div>" * 20_000 + "Llamas hum")[0] == "Llamas hum"


@pytest.mark.parametrize("charset", ["gbk", "big5", "windows-1252", "utf-8"])
def test_the_declared_encoding_is_used(load, charset: str) -> None:
    text = "Das Gehege öffnet früh" if charset == "windows-1252" else "開門時間是早上"
    page = f'<html><head><meta charset="{charset}"></head><body><p>{text}</p></body></html>'
    assert load(page.encode(charset)).page_content == text


def test_a_wrong_declaration_does_not_matter(load) -> None:
    assert load('<meta charset="ascii"><p>钥匙挂在钟的后面。</p>'.encode()).page_content == "钥匙挂在钟的后面。"
