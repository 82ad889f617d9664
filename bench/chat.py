"""How quick the chat is: keystroke to screen, search, start, and what the screen costs an answer.

Everything runs without weights, on the test kit's engine at 100 tokens a second; times are medians, in milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from textual.events import Key
from textual.pilot import Pilot

from calpaca.core.conversation import Conversation
from calpaca.core.events import Token
from calpaca.core.model import Model
from calpaca.core.sessions import Sessions
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.app_run import AppRun, RunningApp
from calpaca.plugins.chat_setup import ChatSetup
from calpaca.testing import FakeRuntime, fake_runtime
from calpaca.tui.app import ChatApp

WORDS = 300
DELAY = 0.01
SETUP = ChatSetup(max_new_tokens=30_000)
START = """
import threading, time
begun = time.perf_counter()
from pathlib import Path
import calpaca.tui
from calpaca.core.errors import ModelError
from calpaca.plugins.chat_setup import ChatSetup
from calpaca.plugins.hosting import ModelHost
from calpaca.plugins.wiring import runtime
from calpaca.tui.app import ChatApp
ready = threading.Event()
class Host(ModelHost):
    def open(self, spec):
        ready.wait()
        raise ModelError("Nothing is loaded here.", "")
class Timed(ChatApp):
    CSS_PATH = str(Path(calpaca.tui.__path__[0], "chat.tcss"))
    def on_ready(self):
        self.took = 1000 * (time.perf_counter() - begun)
        ready.set()
        self.exit()
own = runtime()
app = Timed(own, Host(attaches=False), own.sessions.new({}), ChatSetup())
app.run(headless=True)
print(app.took)
"""


class Host:
    """Gives the runtime's model."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    def open(self, _spec: ModelSpec) -> Model:
        return self._runtime.fake

    def run(self, model: Model, run: AppRun) -> RunningApp:
        raise NotImplementedError(f"{run.name} on {model.name}")

    def memory(self, _model: Model) -> int | None:
        return None


def chat(answers: list[str]) -> ChatApp:
    runtime = fake_runtime(answers, delay=DELAY, settings=Settings())
    return ChatApp(runtime, Host(runtime), runtime.sessions.new({}), SETUP)


async def keystrokes() -> float:
    """From a key to the screen that shows it, while an answer is written."""
    app, times = chat(["word " * WORDS]), []
    async with app.run_test(size=(120, 40)) as pilot:
        await asked(pilot)
        for letter in "abcdefghijklmnopqrstuvwxyz":
            begun = time.perf_counter()
            app.composer.post_message(Key(letter, letter))
            while not app.composer.text.endswith(letter):
                await asyncio.sleep(0)
            app.screen._compositor.render_update(full=True)
            times.append(1000 * (time.perf_counter() - begun))
        await pilot.press("escape")
    return statistics.median(times)


async def asked(pilot: Pilot[None]) -> None:
    """Send a question; wait for the first word of its answer."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    while app.slot.loaded is None:
        await asyncio.sleep(0.01)
    app.composer.text = "go on"
    await pilot.press("enter")
    while not app.transcript.is_growing:
        await asyncio.sleep(0.005)


async def on_screen() -> float:
    """Seconds from the first word of an answer to its end, in the chat."""
    app = chat(["word " * WORDS])
    async with app.run_test(size=(120, 40)) as pilot:
        await asked(pilot)
        begun = time.perf_counter()
        while app.is_answering:
            await asyncio.sleep(0.005)
        return time.perf_counter() - begun


def alone() -> float:
    """The same without a screen."""
    runtime = fake_runtime(["word " * WORDS], delay=DELAY, settings=Settings())
    session = runtime.sessions.new({})
    session.add("user", "go on")
    begun = 0.0
    for event in Conversation(session, runtime.fake, SETUP.sampling(runtime.settings)).answer():
        if isinstance(event, Token) and not begun:
            begun = time.perf_counter()
    return time.perf_counter() - begun


def search(folder: Path) -> float:
    """A word in 10,000 messages."""
    sessions = Sessions(folder / "many.sqlite")
    for number in range(100):
        session = sessions.new({}, f"session {number}")
        session.extend([("user", f"question {number} {place} about llamas 羊驼", {}) for place in range(100)])
    times = []
    for word in ("llamas", "羊驼", "question 57", "nothing", "lla") * 3:
        begun = time.perf_counter()
        sessions.search(word)
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def start() -> float:
    """From the first import to a prompt that can be written into; the interpreter itself is not counted."""
    runs = [subprocess.run([sys.executable, "-c", START], check=True, capture_output=True, text=True) for _ in range(5)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def main() -> None:
    with TemporaryDirectory() as folder:
        os.environ["CALPACA_DATA"] = folder
        print(f"keystroke to screen     {asyncio.run(keystrokes()):6.1f} ms")
        print(f"search, 10,000 messages {search(Path(folder)):6.1f} ms")
        print(f"start to prompt         {start():6.0f} ms")
        pairs = [(asyncio.run(on_screen()), alone()) for _ in range(3)]  # interleaved
        cost = statistics.median(screen / plain for screen, plain in pairs) - 1
        print(f"screen's cost           {100 * cost:6.1f} %")


if __name__ == "__main__":
    main()
