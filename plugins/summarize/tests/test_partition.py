"""Sections and chunks: nothing is left out, nothing stands twice, and a change stays where it is made."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from calpaca_summarize.partition import Partition

SENTENCES = ["The keeper rang the bell twice.", "雨停了，他们回到了船上。", "Why? Nobody knew!", "🦙 ate 3.5 kg of hay.", "e.g. this",
             "<|im_end|>", "word" * 40, "  ", "- a list item", "第三天，风很大……"]  # fmt: skip


def count(text: str) -> int:
    return (len(text.encode()) + 3) // 4


def random_text(generator: random.Random) -> str:
    lines = []
    for _ in range(generator.randrange(1, 60)):
        kind = generator.randrange(8)
        if kind == 0:
            lines.append("#" * generator.randrange(1, 4) + " Heading")
        elif kind == 1:
            lines.append(f"Chapter {generator.randrange(90)}")
        else:
            lines.append(" ".join(generator.choices(SENTENCES, k=generator.randrange(1, 9))))
        lines.append("\n" * generator.randrange(3))
    return "\n".join(lines)


@pytest.mark.parametrize("form", ["text", "markdown", "code", "rows"])
@pytest.mark.parametrize("overlap", [0, 12])
def test_every_character_lies_in_exactly_one_chunk(form, overlap) -> None:
    generator = random.Random(f"{form} {overlap}")
    for _ in range(60):
        text = random_text(generator)
        partition = Partition(count, generator.randrange(16, 200), overlap)
        for sections in (partition.branches(text, form), partition.sections(text, form)):
            chunks = [chunk for section in sections for chunk in section.chunks]
            assert "".join(text[chunk.fresh : chunk.end] for chunk in chunks) == text
            assert all(chunk.start <= chunk.fresh < chunk.end for chunk in chunks)
            assert all(before.end == after.fresh for before, after in pairwise(chunks))
            assert overlap or all(chunk.start == chunk.fresh for chunk in chunks)


def test_no_chunk_is_longer_than_asked_for() -> None:
    generator = random.Random(5)
    for _ in range(40):
        text, size = random_text(generator), generator.randrange(16, 200)
        for section in Partition(count, size, 5).branches(text, "markdown"):
            # units are counted by themselves, rounded up; together they are no longer
            assert all(count(text[chunk.start : chunk.end]) <= size for chunk in section.chunks)


def test_a_text_without_a_border_is_cut_all_the_same() -> None:
    text = "字" * 1000
    (section,) = Partition(count, 16).branches(text, "text")
    assert "".join(text[chunk.start : chunk.end] for chunk in section.chunks) == text
    assert all(count(text[chunk.start : chunk.end]) <= 16 for chunk in section.chunks)


def test_sections_are_those_of_the_highest_level_that_repeats() -> None:
    text = "# Book\n\nFront.\n\n## One\n\nA.\n\n### Deep\n\nB.\n\n## Two\n\nC.\n"
    assert [section.title for section in Partition(count, 100).sections(text, "markdown")] == ["Book", "One", "Two"]


@pytest.mark.parametrize(
    "headings",
    [["CHAPTER I. The Hill", "Chapter 2", "CHAPTER III"], ["第一章 山上", "第二回", "第十三章　风"], ["Part One", "Part Two", "Part Three"]],
)  # fmt: skip
def test_chapters_of_plain_text_are_sections(headings) -> None:
    text = "\n\n".join(f"{heading}\n\nIt was late. 天黑了。" for heading in headings)
    assert [section.title for section in Partition(count, 100).sections(text, "text")] == headings


def test_a_sentence_that_begins_like_a_chapter_is_none() -> None:
    text = "Chapter 3 of the book says more.\nAnd so on.\n\nPart of me\n\nPart of you"
    assert [section.title for section in Partition(count, 100).sections(text, "text")] == [""]


def test_small_sections_are_read_together_and_large_ones_by_themselves() -> None:
    text = "".join(
        f"# {name}\n\n{'It rained. ' * length}\n\n" for name, length in zip("abcde", [1, 1, 80, 1, 80], strict=True)
    )
    partition = Partition(count, 100)
    assert [section.title for section in partition.branches(text, "markdown")] == ["a", "d"]
    assert len(partition.sections(text, "markdown")) == 5


def test_a_change_in_one_chapter_leaves_the_chunks_of_the_others() -> None:
    chapters = [f"# {number}\n\n" + f"Sentence of {number} here. " * 60 + "\n\n" for number in range(6)]
    changed = [*chapters[:2], chapters[2] + "A new end. " * 9 + "\n\n", *chapters[3:]]

    def texts(parts: list[str]) -> list[str]:
        text = "".join(parts)
        return [
            text[chunk.start : chunk.end]
            for section in Partition(count, 120).branches(text, "markdown")
            for chunk in section.chunks
        ]

    before, after = texts(chapters), texts(changed)
    assert [text for text in before if "of 2 here" not in text] == [
        text for text in after if "of 2 here" not in text and "A new end" not in text
    ]
