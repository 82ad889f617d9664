import json
from pathlib import Path

import pytest

from calpaca.core.errors import DocumentError
from calpaca.documents.loaders import MOST_BYTES, load_file
from calpaca.documents.retrieval import Search, retrieve


@pytest.fixture
def load(runtime, tmp_path: Path):
    def load(name: str, content: str | bytes) -> str:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        (document,) = load_file(file, runtime.loaders)
        return document.page_content

    return load


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.csv", "Name,Age\nDolly,7\n", ["Name; Age", "Name: Dolly; Age: 7"]),
        ("a.csv", 'Name;Words\nDolly;"hums; often\nloudly"\n', ["Name; Words", "Name: Dolly; Words: hums; often loudly"]),
        ("a.tsv", "Name\tAge\r\nDolly\t7\r\n", ["Name; Age", "Name: Dolly; Age: 7"]),
        ("a.csv", "Word\nllama\n\nwhale", ["Word", "Word: llama", "", "Word: whale"]),
        ("a.csv", 'a,b\n1\n1,2,3\n"say ""hum""",', ["a; b", "a: 1", "a: 1; b: 2; 3", 'a: say "hum"']),
        ("a.csv", "姓名,年龄\n多莉,7\n".encode("gbk"), ["姓名; 年龄", "姓名: 多莉; 年龄: 7"]),
        ("a.jsonl", '{"q": "Who?"}\n\n{"q": {"a": [1, true, null, 1.5]}}', ["q: Who?", "", "q.a[0]: 1; q.a[1]: true; q.a[3]: 1.5"]),
        ("a.json", '[{"name": "Dolly"}, "a word", {}]', ["name: Dolly", "a word", ""]),
        ("a.json", '{"farm": {"name": "Hill"}, "open": false}', ["farm.name: Hill", "open: false"]),
    ],
)  # fmt: skip
def test_every_record_is_a_line_with_its_names(load, name: str, content, lines: list[str]) -> None:
    assert load(name, content).split("\n") == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"a": 1,\n "b" 2}', "line 2, column 6"),
        ("a.jsonl", '{"a": 1}\n{"b"', "line 2, column"),
        ("a.json", "[" * 200_000, "nests too deep|is no JSON"),
        ("a.json", "", "holds no text"),
        ("a.csv", b"\x00\x01", "is a binary file"),
    ],
)
def test_a_file_that_is_not_what_it_is_called_is_a_clear_error(load, name: str, content, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        load(name, content)


def test_deep_json_is_read_as_far_as_python_parses_it(load) -> None:
    assert load("a.json", json.dumps({"a": [[[["deep"]]]]})) == "a[0][0][0][0]: deep"


def test_a_passage_of_records_names_its_row(make_index, sync, tmp_path: Path) -> None:
    animals = ("ant", "bee", "cat", "dog", "eel")
    rows = [
        json.dumps({"text": f"The {animal} is number {number} of the animals"}) for number, animal in enumerate(animals)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    index = make_index(tmp_path / "a.jsonl")
    sync(index)
    best = retrieve(index.store, "text: The dog is number 3 of the animals", Search(k=1))[0]
    assert (best.start, best.end) == (4, 4)


def test_source_code_is_cut_between_lines(make_index, sync, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("".join(f"def hum_{number}(x): return x * {number}. + 1.\n" for number in range(9)))
    index = make_index(tmp_path / "a.py")
    sync(index)
    chunks = [each.page_content for each in index.store.similarity_search("hum", k=50)]
    assert len(chunks) > 1
    assert all(chunk.startswith("def ") and chunk.endswith("1.") for chunk in chunks)


def test_a_file_too_large_for_memory_is_refused(runtime, tmp_path: Path) -> None:
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on disk
    with pytest.raises(DocumentError, match=r"has 1,024 MiB, more than"):
        load_file(tmp_path / "big.txt", runtime.loaders)


# Pages that a crawl wrote ----------------------------------------------------------------------------------------------
def pages(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_passage_of_a_crawled_page_names_its_address(make_index, sync, tmp_path: Path) -> None:
    first = {"url": "https://farm.example/care", "title": "Care", "text": "# Care\n\nThe llama hums."}
    second = {"url": "https://farm.example/sea", "text": "A whale swims.", "date": None}
    (tmp_path / "documents.jsonl").write_text(pages(first, second))
    index = make_index(tmp_path)
    sync(index)
    llama, whale = retrieve(index.retriever, "Does the llama hum?", Search(2, "hybrid"))
    assert (llama.source, llama.start, llama.metadata["heading"]) == ("https://farm.example/care", None, "Care")
    assert (llama.metadata["title"], llama.metadata["file"]) == ("Care", str(tmp_path / "documents.jsonl"))
    assert (whale.source, whale.text) == ("https://farm.example/sea", "A whale swims.")


def test_a_line_among_pages_that_is_none_is_named(runtime, tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text(pages({"url": "https://a", "text": "A"}, {"url": "https://b"}))
    with pytest.raises(DocumentError, match="holds pages, but none at line 2"):
        load_file(tmp_path / "documents.jsonl", runtime.loaders)
