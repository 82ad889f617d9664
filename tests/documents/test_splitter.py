import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from langchain_core.documents import Document

from calpaca.core.errors import UsageError
from calpaca.documents.sentences import Block, sentences
from calpaca.documents.splitter import SentenceSplitter

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"

MARKDOWN = """# Handbook

The workshop opens at nine. It closes at six.

## Tools

### Lathe

Wear goggles. Dr. Smith keeps the key, e.g. on Mondays. The e.p. rule: 3.5 mm at most!

```python
# not a heading
print("x. y. z.")
```

Members
-------

1. First rule.
2. Second rule.
"""


def count(texts: list[str]) -> list[int]:
    """A word, a Chinese character or a mark is a token."""
    return [len(re.findall(r"[\u3400-\u9fff]|\w+|[^\w\s]", text)) for text in texts]


def split(text: str, size: int = 30, overlap: int = 8, **metadata: str) -> list[Document]:
    return SentenceSplitter(count, size, overlap).split_documents([Document(text, metadata=metadata)])


def sentence_texts(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text, Block(0, len(text)))]


@pytest.mark.parametrize(
    "expected",
    [
        ["Dr. Smith met Mrs. Jones at 3.5 p.m. in the hall.", "They spoke."],
        ["He said “Stop!”", "Then he left.", "(It was late.)", "Why?!"],
        ["J. R. R. Tolkien wrote it, e.g. in No. 7 of the series.", "Yes."],
        ["It costs 3.50 in version 2.0.1 of calpaca.", "Ok…", "Fine."],
    ],
)
def test_english_sentences(expected: list[str]) -> None:
    assert sentence_texts(" ".join(expected)) == expected


@pytest.mark.parametrize(
    "expected",
    [
        ["李白（701年—762年），字太白，号青莲居士。", "他是唐代诗人；", "有“诗仙”之称！", "真的吗？"],
        ["他说：“你好。”", "她没有回答……", "（天黑了。）", "走吧!", "好的"],
    ],
)
def test_chinese_sentences(expected: list[str]) -> None:
    assert sentence_texts("".join(expected)) == expected


def test_a_wrapped_line_does_not_end_a_sentence_but_a_list_item_does() -> None:
    assert sentence_texts("One sentence\nover two lines.\n- an item\n- another") == [
        "One sentence\nover two lines.", "- an item", "- another",
    ]  # fmt: skip


def texts() -> list[str]:
    found = [
        MARKDOWN,
        "",
        "   \n\n ",
        "word " * 500,
        "字" * 500,
        "a" * 3000,
        "一句话。" * 200,
        "x\r\n\r\ny. Z.\r\n" * 50,
    ]
    for name in ("doc.txt", "xquad_en_first24.json", "cmrc2018_trial.json"):
        if (DATA / name).exists():
            raw = (DATA / name).read_text(encoding="utf-8")
            found.append(raw if name == "doc.txt" else paragraphs(raw))
    return found


def paragraphs(raw: str) -> str:
    return "\n\n".join(p["context"] for article in json.loads(raw)["data"] for p in article["paragraphs"])


@pytest.mark.parametrize("form", ["text", "markdown"])
@pytest.mark.parametrize(("size", "overlap"), [(8, 0), (30, 8), (200, 40)])
def test_chunks_are_slices_within_the_size_and_lose_nothing(size: int, overlap: int, form: str) -> None:
    for text in texts():
        covered = bytearray(len(text))
        previous = (-1, -1)
        for number, chunk in enumerate(split(text, size, overlap, format=form)):
            place = chunk.metadata
            assert chunk.page_content == text[place["start"] : place["end"]] == chunk.page_content.strip()
            assert place["index"] == number
            assert place["start_line"] == text.count("\n", 0, place["start"]) + 1
            assert place["end_line"] == text.count("\n", 0, place["end"]) + 1
            assert count([chunk.page_content])[0] <= size or place["end"] - place["start"] == 1
            assert previous[0] < place["start"] and previous[1] < place["end"]
            previous = (place["start"], place["end"])
            covered[place["start"] : place["end"]] = b"\1" * (place["end"] - place["start"])
        assert not [text[i] for i, seen in enumerate(covered) if not seen and not text[i].isspace()]


def test_markdown_chunks_carry_their_heading_path() -> None:
    headings = [chunk.metadata["heading"] for chunk in split(MARKDOWN, 24, 0, format="markdown")]
    assert headings[0] == "Handbook"
    assert "Handbook > Tools > Lathe" in headings
    assert headings[-1] == "Handbook > Members"
    assert "not a heading" not in " ".join(headings)


def test_overlap_repeats_whole_sentences_of_running_text() -> None:
    text = " ".join(f"This is sentence number {i}." for i in range(40))
    chunks = split(text, 30, 8)
    for before, after in pairwise(chunks):
        shared = text[after.metadata["start"] : before.metadata["end"]]
        assert re.fullmatch(r"This is sentence number \d+\.", shared)


def test_an_edit_leaves_the_chunks_of_other_paragraphs_alone() -> None:
    parts = [" ".join(f"Paragraph {p} says a thing number {s}." for s in range(4)) for p in range(30)]
    before = {chunk.page_content for chunk in split("\n\n".join(parts), 40, 8)}
    parts[10] = "A new beginning. " + parts[10]
    changed = [chunk for chunk in split("\n\n".join(parts), 40, 8) if chunk.page_content not in before]
    assert 1 <= len(changed) <= 3


@pytest.mark.parametrize(("size", "overlap"), [(4, 0), (30, 30), (30, -1)])
def test_impossible_sizes_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(UsageError):
        SentenceSplitter(count, size, overlap)


def test_a_file_without_line_ends_and_full_stops_is_split_whole() -> None:
    text = " ".join(f"word{number}" for number in range(30_000))  # more than are cut up at once
    chunks = SentenceSplitter(lambda texts: [len(each.split()) for each in texts], 96, 0).split_documents(
        [Document(text)]
    )
    assert " ".join(chunk.page_content for chunk in chunks) == text
    assert all(chunk.metadata["tokens"] <= 96 for chunk in chunks)
    assert sum(chunk.metadata["tokens"] for chunk in chunks) > 0.8 * 96 * len(chunks)
