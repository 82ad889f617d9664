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
    """A thread that is given pieces and what to do with each, in order. An error in it is raised at the next call."""

    def __init__(self) -> None:
        self._queue: Queue[tuple[Callable[[Buffer], object], Buffer] | None] = Queue(maxsize=_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                take, piece = item
                try:
                    take(piece)
                except BaseException as error:  # raised again where the pieces come from
                    self._error = error

    def put(self, take: Callable[[Buffer], object], piece: Buffer) -> None:
        self._raise()
        self._queue.put((take, piece))

    def close(self) -> None:
        """Wait for everything put so far, and end. Once closed it can be closed again."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def finish(self) -> None:
        self.close()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class FileStream:
    """A file being written from its first byte to its last. A context manager; after it, `record` describes the file
    and `tensors` each tensor.

    Raises OSError when the disk does, and ModelError when a tensor's bytes are not as many as its shape needs.
    """

    def __init__(self, file: Path, name: str, advance: Callable[[int], object] = lambda _: None) -> None:
        self._file = file.open("wb", buffering=0)
        self._name = name
        self._advance = advance
        self._digest = hashlib.sha256()
        self._hashed: list[tuple[PlannedTensor, hashlib._Hash]] = []
        self._size = self._written = self._sent = 0
        self._writer, self._hasher, self._tensor_hasher = _Consumer(), _Consumer(), _Consumer()
        self.tensors: dict[str, TensorRecord] = {}
        self.record: FileRecord | None = None

    def __enter__(self) -> FileStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        consumers = (self._writer, self._hasher, self._tensor_hasher)
        try:
            if error is None:
                for consumer in consumers:
                    consumer.finish()
                os.fsync(self._file.fileno())
                self.record = FileRecord(self._size, self._digest.hexdigest())
                self.tensors = {
                    tensor.name: TensorRecord(self._name, tensor.dtype, tensor.shape, digest.hexdigest())
                    for tensor, digest in self._hashed
                }
        finally:
            for consumer in consumers:
                consumer.close()
            self._file.close()

    def write(self, data: Buffer) -> None:
        """The next bytes of the file."""
        self._size += len(data)
        self._writer.put(self._write_all, data)
        self._hasher.put(self._digest.update, data)

    def write_tensor(self, tensor: PlannedTensor, write: Callable[[Buffer], object] | None = None) -> None:
        """Make a tensor and write its bytes; `write` is what puts them into the file, if not this class itself."""
        digest, written = hashlib.sha256(), 0
        for buffer in tensor.chunks():
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                self._tensor_hasher.put(digest.update, piece)
                (write or self.write)(piece)
                self._advance(len(piece))
            written += len(view)
        if written != tensor.size:
            raise ModelError(
                f"{tensor.name} came out with {written:,} bytes; {list(tensor.shape)} of {tensor.dtype} are"
                f" {tensor.size:,}.",
                "The input changed while it was read; run the command again.",
            )
        self._hashed.append((tensor, digest))

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
