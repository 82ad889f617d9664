"""ROUGE-L and near-duplicates: Chinese by characters, and a labelled set made by editing real Chinese questions."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from calpaca.core.near_duplicates import NearDuplicates
from calpaca.core.rouge import rouge_l

DATA = Path(__file__).parents[2].parent / "shared" / "data"
_SYNONYMS = (
    ("什么", "哪些"),
    ("怎么", "如何"),
    ("是谁", "是哪位"),
    ("多少", "几多"),
    ("为什么", "为何"),
    ("在哪里", "在何处"),
)


def test_rouge_l_is_the_share_of_the_longest_common_subsequence() -> None:
    assert rouge_l("police killed the gunman", "police kill the gunman") == 0.75  # the example of Lin's paper
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5
    assert rouge_l("", "") == 0.0


def test_chinese_is_compared_by_characters() -> None:
    assert rouge_l("请介绍长城的历史。", "请介绍一下长城的历史！") == pytest.approx(16 / 18)
    assert rouge_l("怎样养好一只猫", "股票市场今日下跌") == 0.0


def test_a_text_like_one_of_the_pool_is_named_and_not_taken_in() -> None:
    pool = NearDuplicates()
    assert pool.add("请用三句话介绍长城的历史。") is None
    assert pool.add("怎样在家里养好一只猫？") is None
    match = pool.add("请用三句话介绍一下长城的历史")
    assert match is not None
    assert (match.number, len(pool)) == (0, 2)
    assert pool.find("写一首关于秋天的诗") is None


def test_empty_texts_are_no_duplicates_of_anything() -> None:
    pool = NearDuplicates()
    assert pool.add("") is None
    assert pool.add("？！") is None


@pytest.fixture(scope="module")
def questions() -> list[str]:
    """Real Chinese questions, none of which is a near-duplicate of another by the exact measure."""
    file = DATA / "cmrc2018_trial.json"
    if not file.is_file():
        pytest.skip("the shared test data (../shared/data) is not here")
    asked = [
        qa["question"]
        for article in json.loads(file.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
        if len(qa["question"]) >= 10
    ]
    distinct: list[str] = []
    for question in asked[:500]:
        if all(rouge_l(question, other) < 0.6 for other in distinct):
            distinct.append(question)
    return distinct


def edited(question: str, chance: Random) -> str:
    """The same question said a little differently."""
    text = question
    for old, new in _SYNONYMS:
        if old in text:
            text = text.replace(old, new, 1)
            break
    else:
        place = chance.randrange(2, len(text) - 1)
        text = text[:place] + text[place + 1 :]
    return chance.choice(("请问", "请回答：", "")) + text.rstrip("？?") + chance.choice(("？", "?", "呢？", ""))


def another(question: str, other: str) -> str:
    """A question that begins like one and goes on like another of another text: similar words, other content."""
    return question[: len(question) // 2] + other[len(other) // 2 :]


def test_edited_questions_are_dropped_and_those_of_other_content_are_kept(questions) -> None:
    chance = Random(7)
    pool = NearDuplicates()
    for question in questions:
        pool.add(question)
    found = [pool.find(edited(question, chance)) is not None for question in questions]
    mixed = zip(questions, questions[137:] + questions[:137], strict=True)
    wrong = [pool.find(another(*pair)) is not None for pair in mixed]
    assert sum(found) / len(found) >= 0.95, "recall"
    assert sum(found) / (sum(found) + sum(wrong)) >= 0.95, "precision"


def test_what_the_signatures_leave_out_hides_next_to_no_near_duplicate(questions) -> None:
    """Against the exact measure over all pairs."""
    chance = Random(11)
    pool = NearDuplicates()
    for question in questions[:200]:
        pool.add(question)
    asked = [edited(question, chance) for question in questions[:200]]
    exact = [max(rouge_l(text, other) for other in questions[:200]) >= 0.7 for text in asked]
    found = [pool.find(text) is not None for text in asked]
    assert all(e for e, f in zip(exact, found, strict=True) if f)
    assert sum(found) >= 0.98 * sum(exact)
