"""Writing a planned model: file by file into a work folder beside the output, which becomes the output at the end.

Until then nothing carries the output's name. Each finished file is a step of a job, so a run that was killed goes on
with the next file, after the finished ones were hashed again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from calpaca.core.checkpoint import gguf_file, safetensors, torch_zip
from calpaca.core.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Lineage,
    Manifest,
    TensorRecord,
    read_record,
    record_name,
)
from calpaca.core.checkpoint.plan import ModelPlan, PlannedFile, PlannedTensor, index_of, shared_names
from calpaca.core.checkpoint.stream import FileStream
from calpaca.core.disk import check_space, disk_errors
from calpaca.core.errors import UsageError
from calpaca.core.fingerprint import file_digest, remember_digest
from calpaca.core.jobs import Job, Ledger, step_key
from calpaca.core.lock import exclusive

_WRITERS = {
    "safetensors": lambda stream, file: safetensors.write(stream, file.tensors),
    "torch": lambda stream, file: torch_zip.write(stream, file.tensors),
    "gguf": lambda stream, file: gguf_file.write(stream, file.tensors, file.header),
}
_PARTIAL = ".partial"
_RUN = "run"  # the work folder's file that tells this run from an earlier one into the same output
_ELSEWHERE = "or name another --output; the same command then goes on where it stopped"


@dataclass(frozen=True)
class Command:
    """How a job is started again: the command line and the folder it was given in."""

    argv: tuple[str, ...] = ()
    cwd: str = ""

    kind: ClassVar[str] = "models"


def check_output(output: Path) -> None:
    """Raise UsageError unless `output` is free: missing, or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise UsageError(f"{output} exists already.", "Name another --output, or remove it first.")


def work_folder(output: Path) -> Path:
    """Where a model is written until it is whole."""
    return output.absolute().parent / f".{output.name}{_PARTIAL}"


def write_model(plan: ModelPlan, output: Path, jobs: Ledger, command: Command | None = None) -> Manifest:
    """Write a model folder, or go on with one that was interrupted; returns the manifest that lies in it.

    Raises UsageError when `output` is taken, DownloadError when the disk is too small or fails, and whatever making a
    tensor raises. What is finished by then stays in the work folder for the next run.
    """
    with exclusive(output):
        check_output(output)
        folder = work_folder(output)
        with (
            disk_errors(folder, output.name, plan.size, _ELSEWHERE),
            jobs.start(Command.kind, f"write {output}", asdict(command or Command()) | {"output": str(output)}) as job,
            ThreadPoolExecutor(1) as pool,
        ):
            folder.mkdir(parents=True, exist_ok=True)
            lineage = pool.submit(plan.lineage)
            manifest = _fill(folder, plan, job, lineage)
            _fsync(folder)
            if plan.check is not None:
                _check(plan.check, folder)
            folder.replace(output)
    return manifest


def _check(check: Callable[[Path], object], folder: Path) -> None:
    """A folder that fails is removed: finished files in it would be taken for good ones by the next run."""
    try:
        check(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(folder: Path, plan: ModelPlan, job: Job, lineage: Future[Lineage]) -> Manifest:
    """Write everything into the work folder, the manifest last."""
    files, tensors = dict[str, FileRecord](), dict[str, TensorRecord]()
    shared = shared_names(plan.files)
    for written in _write_files(folder, plan, job):
        files[written["name"]] = FileRecord(**written["file"])
        for name, record in written["tensors"].items():
            tensors[record_name(written["name"], name, shared)] = read_record(record)
    texts = dict(plan.texts) | {name: _json(content) for name, content in index_of(plan.files).items()}
    for name, content in texts.items():
        _write_text(folder / name, content)
        files[name] = FileRecord((folder / name).stat().st_size, file_digest(folder / name, use_memo=False))
    planned = [record_name(file.name, tensor.name, shared) for file in plan.files for tensor in file.tensors]
    manifest = Manifest(lineage.result(), files, {name: tensors[name] for name in planned})
    _write_text(folder / MANIFEST, manifest.to_json().encode())
    for leftover in folder.iterdir():
        if leftover.name not in files and leftover.name != MANIFEST:
            leftover.unlink()
    return manifest


def _write_files(folder: Path, plan: ModelPlan, job: Job) -> list[dict[str, Any]]:
    """Write the files of weights that are not there yet; a record of each, as JSON values."""
    keys = _usable_keys(folder, plan, job.ledger)
    finished = job.ledger.get_many(keys)
    left = sum(file.size for file, key in zip(plan.files, keys, strict=True) if key not in finished)
    check_space(folder, left, folder.name.removeprefix(".").removesuffix(_PARTIAL), _ELSEWHERE)
    job.expect(len(plan.files))
    records: dict[int, dict[str, Any]] = {}
    with tqdm(total=plan.size, initial=plan.size - left, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def work(positions: list[int]) -> Mapping[int, bytes]:
            return {number: _json(_write_file(folder, plan.files[number], bar)) for number in positions}

        for number, record in job.steps("write_file", keys, work):
            records[number] = json.loads(record)
    return [records[number] for number in range(len(plan.files))]


def _usable_keys(folder: Path, plan: ModelPlan, ledger: Ledger) -> list[str]:
    """The steps' keys. When a finished file is not what the ledger says, the whole run begins anew."""
    keys = _keys(folder, plan)
    for record in map(json.loads, ledger.get_many(keys).values()):
        file = folder / record["name"]
        if not file.is_file() or file_digest(file, use_memo=False) != record["file"]["sha256"]:
            (folder / _RUN).unlink()
            return _keys(folder, plan)
    return keys


def _keys(folder: Path, plan: ModelPlan) -> list[str]:
    run = folder / _RUN
    if not run.is_file():
        run.write_text(secrets.token_hex(16))
    inputs = [[str(path.absolute()), *_state(path)] for path in plan.inputs]
    shared = {"run": run.read_text(), "inputs": inputs, "settings": dict(plan.settings)}
    return [
        step_key("write_file", name=file.name, tensors=[_identity(tensor) for tensor in file.tensors], **shared)
        for file in plan.files
    ]


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _identity(tensor: PlannedTensor) -> list[Any]:
    return [tensor.name, tensor.dtype, list(tensor.shape), tensor.origin]


def _write_file(folder: Path, planned: PlannedFile, bar: Any) -> dict[str, Any]:
    unfinished = folder / f"{planned.name}.unfinished"
    with FileStream(unfinished, planned.name, bar.update) as stream:
        _WRITERS[planned.container](stream, planned)
    assert stream.record is not None
    file = unfinished.replace(folder / planned.name)
    remember_digest(file, stream.record.sha256)
    _fsync(folder)
    tensors = {name: asdict(record) for name, record in stream.tensors.items()}
    return {"name": planned.name, "file": asdict(stream.record), "tensors": tensors}


def _write_text(file: Path, content: bytes | Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, file)
    else:
        file.write_bytes(content)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _fsync(folder: Path) -> None:
    """Make renames inside a folder last, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
