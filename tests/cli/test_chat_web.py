"""`calpaca chat --web`, asked as a browser asks it."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import asynccontextmanager
from functools import partial
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
    process.communicate(timeout=30)


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
async def test_a_browser_draws_the_chat(address, tmp_path):
    async with browser(tmp_path / "profile", address) as page:
        async with asyncio.timeout(60):
            while "-first-byte" not in (await page("Runtime.evaluate", expression="document.body.className")):
                await asyncio.sleep(0.1)
            await asyncio.sleep(3)
        picture = await page("Page.captureScreenshot", format="png")
    assert len(picture) > 10_000  # an empty page has 5 kB


@asynccontextmanager
async def browser(profile: Path, address: str):
    """A headless Chromium at an address; calls of its DevTools protocol, each answered with its result as text."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    quiet = {"stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.DEVNULL}
    process = await asyncio.create_subprocess_exec(*command, f"--user-data-dir={profile}", address, **quiet)
    try:
        async with aiohttp.ClientSession() as client, asyncio.timeout(120):
            while not (port := profile / "DevToolsActivePort").exists() or "\n" not in port.read_text("ascii"):
                await asyncio.sleep(0.1)
            async with client.get(f"http://127.0.0.1:{port.read_text('ascii').split()[0]}/json") as pages:
                (page,) = [each for each in await pages.json() if each["type"] == "page"]
            async with client.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield partial(call, socket)
    finally:
        process.terminate()
        await process.wait()


async def call(socket, method: str, **parameters) -> str:
    await socket.send_json({"id": 1, "method": method, "params": parameters})
    async for message in socket:
        if (answer := message.json()).get("id") == 1:
            return str(answer["result"])
    raise AssertionError("the browser is gone")
