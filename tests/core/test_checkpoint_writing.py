"""Writing planned models: whole or not at all, going on after a kill, verified afterwards."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from calpaca.core.checkpoint.lineage import find_weights, input_of, versions
from calpaca.core.checkpoint.manifest import MANIFEST, Lineage, read_manifest
from calpaca.core.checkpoint.plan import ModelPlan, computed, copied, hugging_face_files
from calpaca.core.checkpoint.reader import open_checkpoint
from calpaca.core.checkpoint.verify import verify
from calpaca.core.checkpoint.write import write_model
from calpaca.core.errors import CorruptFileError, DownloadError, ModelNotFoundError, UsageError
from calpaca.core.jobs import Ledger

NAMES = [f"layers.{number}.weight" for number in range(6)]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(64, 64, generator=generator) for name in NAMES},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def jobs(tmp_path):
    return Ledger(tmp_path / "jobs.sqlite")


def copy_plan(source, container="safetensors", make=None):
    """A plan that copies, a tensor to a file; `make` takes the third tensor's place."""
    checkpoint = open_checkpoint(source)
    tensors = [copied(checkpoint, name) for name in NAMES]
    if make is not None:
        tensors[3] = computed(NAMES[3], "F32", (64, 64), make, origin=tensors[3].origin)
    return ModelPlan(
        hugging_face_files(tensors, container, shard_size=1),
        lambda: Lineage("copy", (input_of("base", "source", source),), versions=versions()),
        checkpoint.files,
        texts={"config.json": source / "config.json", "note.json": b"{}\n"},
    )


def test_a_written_folder_is_whole_and_says_what_it_is(source, tmp_path, jobs):
    manifest = write_model(copy_plan(source), tmp_path / "copy", jobs)
    assert read_manifest(tmp_path / "copy") == manifest
    assert manifest.weights == find_weights(tmp_path / "copy") == find_weights(source)
    assert manifest.lineage.inputs[0].name == "source"
    assert verify(tmp_path / "copy").passed
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name) == ["copy"]


def test_both_containers_have_the_same_tensors(source, tmp_path, jobs):
    one = write_model(copy_plan(source), tmp_path / "one", jobs)
    other = write_model(copy_plan(source, "torch"), tmp_path / "other", jobs)
    assert one.weights == other.weights
    assert verify(tmp_path / "other", against=tmp_path / "one").passed


def test_a_folder_that_is_there_is_not_written_over(source, tmp_path, jobs):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        write_model(copy_plan(source), tmp_path / "copy", jobs)
    assert (tmp_path / "copy" / "mine").read_text() == "precious"


def test_after_an_error_the_finished_files_are_kept_and_used(source, tmp_path, jobs):
    def fail():
        raise CorruptFileError("The tensor is damaged.")

    with pytest.raises(CorruptFileError):
        write_model(copy_plan(source, make=fail), tmp_path / "copy", jobs)
    assert not (tmp_path / "copy").exists()
    work = tmp_path / ".copy.partial"
    kept = {path.name: path.stat().st_ino for path in work.glob("*.safetensors")}
    assert len(kept) == 3
    write_model(copy_plan(source), tmp_path / "copy", jobs)
    assert all((tmp_path / "copy" / name).stat().st_ino == inode for name, inode in kept.items())
    assert verify(tmp_path / "copy").passed
    assert not work.exists()


def test_a_finished_file_that_was_damaged_meanwhile_is_written_again(source, tmp_path, jobs):
    def fail():
        raise CorruptFileError("The tensor is damaged.")

    with pytest.raises(CorruptFileError):
        write_model(copy_plan(source, make=fail), tmp_path / "copy", jobs)
    first = tmp_path / ".copy.partial" / "model-00001-of-00006.safetensors"
    flip(first, first.stat().st_size - 1)
    write_model(copy_plan(source), tmp_path / "copy", jobs)
    assert verify(tmp_path / "copy").passed
    assert find_weights(tmp_path / "copy") == find_weights(source)


def test_changed_inputs_start_the_run_anew(source, tmp_path, jobs):
    def fail():
        raise CorruptFileError("The tensor is damaged.")

    with pytest.raises(CorruptFileError):
        write_model(copy_plan(source, make=fail), tmp_path / "copy", jobs)
    save_file({name: torch.ones(64, 64) for name in NAMES}, source / "model.safetensors")
    write_model(copy_plan(source), tmp_path / "copy", jobs)
    assert find_weights(tmp_path / "copy") == find_weights(source)


def test_a_full_disk_is_named_with_its_numbers_and_leaves_nothing_finished(source, tmp_path, jobs, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DownloadError, match=r"needs 0\.1 MB .* but 0\.0 MB are free") as error:
        write_model(copy_plan(source), tmp_path / "copy", jobs)
    assert "--output" in error.value.hint
    assert not (tmp_path / "copy").exists()


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are a POSIX thing")
def test_a_disk_that_fills_half_way_leaves_nothing_finished(source, tmp_path):
    program = (
        "import resource, signal, sys; from pathlib import Path; from calpaca.core.checkpoint.write import write_model;"
        "from calpaca.core.jobs import Ledger; sys.path.insert(0, sys.argv[1]);"
        "from test_checkpoint_writing import copy_plan; import torch;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); jobs = Ledger(Path(sys.argv[3]) / 'jobs.sqlite');"
        "plan = copy_plan(Path(sys.argv[2]), make=lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),"
        " torch.zeros(64, 64))[1]); write_model(plan, Path(sys.argv[3]) / 'copy', jobs)"
    )
    here = os.path.dirname(__file__)  # noqa: PTH120
    ended = subprocess.run(
        [sys.executable, "-c", program, here, str(source), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode
    assert "DownloadError" in ended.stderr
    assert "File too large" in ended.stderr
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / ".copy.partial" / "model-00004-of-00006.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX thing")
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source, tmp_path, jobs):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    expected = write_model(copy_plan(source), tmp_path / "whole", jobs)
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from test_checkpoint_writing import slowly; slowly(Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    here = os.path.dirname(__file__)  # noqa: PTH120
    arguments = [sys.executable, "-c", program, here, str(source), str(tmp_path / "killed")]
    for _ in range(3):
        process = subprocess.Popen(arguments)
        work = tmp_path / ".killed.partial"
        deadline = time.monotonic() + 60
        while not work.is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, check=True)
    assert read_manifest(tmp_path / "killed").files.keys() == expected.files.keys()
    for name in expected.files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert verify(tmp_path / "killed").passed


def slowly(source, output):
    """Copy at a pace that can be killed in the middle."""
    plan = copy_plan(source)
    checkpoint = open_checkpoint(source)

    def pausing(name):
        for chunk in checkpoint.chunks(name):
            for start in range(0, len(chunk), 4096):
                time.sleep(0.05)
                yield chunk[start : start + 4096]

    slow = [
        type(tensor)(tensor.name, tensor.dtype, tensor.shape, lambda name=tensor.name: pausing(name), tensor.origin)
        for tensor in plan.tensors
    ]
    files = hugging_face_files(slow, shard_size=1)
    write_model(
        ModelPlan(files, plan.lineage, plan.inputs, texts=plan.texts), output, Ledger(output.parent / "jobs.sqlite")
    )


# Verification --------------------------------------------------------------------------------------------------------
def flip(file, position):
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.fixture
def copy(source, tmp_path, jobs):
    write_model(copy_plan(source), tmp_path / "copy", jobs)
    return tmp_path / "copy"


def test_one_flipped_bit_is_found_and_its_tensor_named(copy):
    flip(copy / "model-00003-of-00006.safetensors", 5000)
    (finding,) = verify(copy).findings
    assert (finding.file, finding.tensors) == ("model-00003-of-00006.safetensors", (NAMES[2],))


def test_a_changed_file_with_its_old_times_is_found(copy):
    file = copy / "model-00003-of-00006.safetensors"
    verify(copy)
    before = file.stat()
    flip(file, 5000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not verify(copy).passed


def test_a_missing_and_a_truncated_file_are_found(copy):
    (copy / "model-00001-of-00006.safetensors").unlink()
    last = copy / "model-00006-of-00006.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    missing, short = verify(copy).findings
    assert (missing.file, missing.problem) == ("model-00001-of-00006.safetensors", "is missing")
    assert "it has 16,503 bytes instead of 16,504" in short.problem


def test_other_values_dtypes_and_names_are_told_from_a_manifest_elsewhere(copy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tensors = {name: open_checkpoint(copy).read(name) for name in NAMES}
    tensors[NAMES[0]][0, 0] += 1
    tensors[NAMES[1]] = tensors[NAMES[1]].half()
    tensors["more"] = tensors.pop(NAMES[2])
    save_file(tensors, other / "model.safetensors")
    problems = {finding.tensors[0]: finding.problem for finding in verify(other, against=copy).findings}
    assert problems == {
        NAMES[0]: "has other values",
        NAMES[1]: "has F16 [64, 64] instead of F32 [64, 64]",
        NAMES[2]: "lacks a tensor",
        "more": "holds tensors that the manifest does not know",
    }


def test_a_published_list_of_sums_is_checked(copy, tmp_path):
    sums = tmp_path / "SHA256SUMS"
    records = read_manifest(copy).files
    sums.write_text("".join(f"{record.sha256}  {name}\n" for name, record in records.items()))
    assert verify(copy, against=sums).passed
    assert verify(copy / "config.json", against=sums).files == 1
    flip(copy / "model-00002-of-00006.safetensors", 5000)
    (finding,) = verify(copy, against=sums).findings
    assert "instead of " + records["model-00002-of-00006.safetensors"].sha256 in finding.problem


@pytest.mark.parametrize(
    ("text", "message"), [("no sums here\n", "Line 1 .* is no sha256 sum"), ("\n", "lists nothing")]
)
def test_a_file_that_is_no_list_of_sums_is_refused(copy, tmp_path, text, message):
    (tmp_path / "sums.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        verify(copy, against=tmp_path / "sums.txt")


def test_a_folder_without_manifest_says_what_to_do(source):
    with pytest.raises(ModelNotFoundError) as error:
        verify(source)
    assert "--against" in error.value.hint


def test_a_manifest_that_was_edited_is_refused(copy):
    content = json.loads((copy / MANIFEST).read_text())
    content["tensors"][NAMES[0]]["sha256"] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="was changed"):
        verify(copy)
