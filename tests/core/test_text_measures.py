import pytest

from calpaca.core.text_measures import answer_tokens, contains_answer, exact_match, f1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Duke of Normandy's", ["duke", "of", "normandys"]),
        ("Anathema!", ["anathema"]),
        ("U.S. $3.5 billion", ["us", "35", "billion"]),
        ("北京，2008年", ["北", "京", "2008", "年"]),
        ("ＮＦＬ 六又½次", ["nfl", "六", "又", "1⁄2", "次"]),
        ("", []),
    ],
)
def test_texts_are_cut_as_the_scripts_of_squad_and_mlqa_do(text, tokens) -> None:
    assert answer_tokens(text) == tokens


def test_only_case_punctuation_and_articles_may_differ_in_an_exact_match() -> None:
    assert exact_match("the Denver Broncos.", ["Carolina", "Denver Broncos"])
    assert exact_match("《丹佛野马》", ["丹佛野马"])
    assert not exact_match("The Denver Broncos won", ["Denver Broncos"])
    assert not exact_match("anything", [])


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1.0),
        ("the Broncos of Denver won", ["Denver Broncos"], 2 * 2 / (4 + 2)),  # the article does not count
        ("丹佛的野马队", ["野马队"], 2 * 3 / (6 + 3)),
        ("Carolina", ["Denver", "North Carolina"], 2 / 3),  # the nearest reference counts
        ("very very very", ["very"], 2 / 4),  # a repeated word is found once
        ("", ["x"], 0.0),
        ("x", [], 0.0),
    ],
)
def test_f1_counts_shared_tokens(answer, references, score) -> None:
    assert f1(answer, references) == pytest.approx(score)


def test_an_answer_contains_an_expected_one_word_for_word() -> None:
    assert contains_answer("It was the Denver Broncos who won.", ["denver broncos"])
    assert contains_answer("冠军是丹佛野马队。", ["丹佛野马"])
    assert not contains_answer("It was 3080.", ["308"])
    assert not contains_answer("anything", [""])
