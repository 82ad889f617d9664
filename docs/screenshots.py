"""Draw the screens of `calpaca chat` as SVG: `make screenshots` writes those that docs/chat.md shows.

The model is the test kit's, which answers from a script, so that a screen looks the same on every machine.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from calpaca.core.model import Model
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.app_run import AppRun, RunningApp
from calpaca.plugins.chat_setup import ChatSetup
from calpaca.testing import FakeRuntime, fake_model, fake_runtime
from calpaca.tui.app import ChatApp
from calpaca.tui.app_form import AppForm
from calpaca.tui.comparison import ComparisonScreen

ROOT = Path(__file__).parents[1]
HANDBOOK = ROOT / "examples" / "handbook.md"
THEMES = ("textual-dark", "textual-light")
SIZES = ((80, 24), (120, 40))
ANSWER = """A **llama** is a domesticated camelid of the Andes.

| animal | weight |
| --- | --- |
| llama | 130 to 200 kg |
| alpaca | 48 to 84 kg |

```python
def herd(n: int) -> list[str]:
    return ["llama"] * n
```

1. It carries loads.
2. 羊驼住在安第斯山脉，毛很软。
"""
QUESTION = "What is a llama? Compare it with an alpaca, please, in a table, and add code."


class ScriptedHost:
    """Gives one scripted model under any name. No scene runs an app."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    def open(self, spec: ModelSpec) -> Model:
        if spec.model is None:
            return self._runtime.fake
        return fake_model(["The llama is a domesticated camelid of the high Andes, kept for its wool."])

    def run(self, model: Model, run: AppRun) -> RunningApp:
        raise NotImplementedError(f"{run.name} on {model.name}")

    def memory(self, _model: Model) -> int | None:
        return 410_000_000


async def _until(pilot: Pilot[None], holds: Callable[[], object]) -> None:
    for _ in range(1000):
        await pilot.pause(0.01)
        if holds():
            return
    raise TimeoutError("The screen did not come about.")


async def _write(pilot: Pilot[None], text: str) -> None:
    app = _chat(pilot)
    app.composer.write(text)
    await pilot.press("enter")
    await pilot.pause()


def _chat(pilot: Pilot[None]) -> ChatApp:
    assert isinstance(pilot.app, ChatApp)
    return pilot.app


async def empty(pilot: Pilot[None]) -> None:
    """The chat as it begins."""
    await _until(pilot, lambda: _chat(pilot).slot.loaded)


async def answer(pilot: Pilot[None]) -> None:
    """A question and its answer."""
    app = _chat(pilot)
    await _write(pilot, QUESTION)
    await _until(pilot, lambda: len(app.session.path()) == 2 and not app.is_answering)
    app.status.writing()
    app.status.answered({"usage": {"completion_tokens": 129}, "timings": {"first_token": 0.2, "total": 2.8}})
    app.status.ready()


async def completion(pilot: Pilot[None]) -> None:
    """The commands that a slash may become."""
    await pilot.press("/", "s")
    await _until(pilot, lambda: _shows(pilot, "#completion"))


def _shows(pilot: Pilot[None], selector: str) -> bool:
    """Whether a widget of the chat is displayed."""
    return bool(_chat(pilot).query_one(selector).display)


async def form(pilot: Pilot[None]) -> None:
    """The form of an app."""
    await _write(pilot, "/retrieval_qa When was the present dome opened?")
    await _until(pilot, lambda: isinstance(pilot.app.screen, AppForm) and pilot.app.screen.query(TextArea))
    pilot.app.screen.query(TextArea).first().text = "examples/handbook.md"


async def sources(pilot: Pilot[None]) -> None:
    """What an answer about a document rests on, in the document."""
    app = _chat(pilot)
    text = HANDBOOK.read_text("utf-8")
    line = next(number for number, each in enumerate(text.splitlines(), 1) if "dome" in each and "19" in each)
    quote = text.splitlines()[line - 1]
    cited = {"number": 1, "source": str(HANDBOOK), "quote": quote, "page": None, "start": line, "end": line}
    app.session.add(
        "user", "When was the present dome opened?", {"app": {"name": "retrieval_qa", "options": {}, "input": "x"}}
    )
    app.session.add("assistant", f"{quote} [1]", {"app": "retrieval_qa", "model": "fake", "citations": [cited]})
    await app.show_session()
    await pilot.press("ctrl+t")
    await _until(pilot, lambda: pilot.app.screen.query("#document") and _document(pilot).selected_text)


def _document(pilot: Pilot[None]) -> TextArea:
    return pilot.app.screen.query_one("#document", TextArea)


async def comparison(pilot: Pilot[None]) -> None:
    """Two set-ups side by side."""
    await _write(pilot, "/compare this | model=alpaca")
    await _until(pilot, lambda: isinstance(pilot.app.screen, ComparisonScreen))
    screen = pilot.app.screen
    assert isinstance(screen, ComparisonScreen)
    screen.query_one(Input).value = "What is a llama?"
    await pilot.press("enter")
    await _until(
        pilot, lambda: screen.is_done and all("tokens" in str(each.border_subtitle) for each in screen.columns)
    )
    for column in screen.columns:
        column.border_subtitle = "24 tokens · first after 0.2 s"


async def sessions(pilot: Pilot[None]) -> None:
    """The sessions, searched."""
    old = _chat(pilot).sessions.new({})
    old.add("user", "为什么要减少污染，保护环境？")
    old.add("assistant", "因为我们只有一个地球。")
    await pilot.press("ctrl+o")
    await _until(pilot, lambda: pilot.app.screen.query(Input))
    await pilot.press(*"环境")
    await pilot.pause(0.1)


async def help_screen(pilot: Pilot[None]) -> None:
    """Keys and commands."""
    await pilot.press("f1")
    await pilot.pause(0.2)


async def error(pilot: Pilot[None]) -> None:
    """What went wrong, and what to do next."""
    await _write(pilot, "/set temperature hot")
    await _until(pilot, lambda: len(pilot.app.screen_stack) > 1)


SCENES: dict[str, Callable[[Pilot[None]], Awaitable[None]]] = {
    "empty": empty, "answer": answer, "completion": completion, "form": form, "sources": sources,
    "comparison": comparison, "sessions": sessions, "help": help_screen, "error": error,
}  # fmt: skip


async def capture(scene: str, size: tuple[int, int], theme: str, folder: Path) -> str:
    """The SVG of a scene; `folder` is an empty one for its sessions."""
    os.environ["CALPACA_DATA"] = str(folder)
    runtime = fake_runtime([ANSWER], settings=Settings())
    app = ChatApp(runtime, ScriptedHost(runtime), runtime.sessions.new({}), ChatSetup(max_new_tokens=2000))
    app.animation_level = "none"
    app.theme = theme
    async with app.run_test(size=size) as pilot:
        app.composer.cursor_blink = False
        await _until(pilot, lambda: app.slot.loaded)
        await SCENES[scene](pilot)
        for blinking in (*app.screen.query(Input), *app.screen.query(TextArea)):
            blinking.cursor_blink = False
        await pilot.pause(0.2)
        return app.export_screenshot(title="calpaca chat", simplify=True)


def main() -> None:
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    for scene in ("answer", "form", "sources", "comparison"):
        with TemporaryDirectory() as folder:
            svg = asyncio.run(capture(scene, (100, 30), THEMES[0], Path(folder)))
        (images / f"chat-{scene}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
