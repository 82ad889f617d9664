import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from calpaca.core.errors import DocumentError, JobError
from calpaca.core.events import Notice
from calpaca.documents import index as index_module
from calpaca.testing import FakeEmbedder

STORES = ["faiss", *(pytest.param(name, marks=pytest.mark.filterwarnings("default")) for name in ("chroma", "qdrant"))]


def paragraphs(count: int, word: str = "alpha") -> str:
    return "\n\n".join(f"Paragraph {i} of {word} tells one more thing about number {i}." for i in range(count))


def held(index) -> list[str]:
    """Every text that the store gives out."""
    return sorted(found.page_content for found in index.store.similarity_search("paragraph", k=10_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "documents"
    made.mkdir()
    (made / "a.txt").write_text(paragraphs(6, "alpha"))
    (made / "b.md").write_text("# Beta\n\n" + paragraphs(5, "beta"))
    return made


@pytest.mark.parametrize("store", STORES)
def test_the_index_follows_its_files(folder, runtime, make_index, sync, store) -> None:
    index = make_index(folder, store=store)
    embedder = runtime.fake_embedder
    sync(index)
    assert len(index) == len(held(index)) == len(embedder.texts) == 11

    embedder.texts.clear()
    assert sync(index) == []
    assert embedder.texts == []

    (folder / "a.txt").write_text(paragraphs(6, "alpha").replace("number 3", "a llama"))
    sync(index)
    assert embedder.texts == ["Paragraph 3 of alpha tells one more thing about a llama."]
    assert sum("llama" in text for text in held(index)) == 1
    assert len(index) == len(held(index)) == 11

    (folder / "b.md").unlink()
    (folder / "c.txt").write_text(paragraphs(2, "gamma"))
    sync(index)
    assert {text.split()[3] for text in held(index)} == {"alpha", "gamma"}
    assert len(index) == len(held(index)) == 8


def test_a_second_index_object_finds_what_the_first_one_stored(folder, runtime, make_index, sync) -> None:
    sync(make_index(folder))
    runtime.fake_embedder.texts.clear()
    again = make_index(folder)
    assert sync(again) == []
    assert runtime.fake_embedder.texts == []
    assert len(held(again)) == 11


def test_moved_text_keeps_its_vector_and_gets_its_new_lines(folder, runtime, make_index, sync) -> None:
    index = make_index(folder)
    sync(index)
    runtime.fake_embedder.texts.clear()
    text = (folder / "a.txt").read_text()
    (folder / "a.txt").write_text("\n\n\n" + text)
    sync(index)
    assert runtime.fake_embedder.texts == []
    found = {each.page_content: each.metadata for each in index.store.similarity_search("alpha", k=100)}
    assert found["Paragraph 0 of alpha tells one more thing about number 0."]["start_line"] == 4


def test_equal_texts_of_a_file_are_kept_apart(tmp_path, make_index, sync) -> None:
    file = tmp_path / "same.txt"
    file.write_text("\n\n".join(["The very same eight words in each paragraph."] * 3))
    index = make_index(file)
    sync(index)
    assert len(held(index)) == 3


@pytest.mark.parametrize(
    "change", [{"embedder": FakeEmbedder(32)}, {"chunk_size": 20}, {"chunk_overlap": 3}, {"store": "chroma"}]
)
def test_another_embedder_or_way_of_splitting_has_another_index(folder, runtime, make_index, change) -> None:
    first = make_index(folder)
    options = dict(change)
    if "embedder" in options:
        runtime.fake_embedder = options.pop("embedder")
    assert make_index(folder, **options).folder != first.folder


def test_vectors_of_another_embedder_are_not_reused(folder, runtime, make_index, sync) -> None:
    sync(make_index(folder))
    runtime.fake_embedder = FakeEmbedder(32)
    index = make_index(folder)
    sync(index)
    assert len(runtime.fake_embedder.texts) == 11
    assert len(held(index)) == 11


def test_progress_counts_every_chunk(folder, make_index, sync, progress) -> None:
    steps = progress(sync(make_index(folder)))
    assert steps[-1] == (11, 11)
    assert steps == sorted(steps)


# Files that cannot be read --------------------------------------------------------------------------------------------
def test_a_missing_path_is_an_error_with_the_nearest_name(folder, make_index, sync) -> None:
    with pytest.raises(DocumentError, match=r"no file or folder .*a\.tx") as caught:
        sync(make_index(folder / "a.tx"))
    assert "a.txt" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no text"), (b" \n\n", "holds no text"), (b"\x00\x01\x02", "is a binary file")]
)
def test_a_named_file_without_text_is_an_error_and_leaves_nothing(tmp_path, make_index, sync, content, message) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    index = make_index(file)
    with pytest.raises(DocumentError, match=message):
        sync(index)
    assert index.manifest.files() == {}


def test_a_bad_file_in_a_folder_is_skipped_by_name(folder, make_index, sync, notices) -> None:
    (folder / "bad.txt").write_bytes(b"\x00\x01\x02")
    index = make_index(folder)
    lines = notices(sync(index))
    assert len(lines) == 1 and "bad.txt is a binary file" in lines[0]
    assert len(held(index)) == 11


def test_a_file_that_went_bad_leaves_the_index(folder, make_index, sync) -> None:
    index = make_index(folder)
    sync(index)
    (folder / "b.md").write_bytes(b"\x00")
    sync(index)
    assert len(held(index)) == 6


def test_a_folder_without_readable_files_is_an_error_that_says_what_is_there(tmp_path, make_index, sync) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "photo.jpeg").write_bytes(b"\xff\xd8")
    with pytest.raises(DocumentError, match=r"no document .*1 × \.jpeg") as caught:
        sync(make_index(tmp_path / "empty"))
    assert ".md" in caught.value.hint


def test_hidden_files_and_link_loops_are_left_out(folder, make_index, sync) -> None:
    (folder / ".hidden.txt").write_text("secret words")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("secret words")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    index = make_index(folder)
    sync(index)
    assert len(held(index)) == 11


def test_a_gbk_file_is_indexed_as_its_text(tmp_path, make_index, sync) -> None:
    file = tmp_path / "中文.txt"
    file.write_bytes("工坊周二至周日开门。钥匙挂在钟的后面。".encode("gbk"))
    index = make_index(file)
    sync(index)
    assert held(index) == ["工坊周二至周日开门。钥匙挂在钟的后面。"]


# Interruptions ---------------------------------------------------------------------------------------------------------
class Interrupted(FakeEmbedder):
    """Stops with an error after some batches."""

    batch_size = 2

    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def embed_documents(self, texts):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().embed_documents(texts)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_a_run_that_breaks_off_is_taken_up_where_it_ended(folder, runtime, make_index, sync, error) -> None:
    runtime.fake_embedder = broken = Interrupted(error, after=3)
    index = make_index(folder)
    with pytest.raises(type(error)):
        sync(index)
    assert held(index) == []  # usable, in the state before
    runtime.fake_embedder = FakeEmbedder()
    index = make_index(folder)
    sync(index)
    assert len(held(index)) == 11
    assert sorted(broken.texts + runtime.fake_embedder.texts) == held(index)


def test_a_file_put_back_after_a_run_broke_off_within_it_leaves_nothing_of_the_other(
    tmp_path, runtime, make_index, sync, monkeypatch
) -> None:
    monkeypatch.setattr(index_module, "_GROUP", 2)  # chunks of one file go into the store in parts
    file = tmp_path / "a.txt"
    file.write_text(paragraphs(3, "first"))
    index = make_index(file)
    sync(index)
    before = held(index)
    file.write_text(paragraphs(9, "second"))
    runtime.fake_embedder = Interrupted(KeyboardInterrupt(), after=2)
    with pytest.raises(KeyboardInterrupt):
        sync(make_index(file))
    assert len(held(index)) == 7
    file.write_text(paragraphs(3, "first"))
    runtime.fake_embedder = FakeEmbedder()
    sync(make_index(file))
    assert held(index) == before
    assert runtime.fake_embedder.texts == []


def test_leaving_the_events_early_cancels_the_job(folder, runtime, make_index) -> None:
    index = make_index(folder)
    events = index.sync(lambda: runtime.jobs.start("test", "Index", {}))
    next(events)
    events.close()
    assert [record.state for record in runtime.jobs.jobs()] == ["cancelled"]


def test_a_full_disk_is_one_clear_error_and_the_index_stays_readable(
    folder, runtime, make_index, sync, monkeypatch
) -> None:
    index = make_index(folder)
    sync(index)
    (folder / "c.txt").write_text(paragraphs(40, "gamma"))
    # SQLite itself refuses to grow past this many pages, exactly as when the disk is full.
    pages = index.store._connection.execute("PRAGMA page_count").fetchone()[0]
    index.store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DocumentError, match="full"):
        sync(index)
    assert len(held(index)) == 11
    index.store._connection.execute("PRAGMA max_page_count = 1000000")
    sync(index)
    assert len(held(index)) == 51


def test_a_second_process_waits_for_the_first(folder, make_index, runtime) -> None:
    index = make_index(folder)
    lock, taken = FileLock(index.manifest.path.with_suffix(".lock"), thread_local=False), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            time.sleep(0.5)

    threading.Thread(target=hold).start()
    taken.wait()
    events = list(index.sync(lambda: runtime.jobs.start("test", "Index", {})))
    assert events[0] == Notice("Another process is indexing these documents; waiting for it.")
    assert len(held(index)) == 11


CHILD = """
import sys, time
from pathlib import Path
from calpaca.documents.index import DocumentIndex
from calpaca.testing import FakeEmbedder, fake_runtime

class Slow(FakeEmbedder):
    batch_size = 4
    def embed_documents(self, texts):
        time.sleep(0.004)
        vectors = super().embed_documents(texts)
        with open(sys.argv[2], "a") as log:
            log.writelines(text + "\\n" for text in texts)
        return vectors

runtime = fake_runtime(embedder=Slow())
index = DocumentIndex([sys.argv[1]], runtime.fake_embedder, runtime.loaders, runtime.stores.get("faiss"), chunk_size=13, chunk_overlap=0)
print("ready", flush=True)
for event in index.sync(lambda: runtime.jobs.start("test", "Index", {})):
    pass
print("done", flush=True)
"""


def contents(index) -> bytes:
    """Everything that an index holds, in an order that does not depend on when it was written."""
    store = index.store._connection
    rows = [
        store.execute("SELECT id, text, metadata, vector FROM documents JOIN vectors USING (number) ORDER BY id"),
        sqlite3.connect(index.manifest.path).execute(
            "SELECT id, path, page, heading, rows FROM chunks JOIN vectors USING (number) ORDER BY id"
        ),
        sqlite3.connect(index.manifest.path).execute("SELECT path, sha256 FROM files ORDER BY path"),
    ]
    return repr([each.fetchall() for each in rows]).encode()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_at_most_one_batch(folder, runtime, make_index, sync, tmp_path, kills) -> None:
    for number in range(30 * kills // 3):
        (folder / f"n{number}.txt").write_text(paragraphs(20, f"word{number}"))
    whole = make_index(folder)
    sync(whole)
    expected, texts = contents(whole), held(whole)
    whole.store.close()
    shutil.rmtree(tmp_path / "cache")
    for file in (tmp_path / "calpaca-data").glob("*"):
        file.unlink()
    runtime._jobs = None

    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments, log = random.Random(seed), tmp_path / "embedded.log"
    log.touch()
    outcomes = [run_killed(folder, log, moments.uniform(0.0, 0.8)) for _ in range(kills)]
    before = log.read_text().splitlines()
    runtime.fake_embedder.texts.clear()
    index = make_index(folder)
    sync(index)
    assert contents(index) == expected, f"seed {seed}: {outcomes}"
    repeated = len(before) + len(runtime.fake_embedder.texts) - len(texts)
    assert repeated <= 4 * kills, f"seed {seed}: a finished step was repeated"


def run_killed(folder: Path, log: Path, seconds: float) -> str:
    """Index in another process and kill it after some seconds of work."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    process.stdout.close()
    process.wait()
    return "done" if "done" in rest else "killed"


def test_the_same_job_twice_at_once_is_refused_by_the_ledger(folder, runtime, make_index, sync) -> None:
    index = make_index(folder)
    runtime.jobs.start("test", "Index", {"folder": str(index.folder)})
    with pytest.raises(JobError, match="running already"):
        sync(index)
