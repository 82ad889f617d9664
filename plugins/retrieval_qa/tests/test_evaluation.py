"""Evaluation sets, what is measured on them, drafts of them, and thresholds chosen on them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from calpaca.core.errors import JobError, UsageError
from calpaca.core.events import Notice, Progress, Result, Token
from calpaca.core.jobs import JobCancelled
from calpaca.testing import fake_runtime
from calpaca_retrieval_qa.app import build
from calpaca_retrieval_qa.calibration import Sample, calibrated, calibration_file, choose, refusals
from calpaca_retrieval_qa.drafting import Drafts, Passage, schema
from calpaca_retrieval_qa.evalset import EvalQuestion, read_evalset, split_by_source
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.scores import Outcome, score

ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "animals.txt"
    file.write_text(
        "\n\n".join(f"The {animal} of this house likes dish number {n}." for n, animal in enumerate(ANIMALS))
    )
    return file


@pytest.fixture
def evalset(document: Path, tmp_path: Path) -> Path:
    text = document.read_text()
    rows = []
    for number, animal in enumerate(ANIMALS[:4]):
        start = text.index(f"number {number}") + len("number ")
        question = f"Which dish number does the {animal} of this house like?"
        rows.append(
            {"question": question, "answers": [str(number)], "source": "animals.txt", "start": start, "end": start + 1}
        )
    rows.append({"question": "Quantum chromodynamics Lagrangian?", "answers": []})
    rows.append({"question": "Which dish number would a guest like?"})
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def options(file: Path, **changes) -> RetrievalQAOptions:
    return RetrievalQAOptions(**({"files": [file], "chunk_size": 10, "chunk_overlap": 0} | changes))


def obliging(prompt: str) -> str:
    """Reads the excerpt, as a good model would."""
    asked = prompt.rsplit("Question:", maxsplit=1)[-1]
    return next(
        (f"It is number {n}." for n, animal in enumerate(ANIMALS[:3]) if f"the {animal} " in asked), "The moon."
    )


def evaluated(document: Path, evalset: Path, runtime=None, **changes):
    runtime = runtime or fake_runtime(obliging)
    work = build(options(document, evaluate=evalset, **changes), runtime)
    return list(work.events()), runtime


def test_an_evaluation_measures_passages_answers_citations_and_refusals(document, evalset) -> None:
    events, runtime = evaluated(document, evalset, k=8)
    value = events[-1].value
    scores = value["configurations"]["as given"]
    assert (scores["questions"], scores["answerable"]) == (6, 4)
    assert scores["right"] == 0.75
    assert scores["exact_match"] == 0.0
    assert scores["f1"] == pytest.approx(0.75 * 2 / (4 + 1))
    assert scores["recall_at_k"] == 1.0
    assert 0 < scores["mrr"] <= scores["ndcg"] <= 1
    assert scores["right_and_cited"] == 1.0
    assert scores["citation_precision"] == 1.0
    assert (scores["abstention_precision"], scores["abstention_recall"]) == (1.0, 0.5)
    assert scores["prompt_tokens"] > scores["completion_tokens"] > 0
    assert scores["seconds_95"] >= scores["seconds_median"] > 0
    (printed,) = [event.text for event in events if isinstance(event, Token)]
    assert "right                 0.750" in printed
    assert runtime.jobs.get(value["job"]).state == "done"


def test_configurations_stand_side_by_side(document, evalset) -> None:
    events, _ = evaluated(document, evalset, compare=["cite=strict,k=2", "strategy=map_rerank"], parallel=4)
    value = events[-1].value["configurations"]
    assert list(value) == ["as given", "cite=strict,k=2", "strategy=map_rerank"]
    assert value["cite=strict,k=2"]["recall_at_k"] <= value["as given"]["recall_at_k"]
    (printed,) = [event.text for event in events if isinstance(event, Token)]
    assert printed.splitlines()[0].split() == ["as", "given", "cite=strict,k=2", "strategy=map_rerank"]


def test_an_evaluation_goes_on_where_it_was_cut_short_and_repeats_nothing(document, evalset) -> None:
    runtime = fake_runtime(obliging)
    work = build(options(document, evaluate=evalset), runtime)
    events = work.events()
    finished = 0
    for event in events:
        finished += isinstance(event, Progress) and event.unit == "questions"
        if finished == 3:
            work.cancel()
            break
    with pytest.raises(JobCancelled):
        list(events)
    asked = len(runtime.fake.engine.prompts)
    record = runtime.jobs.get(work.id)
    assert (record.state, record.done) == ("cancelled", 3)
    again = build(RetrievalQAOptions(**record.parameters), runtime)  # as `calpaca jobs resume` does
    assert again.id == work.id
    result = list(again.events())[-1]
    assert isinstance(result, Result)
    assert runtime.jobs.get(work.id).reused == 3
    whole = len(runtime.fake.engine.prompts)
    assert whole - asked <= 3
    repeated, _ = evaluated(document, evalset, runtime)
    assert repeated[-1].value == result.value
    assert len(runtime.fake.engine.prompts) == whole
    document.write_text(document.read_text() + " It is old.")
    evaluated(document, evalset, runtime)
    assert len(runtime.fake.engine.prompts) > whole  # other documents, other answers


def test_the_figures_are_those_of_their_definitions() -> None:
    outcomes = [
        Outcome(True, True, rank=1, exact=True, f1=1.0, right=True, citations=(True,), seconds=1.0),
        Outcome(True, True, rank=3, f1=0.5, right=True, citations=(False, False), seconds=2.0),
        Outcome(True, False, rank=0, seconds=3.0),
        Outcome(False, False, seconds=0.5),
        Outcome(False, True, citations=(False,), seconds=9.0),
    ]
    scores = score(outcomes, k=2)
    assert (scores.recall_at_1, scores.recall_at_k) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert scores.mrr == pytest.approx((1 + 1 / 3) / 3)
    assert scores.ndcg == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert (scores.right, scores.right_and_cited) == (pytest.approx(2 / 3), 0.5)
    assert scores.citation_precision == pytest.approx(1 / 3)
    assert (scores.abstention_precision, scores.abstention_recall) == (0.5, 0.5)
    assert (scores.seconds_median, scores.seconds_95) == (2.0, 9.0)
    nothing = score([Outcome(True, True)], k=4)
    assert nothing.citation_precision is nothing.abstention_recall is nothing.right_and_cited is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: no JSON"),
        ('{"answers": ["x"]}', "line 1: question: Field required"),
        ('{"question": " "}', "the question is empty"),
        ('{"question": "What?", "answers": "x"}', "answers"),
        ('{"question": "What?", "start": 3}', "start and end belong together"),
        ('{"question": "What?", "source": "a", "start": 3, "end": 3}', "the first below the second"),
        ("", "is empty"),
    ],
)
def test_a_wrong_set_is_refused_with_its_line(tmp_path, line, message) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(line)
    with pytest.raises(UsageError, match=message):
        read_evalset(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": ["strategi=refine"]}, "strategi"),
        ({"compare": ["refine"]}, "sets nothing"),
        ({"compare": ["evaluate=x"]}, "cannot be compared"),
        ({"parallel": 0}, "--parallel is 0"),
        ({"question": "What?"}, "--question and --evaluate cannot be combined"),
        ({"evaluate": Path("none.jsonl")}, "cannot be read"),
    ],
)
def test_wrong_use_is_refused(document, evalset, changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        build(options(document, **({"evaluate": evalset} | changes)), fake_runtime())


def test_a_place_counts_by_file_and_characters_or_without_them_by_the_words() -> None:
    place = EvalQuestion(question="Q?", answers=["cat"], source="a/b.txt", start=10, end=13)
    assert place.holds("/home/a/b.txt", None, "", (0, 11))
    assert not place.holds("/home/a/b.txt", None, "cat", (13, 20))
    assert not place.holds("/home/xa/b.txt", None, "cat", (0, 20))
    words = EvalQuestion(question="Q?", answers=["cat"])
    assert words.holds("x", None, "The CAT.", (0, 8))
    assert not words.holds("x", None, "concatenate", None)
    assert not EvalQuestion(question="Q?").holds("x", None, "cat", None)


# Drafts -------------------------------------------------------------------------------------------------------------
def test_drafts_are_written_with_the_place_of_their_answers(document, tmp_path) -> None:
    told = "The llama {} hums at night, and its wool is shorn in May by Ada Morrow, who founded the farm in 1968."
    text = "\n\n".join(told.format(name) for name in ("Ann", "Bea", "Cal"))
    document.write_text(text)
    target = tmp_path / "drafts.jsonl"
    questions = {
        "Ann": "Who shears the wool of the llama?",
        "Bea": "Who is Ada Morrow?",
        "Cal": "Which king was first?",
    }

    def draft(prompt: str) -> str:
        question = next(question for name, question in questions.items() if name in prompt)
        return json.dumps({"answer": "Ada Morrow", "question": question})

    runtime = fake_runtime(draft)
    work = build(options(document, make_evalset=target, chunk_size=24), runtime)
    events = list(work.events())
    value = events[-1].value
    assert (value["questions"], value["drafted"]) == (1, 3)
    assert set(value["rejected"]) == {"the question has no word of the text", "the question holds the answer"}
    assert sum(isinstance(event, Notice) for event in events) == 2
    (row,) = read_evalset(target)
    assert row.source == str(document)
    assert text[row.start : row.end] == "Ada Morrow" == row.answers[0]
    assert all(request.grammar is not None for request in runtime.fake.engine.requests)
    with pytest.raises(UsageError, match="there already"):
        build(options(document, make_evalset=target), runtime)


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        ('{"answer": "the', "no JSON"),
        ('{"answer": "alpaca", "question": "Who hums at night?"}', "does not stand in the text"),
        ('{"answer": "Llama", "question": "Who hums at night"}', "question mark"),
        ('{"answer": "llama", "question": "Which one, hums at night in the old barn of May?"}', "copies the text"),
        ('{"answer": "llama", "question": "Which king came from France?"}', "no word of the text"),
    ],
)
def test_a_draft_is_rejected_with_the_reason(draft, reason) -> None:
    drafts = Drafts()
    drafts.add(Passage("The llama hums at night in the old barn of May.", "a", None, 0), draft)
    assert not drafts.kept
    assert reason in next(iter(drafts.rejected))


def test_the_answers_to_choose_from_are_the_passages_own_numbers_and_names() -> None:
    text = "In 1968 the dome cost 3.5 million euros. Later Ada Morrow of Larkmoor Hill sold 214 tickets."
    assert schema(text)["properties"]["answer"] == {
        "enum": ["1968", "3.5 million euros", "Ada Morrow of Larkmoor Hill", "214 tickets"]
    }
    assert schema("天文台由莫雅达于1976年创立，门票四欧元。")["properties"]["answer"] == {
        "enum": ["1976年创", "四欧元"]
    }
    assert schema("nothing of the kind")["properties"]["answer"]["maxLength"] == 80


def test_a_chinese_draft_keeps_the_words_of_the_document_and_comes_once() -> None:
    drafts = Drafts()
    for _ in range(2):
        passage = Passage("天文台由莫雅达于１９７６年创立。", "z.md", 2, 100)
        drafts.add(passage, '{"answer": "1976年", "question": "天文台是哪一年创立的？"}')
    (row,) = drafts.kept
    assert (row["answers"], row["page"], row["start"], row["end"]) == (["１９７６年"], 2, 108, 113)
    assert drafts.rejected == {"the question was drafted before": 1}


# Thresholds ---------------------------------------------------------------------------------------------------------
def samples(answered: list[float], others: list[float]) -> list[Sample]:
    return [Sample("en", value, True) for value in answered] + [Sample("en", value, False) for value in others]


def test_the_threshold_lies_where_refusals_are_best() -> None:
    assert choose(samples([0.9, 0.8], [0.5, 0.6])) == pytest.approx(0.7)
    mixed = samples([0.9, 0.8, 0.55], [0.5, 0.6, 0.4])
    assert refusals(mixed, choose(mixed)) == (0.75, 1.0)
    assert refusals(mixed, 0.1) == (0.0, 0.0)


def test_a_threshold_is_tested_on_what_it_was_not_chosen_on() -> None:
    high, low = [0.8 + n / 100 for n in range(8)], [0.4 + n / 100 for n in range(8)]
    tested = calibrated(samples(high, low), samples([*high[:7], 0.3], [*low[:7], 0.95]))["en"]
    assert (tested.precision, tested.recall) == (7 / 8, 7 / 8)
    assert (tested.answerable, tested.unanswerable) == (8, 8)
    with pytest.raises(UsageError, match="too small"):
        calibrated(samples(high[:7], low), samples(high, low))


def test_the_halves_of_a_set_share_no_document() -> None:
    rows = [EvalQuestion(question="Q?", answers=["x"], source=f"{n % 5}.txt") for n in range(20)]
    first, second = split_by_source([*rows, *[EvalQuestion(question="Q?")] * 4])
    assert not {row.source for row in first if row.answerable} & {row.source for row in second if row.answerable}
    assert [sum(not row.answerable for row in half) for half in (first, second)] == [2, 2]


def test_a_calibration_is_kept_for_these_weights_and_used(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "docs"
    folder.mkdir()
    rows = []
    for number, animal in enumerate([*ANIMALS, *(name * 2 for name in ANIMALS), *(name * 3 for name in ANIMALS)]):
        (folder / f"{animal}.txt").write_text(f"The {animal} lives in valley {number} and eats grass of kind {number}.")
        question = f"In which valley does the {animal} live?"
        rows.append({"question": question, "answers": [str(number)], "source": f"{animal}.txt"})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runtime = fake_runtime(["In valley 3."])
    before = build(options(folder, chunk_size=40), runtime).invoke("In which valley does the dog live?")
    assert any("not calibrated" in notice for notice in before["notices"])
    events = list(build(options(folder, chunk_size=40, calibrate=tmp_path / "set.jsonl"), runtime).events())
    value = events[-1].value
    assert value["file"] == str(calibration_file(runtime.embedder().fingerprint))
    assert value["tested"]["en"]["answerable"] + value["tested"]["en"]["unanswerable"] == 24
    after = build(options(folder, chunk_size=40), runtime)
    assert after.evidence.least == {"en": value["tested"]["en"]["threshold"]}
    assert not any("calibrated" in notice for notice in after.invoke("In which valley does the dog live?")["notices"])
    other = build(options(folder, chunk_size=20, chunk_overlap=0), runtime)
    assert "of 40 tokens" in other.evidence.judge("What does the dog eat?", []).remark + other.evidence.caution


def test_a_calibration_that_cannot_be_read_is_as_none(tmp_path, document) -> None:
    runtime = fake_runtime(["x"])
    file = calibration_file(runtime.embedder().fingerprint)
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert build(options(document), runtime).evidence.least == {}


def test_work_that_never_began_has_no_record(document, evalset) -> None:
    with pytest.raises(JobError):
        build(options(document, evaluate=evalset), fake_runtime()).status()
