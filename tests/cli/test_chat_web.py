"""`calpaca chat --web`, asked as a browser asks it."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("textual_serve")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(smollm2, tmp_path_factory) -> Iterator[str]:
    """Of a chat that is served on real weights; afterwards it is ended."""
    environment = {**os.environ, "CALPACA_DATA": str(tmp_path_factory.mktemp("data"))}
    command = [
        sys.executable,
        "-m",
        "calpaca",
        "chat",
        "--web",
        "--model",
        "smollm2-135m-instruct",
        "--max-new-tokens",
        "16",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )  # fmt: skip
    for line in process.stderr:
        if found := re.search(r"http://\S+token=\S+", line):
            break
    else:
        raise AssertionError("no address was told")
    yield found[0]
    process.terminate()
    process.stderr.read()
    process.wait(20)


def base(address: str) -> str:
    return address.partition("/?")[0]


async def test_without_the_token_from_another_page_or_under_another_name_nothing_is_served(address):
    token = address.partition("token=")[2]
    async with aiohttp.ClientSession() as visitor:
        for path, headers in (
            ("/", {}),
            ("/?token=wrong", {}),
            ("/static/js/textual.js", {}),
            (f"/ws?token={token}", {"Origin": "http://elsewhere.example"}),
            (f"/?token={token}", {"Host": "elsewhere.example"}),
        ):
            async with visitor.get(base(address) + path, headers=headers, allow_redirects=False) as answer:
                assert answer.status == 403, path


async def test_two_visitors_are_answered_by_one_engine(address):
    screens = await asyncio.gather(visit(address), visit(address))
    assert all("Paris" in screen for screen in screens)
    loaded = [command for command in commands() if "calpaca serve" in command and "--api-key-file" in command]
    assert len(loaded) == 1


async def visit(address: str) -> str:
    """Ask a question over the websocket, as the page's script does; what the screen was sent up to its answer."""
    jar = aiohttp.CookieJar(unsafe=True)  # the address is a number
    async with aiohttp.ClientSession(cookie_jar=jar) as visitor:
        async with visitor.get(address) as page:
            assert page.status == 200
            assert "token=" not in str(page.url)
            assert "googleapis" not in await page.text()
        async with visitor.ws_connect(base(address) + "/ws?width=100&height=30", origin=base(address)) as socket:
            shown = await read(socket, "Ask something")
            await socket.send_json(["stdin", "What is the capital of France?\r"])
            return shown + await read(socket, "Paris")


async def read(socket, wanted: str) -> str:
    """What is sent until it holds `wanted`, without the control sequences of a terminal."""
    sent = b""
    async with asyncio.timeout(120):
        async for message in socket:
            sent += message.data if isinstance(message.data, bytes) else b""
            plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode(errors="replace"))
            if wanted in plain:
                return plain
    raise AssertionError(f"'{wanted}' was not sent")


def commands() -> list[str]:
    """The command lines of all processes."""
    files = Path("/proc").glob("[0-9]*/cmdline")
    return [file.read_bytes().replace(b"\0", b" ").decode(errors="replace") for file in files if file.exists()]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_draws_the_chat(address, tmp_path):
    picture = tmp_path / "chat.png"
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1000,700", "--timeout=15000", "--virtual-time-budget=15000", f"--screenshot={picture}", address],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert picture.stat().st_size > 10_000  # an empty page has 3 to 5 kB
