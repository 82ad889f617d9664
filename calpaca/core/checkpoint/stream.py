"""Writing a large file in one pass: bytes are written, and hashed per file and per tensor, side by side.

Hashing releases Python's lock, so each consumer has a thread of its own while the next bytes are made. Queues are
short: what waits is bounded by a few pieces.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import TracebackType

from calpaca.core.checkpoint.manifest import FileRecord, TensorRecord
from calpaca.core.checkpoint.plan import Buffer, PlannedTensor
from calpaca.core.errors import ModelError

_WAITING = 2  # pieces that may wait for one consumer
_PIECE = 4 << 20  # bytes; larger buffers are handed on in pieces of this size, and freed memory stays this small
_WRITE = 256 << 10  # bytes written at a time; in larger pages Linux 6.18 took eight times the processor time for them
_SENT = 64 << 20  # bytes after which the system is told to begin with the disk, so that little is left for the end


class _Consumer:
    """A thread that takes pieces in order. An error in it is raised at the next call."""

    def __init__(self, take: Callable[[Buffer], object]) -> None:
        self._queue: Queue[Buffer | threading.Event | None] = Queue(maxsize=_WAITING)
        self._take = take
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif self._error is None:
                try:
                    self._take(item)
                except BaseException as error:  # raised again where the pieces come from
                    self._error = error

    def put(self, piece: Buffer) -> None:
        self._raise()
        self._queue.put(piece)

    def wait(self) -> None:
        """Until everything put so far has been taken."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self._raise()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class FileStream:
    """A file being written from its first byte to its last. A context manager; after it, `record` describes the file.

    Raises OSError when the disk does, and ModelError when a tensor's bytes are not as many as its shape needs.
    """

    def __init__(self, file: Path, name: str, advance: Callable[[int], object] = lambda _: None) -> None:
        self._file = file.open("wb", buffering=0)
        self._name = name
        self._advance = advance
        self._digest = hashlib.sha256()
        self._tensor_digest = hashlib.sha256()
        self._size = self._written = self._sent = 0
        self._consumers = {
            "file": _Consumer(self._write_all),
            "digest": _Consumer(self._digest.update),
            "tensor": _Consumer(self._hash_tensor),
        }
        self.tensors: dict[str, TensorRecord] = {}
        self.record: FileRecord | None = None

    def __enter__(self) -> FileStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for consumer in self._consumers.values():
                    consumer.wait()
                os.fsync(self._file.fileno())
                self.record = FileRecord(self._size, self._digest.hexdigest())
        finally:
            for consumer in self._consumers.values():
                consumer.close()
            self._file.close()

    def write(self, data: Buffer) -> None:
        """The next bytes of the file."""
        self._size += len(data)
        self._consumers["file"].put(data)
        self._consumers["digest"].put(data)

    def write_tensor(self, tensor: PlannedTensor, write: Callable[[Buffer], object] | None = None) -> None:
        """Make a tensor and write its bytes; `write` is what puts them into the file, if not this class itself."""
        self._tensor_digest = hashlib.sha256()
        written = 0
        for buffer in tensor.chunks():
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                self._consumers["tensor"].put(piece)
                (write or self.write)(piece)
                self._advance(len(piece))
            written += len(view)
        self._consumers["tensor"].wait()
        if written != tensor.size:
            raise ModelError(
                f"{tensor.name} came out with {written:,} bytes; {list(tensor.shape)} of {tensor.dtype} are"
                f" {tensor.size:,}.",
                "The input changed while it was read; run the command again.",
            )
        self.tensors[tensor.name] = TensorRecord(
            self._name, tensor.dtype, tensor.shape, self._tensor_digest.hexdigest()
        )

    def _write_all(self, piece: Buffer) -> None:
        view = memoryview(piece)
        while view:
            count = self._file.write(view[:_WRITE]) or 0
            view = view[count:]
            self._written += count
        if self._written - self._sent >= _SENT:
            self._send_to_disk()

    def _send_to_disk(self) -> None:
        """Begin to write out what lies in memory. Linux does that for pages said to be unneeded before it drops them,
        and keeps those that are on their way."""
        if hasattr(os, "posix_fadvise"):
            length = self._written - self._sent
            os.posix_fadvise(self._file.fileno(), self._sent, length, os.POSIX_FADV_DONTNEED)
        self._sent = self._written

    def _hash_tensor(self, piece: Buffer) -> None:
        self._tensor_digest.update(piece)
