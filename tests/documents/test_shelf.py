import json
import multiprocessing
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from calpaca.cli.main import program
from calpaca.core.errors import DocumentError
from calpaca.documents import shelf
from calpaca.documents.index import DocumentIndex
from calpaca.testing import FakeEmbedder, fake_runtime


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("Llamas hum at night.")
    return path


def other_embedder() -> FakeEmbedder:
    made = FakeEmbedder(32)
    made.name = "another"
    return made


def test_an_index_says_what_it_was_made_of(file, make_index, sync) -> None:
    index = make_index(file)
    sync(index)
    (found,) = shelf.indexes()
    assert (found.folder, found.description) == (index.folder, index.description)
    assert found.description.paths == (str(file),)
    assert found.bytes > 0


def test_another_embedder_rebuilds_with_a_message_that_names_both_and_the_way_to_remove(
    file, runtime, make_index, sync, notices
) -> None:
    first = make_index(file)
    assert notices(sync(first)) == []
    runtime.fake_embedder = other_embedder()
    second = make_index(file)
    (line,) = notices(sync(second))
    assert "embedding anew with another; fake was used before" in line
    assert line.endswith(f"calpaca indexes remove {first.folder.name}")
    assert runtime.fake_embedder.texts == ["Llamas hum at night."]
    assert notices(sync(make_index(file))) == []  # said once
    shelf.remove(first.folder.name)
    assert [each.folder for each in shelf.indexes()] == [second.folder]


def test_an_index_of_another_version_is_left_alone_and_made_anew(file, make_index, sync, notices, monkeypatch) -> None:
    first = make_index(file)
    sync(first)
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("calpaca.documents.index.FORMAT", 99)
    second = make_index(file)
    (line,) = notices(sync(second))
    assert "made by another version of calpaca and is made anew" in line
    assert second.folder != first.folder
    assert before == {path: path.read_bytes() for path in before}


def test_an_index_without_a_description_is_listed_as_of_another_version(file, make_index, sync) -> None:
    index = make_index(file)
    sync(index)
    (index.folder / "index.json").unlink()
    result = CliRunner().invoke(program, ["indexes", "list"])
    assert "made by another version" in result.stdout


# Collections -----------------------------------------------------------------------------------------------------------
def test_a_collection_keeps_its_index_when_its_documents_change(file, runtime, make_index, sync) -> None:
    sync(make_index(file, collection="animals"))
    runtime.fake_embedder.texts.clear()
    more = file.with_name("b.txt")
    more.write_text("Whales swim.")
    index = make_index(file, more, collection="animals")
    sync(index)
    assert runtime.fake_embedder.texts == ["Whales swim."]
    assert shelf.paths_of_collection("animals") == [file, more]
    sync(make_index(more, collection="animals"))
    assert shelf.paths_of_collection("animals") == [more]
    assert len(index) == 1


def test_collections_of_the_same_file_are_kept_apart(file, make_index, sync) -> None:
    folders = {make_index(file, collection=name).folder for name in ("a", "b", "")}
    assert len(folders) == 3


def test_an_unknown_collection_is_an_error_with_the_nearest_name(file, make_index, sync) -> None:
    sync(make_index(file, collection="handbook"))
    with pytest.raises(DocumentError, match="handbok") as caught:
        shelf.paths_of_collection("handbok")
    assert "handbook" in caught.value.hint


# The command -----------------------------------------------------------------------------------------------------------
def test_indexes_are_listed_and_removed(file, make_index, sync) -> None:
    index = make_index(file, collection="animals")
    sync(index)
    listed = CliRunner().invoke(program, ["indexes", "list"])
    assert "animals: " in listed.stdout and str(file) in listed.stdout
    (described,) = json.loads(CliRunner().invoke(program, ["indexes", "list", "--json"]).stdout)
    assert described["collection"] == "animals"
    removed = CliRunner().invoke(program, ["indexes", "remove", described["id"][:6]])
    assert removed.exit_code == 0
    assert not index.folder.exists()
    assert file.exists()


def test_an_unknown_or_ambiguous_id_is_an_error(file, make_index, sync) -> None:
    sync(make_index(file))
    sync(make_index(file, collection="animals"))
    for name in ("", "zzz"):
        with pytest.raises(DocumentError, match="begins the id of"):
            shelf.remove(name)


def test_an_index_that_is_being_written_is_not_removed(file, make_index, sync) -> None:
    index = make_index(file)
    sync(index)
    with FileLock(index.folder / shelf.LOCK), pytest.raises(DocumentError, match="being written"):
        shelf.remove(index.folder.name)
    assert index.folder.exists()


# Two processes ---------------------------------------------------------------------------------------------------------
def index_in_a_process(folder: str, results) -> None:
    embedder = FakeEmbedder()
    with fake_runtime(embedder=embedder) as runtime:
        index = DocumentIndex(
            [folder], embedder, runtime.loaders, runtime.stores.get("faiss"), chunk_size=13, chunk_overlap=0
        )
        for _ in index.sync(lambda: runtime.jobs.start("test", "Index", {"folder": folder})):
            pass
        results.put((len(index), embedder.texts))


@pytest.mark.slow
def test_two_processes_index_the_same_folder_without_doing_anything_twice(tmp_path, runtime) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Llama {number} hums at night.")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=index_in_a_process, args=(str(folder), results)) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [chunks for chunks, _ in outcomes] == [40, 40]
    assert sorted(text for _, texts in outcomes for text in texts) == sorted(
        f"Llama {n} hums at night." for n in range(40)
    )
