"""Find a file on the Python package index, through the simple API and the index that the user's pip or uv uses."""

from __future__ import annotations

import configparser
import json
import os
import re
import ssl
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import httpx
import platformdirs

from calpaca.core.download import reason
from calpaca.core.errors import DownloadError

# PEP 691, and PEP 503 for indexes that know only HTML.
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"
_CREDENTIALS = re.compile(r"(?<=//)[^/@]*@")
_SHOW_DEFAULT = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"


@dataclass(frozen=True)
class IndexFile:
    """A file that an index lists. `sha256` is None where the index does not give one."""

    filename: str
    url: str
    sha256: str | None


def open_client(timeout: float = 30.0) -> httpx.Client:
    """An HTTP client that trusts what pip trusts: the system, certifi, SSL_CERT_FILE and PIP_CERT."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    own = os.environ.get("PIP_CERT") or _pip_config().get("cert")
    if own and Path(own).is_file():
        context.load_verify_locations(own)
    return httpx.Client(verify=context, follow_redirects=True, timeout=httpx.Timeout(timeout, connect=10.0))


def find_file(client: httpx.Client, package: str, filename: str, sha256: str) -> str:
    """URL of the file with this digest on the first index that has it.

    A file without a digest in the listing is taken by its name. Raises DownloadError that names what each index said.
    """
    failures = []
    for index in index_urls():
        try:
            files = _list_files(client, index, package)
        except httpx.HTTPStatusError as error:
            failures.append(f"{_shown(index)} answered {error.response.status_code}")
        except httpx.TransportError as error:
            failures.append(f"{_shown(index)}: {reason(error)}")
        except ValueError as error:
            failures.append(f"{_shown(index)} is no package index: {error}")
        else:
            for file in files:
                if file.sha256 == sha256 or (file.sha256 is None and file.filename == filename):
                    return _with_credentials(file.url, index)
            failures.append(f"{_shown(index)} does not list it")
    raise DownloadError(
        f"{filename} was found on no package index ({'; '.join(failures)}).",
        "Check the connection, or set PIP_INDEX_URL to an index or mirror that you can reach.",
    )


def index_urls() -> list[str]:
    """Indexes to ask, in order: what uv or pip is configured for, else pip's own default, then the extra ones.

    Raises DownloadError when none is known.
    """
    config = _pip_config()
    environment = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
    main = next((os.environ[name] for name in environment if os.environ.get(name)), None) or config.get("index-url")
    extra = " ".join(os.environ.get(name, "") for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL"))
    candidates = [main or _default_index(), *extra.split(), *config.get("extra-index-url", "").split()]
    # uv allows NAME=URL; folders and file:// mirrors hold packages for installing, seldom these.
    urls = [re.sub(r"^[\w-]+=(?=https?://)", "", url or "").rstrip("/") for url in candidates]
    found = list(dict.fromkeys(url for url in urls if url.startswith(("http://", "https://"))))
    if not found:
        raise DownloadError("No Python package index is known.", "Set PIP_INDEX_URL to the one that you install from.")
    return found


def _list_files(client: httpx.Client, index: str, package: str) -> list[IndexFile]:
    name = re.sub(r"[-_.]+", "-", package).lower()
    response = client.get(f"{index}/{name}/", headers={"Accept": _ACCEPT})
    response.raise_for_status()
    base = response.url
    if response.headers.get("Content-Type", "").split(";")[0].strip().endswith("json"):
        return list(_read_json(response.text, base))
    page = _Page()
    page.feed(response.text)
    return list(_read_links(page.links, base))


def _read_json(text: str, base: httpx.URL) -> Iterator[IndexFile]:
    """PEP 691."""
    for file in json.loads(text).get("files", []):
        yield IndexFile(file["filename"], str(base.join(file["url"])), file.get("hashes", {}).get("sha256"))


def _read_links(links: Iterable[str], base: httpx.URL) -> Iterator[IndexFile]:
    """PEP 503: `…/name.whl#sha256=…`."""
    for link in links:
        url = base.join(link)
        algorithm, _, digest = url.fragment.partition("=")
        filename = url.path.rsplit("/", 1)[-1]
        yield IndexFile(filename, str(url.copy_with(fragment=None)), digest if algorithm == "sha256" else None)


class _Page(HTMLParser):
    """Collects the links of an index page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.extend(value for name, value in attrs if name == "href" and value)


def _shown(index: str) -> str:
    return _CREDENTIALS.sub("", index)


def _with_credentials(url: str, index: str) -> str:
    """An index with a password wants it for its files too; another host must not see it."""
    file, source = httpx.URL(url), httpx.URL(index)
    if source.userinfo and not file.userinfo and (file.host, file.port) == (source.host, source.port):
        file = file.copy_with(username=source.username, password=source.password)
    return str(file)


def _pip_config() -> dict[str, str]:
    """Options of pip's configuration files; a later file and a later section win, as in pip."""
    options: dict[str, str] = {}
    for file in _pip_config_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip itself reports a broken file
        for section in ("global", "install", "download"):
            if parser.has_section(section):
                options.update(parser.items(section))
    return options


def _pip_config_files() -> list[Path]:
    """Global, user, environment: the order in which pip reads them. PIP_CONFIG_FILE comes last."""
    name = "pip.ini" if os.name == "nt" else "pip.conf"
    shared = platformdirs.site_config_dir("pip", appauthor=False, multipath=True).split(os.pathsep)
    files = [Path(folder) / name for folder in shared]
    files += [] if os.name == "nt" else [Path("/etc") / name]
    files += [Path.home() / ("pip" if os.name == "nt" else ".pip") / name]
    files += [platformdirs.user_config_path("pip", appauthor=False, roaming=True) / name]
    # On macOS pip also reads the XDG place.
    files += [Path.home() / ".config" / "pip" / name]
    files += [Path(sys.prefix) / name]
    named = os.environ.get("PIP_CONFIG_FILE")
    return [] if named == os.devnull else [*files, *([Path(named)] if named else [])]


def _default_index() -> str | None:
    """What pip asks when nothing is configured: of the installed pip, else of the one that Python carries."""
    for path in ("", *_bundled_pips()):
        # Another process, because a pip from a wheel should not stay among this one's modules.
        code = f"import sys; sys.path.insert(0, {path!r}) if {path!r} else None; {_SHOW_DEFAULT}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603  # our own text
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def _bundled_pips() -> Iterator[str]:
    """pip's wheel inside ensurepip, or where the distribution of Python keeps its wheels."""
    import importlib.util

    spec = importlib.util.find_spec("ensurepip")
    folders = [Path(spec.origin).parent / "_bundled"] if spec and spec.origin else []
    kept = sysconfig.get_config_var("WHEEL_PKG_DIR")
    folders += [Path(kept)] if kept else []
    for folder in folders:
        yield from (str(wheel) for wheel in sorted(folder.glob("pip-*.whl")))
