import random
import unicodedata

import pytest

from calpaca_retrieval_qa.facts import Statements, facts
from calpaca_retrieval_qa.quotation import FoldedText

TEXT = "The dome was exam-\nple ３.５ m;  it cost 1,200 euros – or 10-20 a head.\n成立于１９７６年，\n由莫雅达创立。"


@pytest.mark.parametrize(
    ("quote", "words"),
    [
        ("Example 3.5 m: it cost", "exam-\nple ３.５ m;  it cost"),
        ("1200 euros", "1,200 euros"),
        ("“1976 年由莫雅达 创立”", "１９７６年，\n由莫雅达创立"),
        ("10-20 A HEAD", "10-20 a head"),
        ("莫雅达", "莫雅达"),
    ],
)
def test_width_case_line_ends_and_punctuation_may_differ(quote, words) -> None:
    place = FoldedText(TEXT).find(quote)
    assert place is not None
    assert TEXT[slice(*place)] == words


@pytest.mark.parametrize("quote", ["35 m", "976年", "ample", "1020 a head", "12 euros", "雅莫达", "", "…"])
def test_other_numbers_parts_of_words_and_nothing_are_not_found(quote) -> None:
    assert FoldedText(TEXT).find(quote) is None


def test_a_later_whole_word_is_found_after_a_part_of_one() -> None:
    assert FoldedText("concatenate the cat").find("cat") == (16, 19)


def test_any_slice_of_words_is_found_where_it_says_the_same() -> None:
    pick = random.Random(7)
    words = TEXT.split()
    for _ in range(200):
        start = pick.randrange(len(words))
        quote = " ".join(words[start : pick.randrange(start, len(words)) + 1])
        place = FoldedText(TEXT).find(unicodedata.normalize("NFKC", quote).upper())
        if any(character.isalnum() for character in quote):
            assert place is not None, quote
            assert FoldedText(TEXT[slice(*place)]).folded == FoldedText(quote).folded


@pytest.mark.parametrize(
    ("claim", "text", "held"),
    [
        ("It weighs 840 kilograms.", "The telescope weighs 840 kilograms with its mount.", True),
        ("It weighs 840 kilograms.", "The telescope weighs 845 kilograms with its mount.", False),
        ("Founded in 1,976.", "Founded in 1976", True),
        ("由莫雅达创立", "天文台是莫雅达于1976年创立的", True),
        ("门票要五欧元", "门票要四欧元", False),
    ],
)
def test_a_text_holds_what_a_claim_says_or_not(claim, text, held) -> None:
    said = facts(claim)
    assert (Statements(text).held(said) == said) is held
