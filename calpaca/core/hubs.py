"""Model hubs: Hugging Face, its mirrors, and ModelScope."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.catalogue import Origin, Repository
from calpaca.core.disk import check_space
from calpaca.core.errors import DownloadError, MissingExtraError, ModelNotFoundError
from calpaca.core.sources import HUB_ID, UnavailableError

if TYPE_CHECKING:
    from calpaca.core.settings import Settings

_ALWAYS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
_ESSENTIAL = ("config.json", "adapter_config.json", "modules.json", "tokenizer.json", "tokenizer_config.json")
_SAFE, _PICKLED = ("*.safetensors",), ("pytorch_model*.bin", "adapter_model.bin")
_OTHER_FORMATS = ("onnx/*", "openvino/*", "coreml/*", "original/*", "runs/*", "checkpoint-*/*", "*training_args*")


class HuggingFaceSource:
    """The Hugging Face hub or the mirror that HF_ENDPOINT names, with the cache that all its tools share."""

    def __init__(self, settings: Settings) -> None:
        self.timeout = settings.hub_timeout

    def handles(self, origin: Origin) -> bool:
        return isinstance(origin, Repository) and HUB_ID.fullmatch(origin.id) is not None

    def cached(self, origin: Origin, revision: str | None) -> Path | None:
        """Whole is what the loaders need; a file that only this program would fetch may be missing."""
        from huggingface_hub import snapshot_download

        assert isinstance(origin, Repository)
        try:
            folder = Path(
                snapshot_download(origin.id, revision=revision, local_files_only=True, allow_patterns=list(_ESSENTIAL))
            )
            return folder if is_whole(folder) else None
        except (OSError, ValueError):
            return None

    def fetch(self, origin: Origin, revision: str | None) -> Path:
        """Safetensors where there are any, else PyTorch's `.bin`; never both, and no other format."""
        from huggingface_hub import constants

        assert isinstance(origin, Repository)
        if constants.HF_HUB_OFFLINE:
            raise UnavailableError("the Hugging Face hub is switched off by HF_HUB_OFFLINE")
        probe_endpoint(constants.ENDPOINT, self.timeout)
        check_space(Path(constants.HF_HUB_CACHE), origin.size, origin.id)
        folder = _translated(lambda: self._snapshot(origin.id, revision), origin, revision)
        if folder is None:
            raise ModelNotFoundError(
                f"{origin.id} on the hub holds no weights as safetensors or .bin.",
                "For a GGUF repository, download one file and name it as the model.",
            )
        return folder

    def _snapshot(self, repository: str, revision: str | None) -> Path | None:
        from huggingface_hub import snapshot_download

        for weights in (_SAFE, _PICKLED):
            folder = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*_ALWAYS, *weights],
                ignore_patterns=list(_OTHER_FORMATS),
                tqdm_class=_vanishing_bar(),
            )
            if is_whole(Path(folder)):
                return Path(folder)
        return None


class ModelScopeSource:
    """ModelScope, for those who cannot reach the Hugging Face hub. HF_HUB_OFFLINE switches it off too."""

    def __init__(self, settings: Settings) -> None:
        if find_spec("modelscope") is None:
            raise MissingExtraError("ModelScope", "modelscope", "modelscope")
        self.timeout = settings.hub_timeout

    def handles(self, origin: Origin) -> bool:
        return isinstance(origin, Repository) and HUB_ID.fullmatch(origin.id) is not None

    def cached(self, origin: Origin, revision: str | None) -> Path | None:
        assert isinstance(origin, Repository)
        if not _in_modelscope_cache(origin):
            return None  # importing its client takes more than a second
        from modelscope_hub.errors import HubError

        try:
            return self._snapshot(origin, revision, local_files_only=True)
        except (HubError, OSError, ValueError):
            return None

    def fetch(self, origin: Origin, revision: str | None) -> Path:
        from huggingface_hub import constants

        assert isinstance(origin, Repository)
        if constants.HF_HUB_OFFLINE:
            raise UnavailableError("ModelScope is switched off by HF_HUB_OFFLINE")
        from modelscope_hub.constants import DEFAULT_ENDPOINT
        from modelscope_hub.errors import HubError

        probe_endpoint(os.environ.get("MODELSCOPE_ENDPOINT") or DEFAULT_ENDPOINT, self.timeout)
        try:
            folder = self._snapshot(origin, revision, local_files_only=False)
        except (HubError, OSError, ValueError) as error:
            raise UnavailableError(f"ModelScope: {_first_line(error)}") from error
        if folder is None:
            raise UnavailableError(f"{origin.id} on ModelScope holds no weights as safetensors or .bin")
        return folder

    def _snapshot(self, origin: Origin, revision: str | None, *, local_files_only: bool) -> Path | None:
        from modelscope.hub.snapshot_download import snapshot_download

        assert isinstance(origin, Repository)
        for weights in (_SAFE, _PICKLED):
            folder = snapshot_download(
                origin.id,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=[*_ALWAYS, *weights],
                ignore_patterns=list(_OTHER_FORMATS),
            )
            if is_whole(Path(folder)):
                return Path(folder)
        return None


def _in_modelscope_cache(repository: Repository) -> bool:
    """Whether the owner has anything in ModelScope's cache, in today's layout or an older one."""
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    owner = repository.id.partition("/")[0]
    places = (cache / "models", cache / "hub", cache / "hub" / "models")
    return any(path for place in places for path in place.glob(f"{owner}*"))


def is_whole(folder: Path) -> bool:
    """Whether a folder has a configuration and every weights file that it should have."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "modules.json")):
        return False
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
        if all((folder / shard).is_file() for shard in shards):
            return True
    names = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
    # Old sentence-transformers models keep the encoder in a folder of its own.
    return any((each / name).is_file() for each in (folder, folder / "0_Transformer") for name in names)


def probe_endpoint(endpoint: str, timeout: float) -> None:
    """Raise UnavailableError unless the endpoint answers at all within `timeout` seconds.

    The hubs' own clients retry for tens of seconds. In a thread, because name resolution knows no timeout.
    """
    import httpx

    failure: list[str] = [f"no answer within {timeout:g} s"]

    def ask() -> None:
        try:
            response = httpx.head(endpoint, timeout=timeout, follow_redirects=False)
            failure[:] = [f"answered {response.status_code}"] if response.is_server_error else []
        except httpx.TimeoutException:
            pass
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure[:] = [_first_line(error)]

    thread = threading.Thread(target=ask, daemon=True, name="calpaca-probe")
    thread.start()
    thread.join(timeout)
    if failure:
        raise UnavailableError(f"{endpoint} cannot be reached ({failure[0]})")


def _translated(fetch: Callable[[], Path | None], origin: Repository, revision: str | None) -> Path | None:
    """Call the hub's client, with its errors as ours."""
    from huggingface_hub import errors

    try:
        return fetch()
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{origin.id} is gated: its owner must grant you access.",
            "Accept its terms on the hub, then log in with `hf auth login`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnavailableError(f"the Hugging Face hub has no {origin.id}, or it is private") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{origin.id} has no revision '{revision}'.", "Look at its branches and tags on the hub."
        ) from error
    except OSError as error:  # the client's HTTP and connection errors, and a full disk
        if isinstance(error, errors.HfHubHTTPError | errors.LocalEntryNotFoundError):
            raise UnavailableError(f"the Hugging Face hub: {_first_line(error)}") from error
        raise DownloadError(
            f"{origin.id} could not be stored: {error}.", "Check the disk of the hub's cache."
        ) from error
    except Exception as error:  # transport errors of whichever HTTP library the hub's client is built on
        raise UnavailableError(f"the Hugging Face hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _vanishing_bar() -> Any:
    """The hub's progress bar, without a trace where stderr is no terminal or the work is done."""
    from huggingface_hub.utils.tqdm import tqdm as hub_bar

    class VanishingBar(hub_bar):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(  # type: ignore[no-untyped-call]
                *args, **options | {"disable": options.get("disable") or None, "leave": False}
            )

    return VanishingBar
