"""Download one file: resumed where it stopped, verified by sha256, there whole or not at all."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from tqdm import tqdm

from calpaca.core.disk import check_space, disk_errors, megabytes
from calpaca.core.errors import DownloadError
from calpaca.core.lock import exclusive

_CHUNK = 1 << 20
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_ATTEMPTS = 3  # a connection that breaks is taken up again this often before the person has to


@dataclass(frozen=True)
class _Wanted:
    """What is fetched: `size` in bytes where it is known, `name` as a person knows it."""

    url: str
    part: Path
    sha256: str
    size: int | None
    name: str


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    size: int | None = None,
    name: str | None = None,
    client: httpx.Client | None = None,
) -> Path:
    """Fetch `url` into `target` and return it; a file that is there already is taken as it is.

    What arrived before an interruption stays in `target` + `.part` and is continued. Raises DownloadError when the
    server cannot be reached or does not have the file, the disk is full, or the sha256 differs.
    """
    wanted = _Wanted(url, target.with_name(f"{target.name}.part"), sha256, size, name or target.name)
    with exclusive(target):
        if target.is_file():
            return target
        check_space(target.parent, (size or 0) - _length(wanted.part), wanted.name)
        with disk_errors(target.parent, wanted.name, size or 0):
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(wanted, client)
            _verify(wanted)
            wanted.part.replace(target)
    return target


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _fetch(wanted: _Wanted, client: httpx.Client | None) -> None:
    """Fill the part file, taking a broken connection up again."""
    if wanted.size is not None and _length(wanted.part) > wanted.size:
        wanted.part.unlink()
    for attempt in range(1, _ATTEMPTS + 1):
        if wanted.size is not None and _length(wanted.part) == wanted.size:
            return
        before = _length(wanted.part)
        try:
            _receive(wanted, client)
            return
        except httpx.TransportError as error:
            if attempt == _ATTEMPTS or (_length(wanted.part) == before and isinstance(error, httpx.ConnectError)):
                raise _broken(error, wanted) from error
            time.sleep(0.2 * attempt)


def _receive(wanted: _Wanted, client: httpx.Client | None) -> None:
    """One request: append what the part file lacks, or start over where the server cannot continue."""
    start = _length(wanted.part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    own = client or httpx.Client(follow_redirects=True, timeout=_TIMEOUT)
    try:
        with own.stream("GET", wanted.url, headers=headers) as response:
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing is missing, or the digest will tell
            _check_status(response, wanted)
            continued = response.status_code == httpx.codes.PARTIAL_CONTENT and _continues(response, start)
            _write(response, wanted, start if continued else 0)
    finally:
        if client is None:
            own.close()


def _continues(response: httpx.Response, start: int) -> bool:
    answered: str = response.headers.get("Content-Range", f"bytes {start}-")
    return answered.startswith(f"bytes {start}-")


def _check_status(response: httpx.Response, wanted: _Wanted) -> None:
    if response.is_success:
        return
    raise DownloadError(
        f"{_host(wanted.url)} answered {response.status_code} {response.reason_phrase} for {wanted.name}.",
        "Try again later, or check the index or mirror that is configured.",
    )


def _write(response: httpx.Response, wanted: _Wanted, start: int) -> None:
    announced = int(response.headers.get("Content-Length", 0))
    bar = tqdm(
        total=wanted.size or (start + announced) or None,
        initial=start,
        desc=wanted.name,
        unit="B",
        unit_scale=True,
        disable=None,  # no bar where stderr is no terminal
        leave=False,
    )
    with bar, wanted.part.open("r+b" if start else "wb") as file:
        file.seek(start)
        for chunk in response.iter_raw(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))


def _verify(wanted: _Wanted) -> None:
    with wanted.part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == wanted.sha256:
        return
    length = _length(wanted.part)
    wanted.part.unlink()
    expected = f" ({length:,} of {wanted.size:,} bytes)" if wanted.size not in {None, length} else ""
    raise DownloadError(
        f"{wanted.name} from {_host(wanted.url)} has sha256 {digest}{expected}, but {wanted.sha256} was expected; "
        "it was deleted.",
        "Try again; if it stays so, the server or a proxy on the way gives out another file.",
    )


def _broken(error: httpx.TransportError, wanted: _Wanted) -> DownloadError:
    kept = _length(wanted.part)
    resumed = f" {megabytes(kept)} are kept and will be continued." if kept else ""
    return DownloadError(
        f"{wanted.name} could not be fetched from {_host(wanted.url)}: {reason(error)}.{resumed}",
        "Check the connection and run the same command again.",
    )


def reason(error: httpx.TransportError) -> str:
    """What went wrong, in words; timeouts of httpx have no text of their own."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


def _host(url: str) -> str:
    """The server's name alone: a URL may carry a password."""
    return httpx.URL(url).host
