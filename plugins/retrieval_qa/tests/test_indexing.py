from pathlib import Path

import pytest

from calpaca.core.events import Result
from calpaca.testing import fake_runtime
from calpaca_retrieval_qa import app, indexing
from calpaca_retrieval_qa.options import RetrievalIndexOptions, RetrievalQAOptions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "documents"
    made.mkdir()
    (made / "page.html").write_text("<h1>Llamas</h1><p>The llama hums at night.")
    (made / "broken.json").write_text("{")
    return made


def test_the_job_lists_the_files_that_failed_and_indexes_the_rest(folder) -> None:
    events = list(indexing.build(RetrievalIndexOptions(files=[folder]), fake_runtime()).events())
    assert isinstance(events[-1], Result)
    value = events[-1].value
    assert value["files"] == 1
    assert {Path(path).name: "is no JSON" in reason for path, reason in value["failed"].items()} == {
        "broken.json": True
    }


def test_hybrid_search_answers_with_sources_and_their_scores(folder) -> None:
    options = RetrievalQAOptions(files=[folder], search="hybrid")
    value = app.build(options, fake_runtime(["At night."])).invoke("When does the llama hum?")
    assert value["answer"] == "At night. [1]"
    assert "The llama hums at night." in value["sources"][0]["text"]
    assert value["sources"][0]["score"] <= 1.0
