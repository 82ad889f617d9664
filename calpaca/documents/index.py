"""An index of documents on disk that follows its files and survives a kill at any moment."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from filelock import FileLock, Timeout
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore
from numpy.typing import NDArray

from calpaca.core.embedding import Embedder
from calpaca.core.errors import DocumentError, MissingExtraError
from calpaca.core.events import Event, Notice, Progress
from calpaca.core.jobs import Job, step_key
from calpaca.core.registry import Component, Registry
from calpaca.documents import shelf
from calpaca.documents.hybrid import HybridRetriever
from calpaca.documents.loaders import FoundFiles, check_file, find_files, load_file
from calpaca.documents.manifest import IndexedChunk, Manifest
from calpaca.documents.sentences import runs
from calpaca.documents.shelf import IndexDescription, ShelvedIndex
from calpaca.documents.splitter import CHUNK_OVERLAP, CHUNK_SIZE, SentenceSplitter
from calpaca.documents.vectors import PreparedEmbeddings

FORMAT = 4
"""Part of an index's key. Raised when loaders or splitter change what they make of the same file, or the manifest its
tables."""

_GROUP = 1024
"""Chunks that are embedded before the store gets them: what is in memory, and how often the index grows."""


MOST_SENTENCES = 8
"""Vectors of sentences that a chunk has at most; in a longer one neighbours share a vector."""


@runtime_checkable
class Prepared(Protocol):
    """A store that can do now what its first search would do otherwise."""

    def prepare(self) -> None: ...


@dataclass(frozen=True)
class _FileChunks:
    """A file as it is to be in the index; `texts` are what is embedded of it."""

    path: str
    digest: str
    chunks: dict[str, Document]  # by id
    texts: int


@dataclass(frozen=True)
class _Changes:
    """What differs between the files and the index."""

    changed: list[_FileChunks]
    gone: list[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.gone)

    @property
    def texts(self) -> int:
        return sum(file.texts for file in self.changed)

    def groups(self) -> Iterator[list[_FileChunks]]:
        """Files that together have about `_GROUP` chunks."""
        group: list[_FileChunks] = []
        for file in self.changed:
            group.append(file)
            if sum(len(each.chunks) for each in group) >= _GROUP:
                yield group
                group = []
        if group:
            yield group


class DocumentIndex:
    """Chunks and vectors of some files and folders, made with one embedder and one way of splitting.

    Each combination of files, embedder and options has a folder of its own in the cache, so vectors of two embedders
    never mix. `sync` brings it up to date; `retriever` searches it, and so does `store`, a LangChain VectorStore;
    `failed` are the files that the last `sync` could not read. With `sentences` each sentence of a chunk has a vector as
    well, which finds more and takes about twice the time to index (docs/quality.md). A `collection` is an index with a
    name of its own, whose paths may change.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        embedder: Embedder,
        loaders: Registry[Component],
        store: Component,
        *,
        chunk_size: int = CHUNK_SIZE,
        chunk_overlap: int = CHUNK_OVERLAP,
        sentences: bool = True,
        collection: str = "",
    ) -> None:
        self.paths = [Path(path).expanduser() for path in paths]
        self.embedder = embedder
        self.loaders = loaders
        self.store_component = store
        self.sentences = sentences
        self.splitter = SentenceSplitter(embedder.count_tokens, chunk_size, chunk_overlap)
        self.description = self._described(collection)
        self.folder = shelf.shelf() / self._key()
        self.failed: dict[Path, DocumentError | MissingExtraError] = {}
        self._embeddings = PreparedEmbeddings(embedder)

    def _described(self, collection: str) -> IndexDescription:
        options = {
            "chunk_size": self.splitter.chunk_size,
            "chunk_overlap": self.splitter.chunk_overlap,
            "sentences": self.sentences,
            "store": self.store_component.name,
        }
        paths = tuple(sorted(str(path.resolve()) for path in self.paths))
        return IndexDescription(FORMAT, collection, paths, self.embedder.name, self.embedder.fingerprint, options)

    def _key(self) -> str:
        described = self.description
        named = {"collection": described.collection} if described.collection else {"paths": described.paths}
        key = step_key("index", format=FORMAT, embedder=described.fingerprint, **described.options, **named)
        return key[:20]

    @cached_property
    def store(self) -> VectorStore:
        """The vector store. Raises DocumentError when it cannot be opened."""
        opened: VectorStore = self.store_component.load()(self.folder / self.store_component.name, self._embeddings)
        return opened

    @cached_property
    def manifest(self) -> Manifest:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DocumentError(
                f"The index folder {self.folder} cannot be made: {error.strerror or error}.",
                "Free disk space or check the permissions; CALPACA_CACHE moves it.",
            ) from error
        return Manifest(self.folder / "manifest.sqlite")

    @property
    def retriever(self) -> HybridRetriever:
        """Search by meaning and by words together."""
        return HybridRetriever(store=self.store, manifest=self.manifest)

    def __len__(self) -> int:
        """Chunks in the index."""
        return len(self.manifest)

    def sync(self, start: Callable[[], Job]) -> Iterator[Event]:
        """Bring the index up to date with its files, reporting on it.

        What did not change is not read into memory, split or embedded; when nothing changed no job is started. Embeddings
        are steps of the job that `start` begins, so a run that was killed, cancelled or failed is taken up where it ended,
        and the index answers from what it held. In a folder an unreadable file is skipped with a Notice.

        Raises DocumentError for a missing path, a named file that cannot be read, and when there is nothing to index.
        """
        found = find_files(self.paths, self.loaders)
        lock = FileLock(self.manifest.path.parent / shelf.LOCK, thread_local=False)
        yield from _acquire(lock)
        try:
            yield from self._introduce()
            changes = yield from self._changes(found)
            if changes:
                yield from self._longer_than_read(changes)
                with start() as job:
                    yield from self._apply(job, changes)
        finally:
            lock.release()

    def _introduce(self) -> Iterator[Event]:
        """Say why an index is made although the same documents have one, and describe it."""
        if shelf.read(self.folder) == self.description:
            return
        others = [each for each in shelf.indexes() if each.folder != self.folder]
        yield from _replacements(self.description, others)
        shelf.write(self.folder, self.description)

    # Reading -------------------------------------------------------------------------------------------------------
    def _changes(self, found: FoundFiles) -> Generator[Event, None, _Changes]:
        """Compare the files with the manifest; read and split those that changed."""
        known = self.manifest.files()
        current: set[str] = set()
        changed: list[_FileChunks] = []
        self.failed = {}
        for path in found:
            try:
                digest = _digest(path)
                if known.get(str(path)) != digest:
                    documents = load_file(path, self.loaders)
                    yield from _scanned(path, documents)
                    changed.append(self._file(path, digest, documents))
                current.add(str(path))
            except (DocumentError, MissingExtraError) as error:
                if path in found.named:
                    raise
                self.failed[path] = error
                yield Notice(_skipped(path, error))
        if not current:
            raise self._nothing_to_read(found)
        if found.unknown:
            yield Notice(_unknown_kinds(found.unknown))
        if found.ignored:
            yield Notice(_ignored(found.ignored))
        return _Changes(changed, sorted(self.manifest.paths() - current))

    def _file(self, path: Path, digest: str, documents: Sequence[Document]) -> _FileChunks:
        chunks = self._chunks(path, documents)
        return _FileChunks(str(path), digest, chunks, sum(len(self._texts(chunk)) for chunk in chunks.values()))

    def _chunks(self, path: Path, documents: Sequence[Document]) -> dict[str, Document]:
        """Chunks of a file by id. Equal texts of one file are told apart by counting them."""
        seen: Counter[str] = Counter()
        chunks: dict[str, Document] = {}
        for chunk in self.splitter.split_documents(documents):
            text = chunk.page_content
            chunks[step_key("chunk", path=str(path), text=text, number=seen[text])[:32]] = chunk
            seen[text] += 1
        return chunks

    def _longer_than_read(self, changes: _Changes) -> Iterator[Event]:
        """Say of which chunks the embedding model does not read the end."""
        most = self.embedder.max_tokens
        longer = sum(chunk.metadata["tokens"] > most for file in changes.changed for chunk in file.chunks.values())
        if longer:
            yield Notice(
                f"{longer:,} chunks are longer than the {most} tokens that {self.embedder.name} reads: what lies past them "
                "is found by its words alone. Lower the chunk size."
            )

    def _nothing_to_read(self, found: FoundFiles) -> DocumentError:
        where = ", ".join(str(path) for path in self.paths)
        if self.failed:
            first = next(iter(self.failed.values()))
            return DocumentError(f"No file in {where} can be read; the first: {first.message}", first.hint)
        endings = sorted(suffix for loader in self.loaders for suffix in getattr(loader, "suffixes", ()))
        others = f" {_unknown_kinds(found.unknown)}" if found.unknown else ""
        others += f" {_ignored(found.ignored)}" if found.ignored else ""
        return DocumentError(
            f"There is no document in {where}.{others}", f"Files that can be read: {', '.join(endings)}."
        )

    # Writing -------------------------------------------------------------------------------------------------------
    def _apply(self, job: Job, changes: _Changes) -> Iterator[Event]:
        job.expect(changes.texts)
        for group in changes.groups():
            stale = self.manifest.chunk_ids(file.path for file in group).difference(*(file.chunks for file in group))
            for chunks in _parts(group):
                yield from self._add(job, chunks, changes.texts)
            self._delete(stale)
            self.manifest.finish({file.path: file.digest for file in group}, stale)
        self._delete(self.manifest.chunk_ids(changes.gone))
        self.manifest.forget(changes.gone)
        if isinstance(self.store, Prepared):
            self.store.prepare()

    def _add(self, job: Job, chunks: Mapping[str, tuple[str, Document]], total: int) -> Iterator[Event]:
        """Embed chunks, given by id with the path of their file, and put them into the store and the manifest."""
        documents = {name: chunk for name, (_, chunk) in chunks.items()}
        texts = {name: self._texts(chunk) for name, chunk in documents.items()}
        vectors = yield from self._embed(job, dict.fromkeys(chain(*texts.values())), total)
        self.manifest.announce(chunks)
        self._embeddings.prepared = vectors
        self.store.add_documents(list(documents.values()), ids=list(documents))
        self._embeddings.prepared = {}
        self.manifest.write(
            {
                name: IndexedChunk(text, np.stack([vectors[each] for each in (text, *sentences)]))
                for name, (text, *sentences) in texts.items()
            }
        )

    def _texts(self, chunk: Document) -> list[str]:
        """What is embedded of a chunk: its text, then its sentences where it has several and is prose."""
        text, form = chunk.page_content, chunk.metadata.get("format", "text")
        parts = runs(text, form, MOST_SENTENCES) if self.sentences and form not in ("code", "rows") else []
        return [text, *parts] if len(parts) > 1 else [text]

    def _embed(
        self, job: Job, texts: Iterable[str], total: int
    ) -> Generator[Event, None, Mapping[str, NDArray[np.float32]]]:
        """Vectors by text, from the ledger or the embedder. Texts of like length share a batch: less padding."""
        ordered = sorted(texts, key=_bytes, reverse=True)
        fingerprint = self.embedder.fingerprint
        keys = [step_key("embedding", fingerprint=fingerprint, text=_sha256(text)) for text in ordered]

        def work(positions: list[int]) -> dict[int, bytes]:
            vectors = self.embedder.embed_documents([ordered[position] for position in positions])
            rows = zip(positions, vectors, strict=True)
            return {position: vector.astype(np.float32).tobytes() for position, vector in rows}

        vectors: dict[str, NDArray[np.float32]] = {}
        for position, value in job.steps("embedding", keys, work, self.embedder.batch_size):
            vectors[ordered[position]] = np.frombuffer(value, np.float32)
            yield Progress(job.done, total, "texts", "Embedding")
        return vectors

    def _delete(self, names: set[str]) -> None:
        if names:
            self.store.delete(sorted(names))


def _parts(group: Sequence[_FileChunks]) -> Iterator[dict[str, tuple[str, Document]]]:
    """The chunks of some files by id, with the path of each, at most `_GROUP` at once: a file may have any number."""
    chunks = [(name, (file.path, chunk)) for file in group for name, chunk in file.chunks.items()]
    return (dict(chunks[start : start + _GROUP]) for start in range(0, len(chunks), _GROUP))


def _replacements(new: IndexDescription, others: Sequence[ShelvedIndex]) -> Iterator[Event]:
    """What is to be said about indexes of the same documents that cannot be used."""
    for other in others:
        old = other.description
        if old.subject != new.subject or old.options != new.options:
            continue
        stays = f"The old index stays until it is removed: calpaca indexes remove {other.id}"
        if old.fingerprint != new.fingerprint:
            models = f"with {new.embedder}; {old.embedder} was used before"
            yield Notice(f"Vectors of two embedding models are never mixed: embedding anew {models}. {stays}")
        elif old.format != new.format:
            yield Notice(f"The index was made by another version of calpaca and is made anew. {stays}")


def _acquire(lock: FileLock) -> Iterator[Event]:
    """Take the lock; say so when another process has it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield Notice("Another process is indexing these documents; waiting for it.")
        lock.acquire()
    except OSError as error:
        raise DocumentError(
            f"The index cannot be locked: {error.strerror or error}.",
            "Free disk space or check the permissions; CALPACA_CACHE moves it.",
        ) from error


def _bytes(text: str) -> int:
    """About as many as tokens, in any language."""
    return len(text.encode("utf-8", "surrogatepass"))


def _digest(path: Path) -> str:
    check_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}.", "Check its permissions.") from error


def _sha256(text: str) -> str:
    # A file may hold half of a surrogate pair (it was decoded leniently by somebody's loader).
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _scanned(path: Path, documents: Sequence[Document]) -> Iterator[Event]:
    """Say which pages are pictures, whose text nobody reads."""
    pages = ", ".join(str(each.metadata["page"]) for each in documents if each.metadata.get("scanned"))
    if pages:
        yield Notice(f"{path}: page(s) {pages} have no text (scanned?) and were left out.")


def _skipped(path: Path, error: DocumentError | MissingExtraError) -> str:
    if isinstance(error, MissingExtraError):
        return f"Skipped: {path}. {error.message} {error.hint}"
    return f"Skipped: {error.message}"


def _unknown_kinds(unknown: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count} × {suffix}" for suffix, count in sorted(unknown.items()))
    return f"Files of kinds that no loader reads were left out: {kinds}."


def _ignored(count: int) -> str:
    return f"Files and folders that .gitignore or .calpacaignore names were left out: {count}."
