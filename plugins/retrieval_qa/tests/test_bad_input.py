"""`calpaca run retrieval_qa` on what it cannot read: a line each, and the rest is answered from."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from calpaca.documents.formats import archive
from calpaca.testing import fake_runtime
from calpaca_retrieval_qa.index_options import IndexOptions

QUESTION = "What does the dog like?"
GOOD = "The dog of this house likes bones.\n"

LOCKED = f"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Count 0/Kids[]>>endobj
trailer<</Root 1 0 R/ID[<00><00>]/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{"00" * 32}>/U<{"00" * 32}>>>>>
%%EOF"""


@cache
def bomb() -> bytes:
    """A Word document of some hundred kilobytes that would unpack to 257 MiB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr("[Content_Types].xml", "<Types/>")
        with packed.open("word/document.xml", "w") as part:
            for _ in range((archive.MOST_MARKUP_BYTES >> 20) + 1):
                part.write(bytes(1 << 20))
    return buffer.getvalue()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2 << 30)  # takes no room on disk


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "locked.pdf": (lambda path: path.write_text(LOCKED), "locked by a password"),
    "bomb.docx": (lambda path: path.write_bytes(bomb()), "would unpack to 257 MiB"),
    "large.txt": (sparse, "has 2,048 MiB, more than"),
    "empty.txt": (lambda path: path.touch(), "holds no text"),
    "binary.md": (lambda path: path.write_bytes(bytes(range(256)) * 8), "is a binary file"),
    "cut.xlsx": (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "damaged or cut short"),
    "itself.txt": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "nowhere.txt": (lambda path: path.symlink_to("gone.txt"), "No such file"),
    "pipe.txt": (os.mkfifo, "no ordinary file"),
    "rows.json": (lambda path: path.write_text("{"), "is no JSON"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "documents"
    made.mkdir()
    (made / "good.txt").write_text(GOOD)
    return made


@pytest.fixture
def ask(calpaca_program) -> Callable:
    """`ask(path, …)` runs the command on a path with a scripted model."""

    def run(path: Path, *more: str, **engine):
        runtime = fake_runtime(["It likes bones."], **engine)
        return calpaca_program(
            "run", "retrieval_qa", "--file", str(path), "--question", QUESTION, *more, runtime=runtime
        )

    return run


def test_each_bad_file_of_a_folder_is_one_line_and_the_rest_is_answered_from(folder, ask) -> None:
    for name, (make, _) in BAD.items():
        make(folder / name)
    (folder / "round").symlink_to(folder)
    outcome = ask(folder)
    assert outcome.code == 0
    assert outcome.out.startswith("It likes bones. [1]")
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in outcome.err.splitlines() if name in line]
        assert line.startswith("Note: Skipped: ")
        assert reason in line
    again = ask(folder)
    assert again.code == 0
    assert again.out == outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_that_is_named_is_an_error_of_one_line_with_advice(folder, ask, name: str) -> None:
    make, reason = BAD[name]
    make(folder / name)
    outcome = ask(folder / name)
    assert outcome.code == 1
    assert outcome.out == ""
    said = [line for line in outcome.err.splitlines() if not line.startswith("Note: ")]
    assert len(said) == 2
    assert name in said[0]
    assert reason in said[0] or not (folder / name).exists()
    assert ask(folder / "good.txt").code == 0


def test_a_folder_that_may_not_be_listed_is_said(folder, ask, monkeypatch) -> None:
    (folder / "closed").mkdir()
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    outcome = ask(folder)
    assert outcome.code == 0
    assert f"The folder {folder / 'closed'} cannot be listed." in outcome.err


# Chunks and contexts ------------------------------------------------------------------------------------------------
def test_a_chunk_larger_than_the_context_is_an_error_with_numbers_and_advice(folder, ask) -> None:
    (folder / "long.txt").write_text("The dog likes bones and runs about the house. " * 200)
    outcome = ask(folder / "long.txt", "--chunk-size", "3000", "--max-new-tokens", "32", context_length=1000)
    assert outcome.code == 3
    assert "the context holds 1000" in outcome.err
    assert "--chunk-size" in outcome.err
    assert ask(folder / "long.txt", "--max-new-tokens", "32", context_length=4000).code == 0


def test_chunks_longer_than_the_embedding_model_reads_are_said(folder, ask) -> None:
    (folder / "long.txt").write_text("The dog likes bones and runs about the house. " * 200)
    assert "1 chunks are longer than the 512 tokens" in ask(folder, "--chunk-size", "3000").err


# Indexes ------------------------------------------------------------------------------------------------------------
def index_folder(file: Path) -> Path:
    return IndexOptions(files=[file]).index(fake_runtime(), None).folder


def test_a_damaged_index_is_an_error_that_names_it_and_works_again_once_it_is_removed(
    folder, ask, calpaca_program
) -> None:
    assert ask(folder).code == 0
    place = index_folder(folder)
    (place / "manifest.sqlite").write_text("not a database, whatever it was before")
    outcome = ask(folder)
    assert outcome.code == 1
    assert str(place) in outcome.err
    assert "may be deleted" in outcome.err
    assert calpaca_program("indexes", "remove", place.name).code == 0
    assert ask(folder).code == 0


def test_an_index_of_another_version_is_left_alone_and_that_is_said(folder, ask, monkeypatch) -> None:
    from calpaca.documents import index

    monkeypatch.setattr(index, "FORMAT", index.FORMAT - 1)
    assert ask(folder).code == 0
    old = index_folder(folder)
    monkeypatch.undo()
    monkeypatch.setenv("CALPACA_CACHE", str(folder.parent / "cache"))
    outcome = ask(folder)
    assert outcome.code == 0
    assert "made by another version of calpaca and is made anew" in outcome.err
    assert f"calpaca indexes remove {old.name}" in outcome.err
    assert (old / "manifest.sqlite").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; skips where it may not be mounted."""
    if shutil.which("mount") is None:
        pytest.skip("there is no program `mount`")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_one_line_and_what_was_indexed_is_answered_from(small_disk, folder, ask, monkeypatch) -> None:
    for name in ("CALPACA_CACHE", "CALPACA_DATA"):
        monkeypatch.setenv(name, str(small_disk / name))
    assert ask(folder).code == 0
    large = folder / "large.txt"
    large.write_text("\n\n".join(f"The fox of house {number} likes dish {number}." for number in range(6000)))
    outcome = ask(folder)
    assert outcome.code == 1
    assert outcome.out == ""
    assert "full" in outcome.err or "No space left" in outcome.err
    assert "Free disk space" in outcome.err
    assert "Traceback" not in outcome.err
    large.unlink()
    outcome = ask(folder)
    assert (outcome.code, outcome.out.splitlines()[0]) == (0, "It likes bones. [1]")


PROGRAM = """
import sys, time
from calpaca.cli.main import main
from calpaca.plugins import wiring
from calpaca.testing import FakeEmbedder, fake_runtime

class Slow(FakeEmbedder):
    batch_size = 16
    def embed_documents(self, texts):
        time.sleep(0.05)
        return super().embed_documents(texts)

wiring._shared = fake_runtime(["It likes bones."], embedder=Slow())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_programs_on_one_folder_both_answer(folder) -> None:
    (folder / "more.txt").write_text("\n\n".join(f"The fox of house {n} likes dish {n}." for n in range(300)))
    asked = ["run", "retrieval_qa", "--file", str(folder), "--question", QUESTION]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outcomes = [program.communicate() for program in both]
    assert [program.returncode for program in both] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]
    assert outcomes[0][0].startswith("It likes bones. [1]")
