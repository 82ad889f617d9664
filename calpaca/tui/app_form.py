"""The form of an app, drawn from its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Collapsible, Footer, Static

from calpaca.core.errors import UsageError
from calpaca.plugins.app_run import AppRun
from calpaca.plugins.instances import Instance
from calpaca.plugins.options import SHARED, owner_of, value_type
from calpaca.tui.option_field import OptionField

_SHOWN = {"embedding"}
"""Shared options that a form asks for: the chat has none of its own."""


class AppForm(ModalScreen[AppRun | None]):
    """Gives the run that was filled in, or None. `check` raises UsageError for one that cannot be."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Leave"),
        Binding("ctrl+s", "run", "Run", priority=True),
    ]

    def __init__(self, instance: Instance, values: Mapping[str, Any], check: Callable[[AppRun], object]) -> None:
        super().__init__()
        self._instance = instance
        self._check = check
        model = instance.app.load_options()
        known = {**instance.presets, **values}
        names = [name for name in model.model_fields if owner_of(model, name) not in SHARED or name in _SHOWN]
        fields = {name: OptionField(model, name, known.get(name)) for name in names}
        first = [name for name in names if _comes_first(instance, name)]
        self._first = [fields[name] for name in sorted(first, key=lambda name: name != instance.app.input)]
        self._more = [fields[name] for name in names if name not in first]

    def compose(self) -> ComposeResult:
        with Vertical(classes="window"):
            with VerticalScroll():
                yield Static(self._instance.app.summary, markup=False, classes="name")
                yield from self._first
                if self._more:
                    with Collapsible(title=f"More options ({len(self._more)})"):
                        yield from self._more
                yield Static("Model and sampling are those of the chat: /model, /set.", classes="hint")
            yield Static("", markup=False, classes="fault")
            with Horizontal(classes="buttons"):
                yield Button("Run (Ctrl+S)", id="run", variant="primary")
                yield Button("Leave (Esc)", id="leave")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(".window").border_title = f"/{self._instance.name}"

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "run":
            self.action_run()
        else:
            self.dismiss(None)

    def on_input_submitted(self) -> None:
        self.action_run()

    def action_run(self) -> None:
        """Hand the run over; what is wrong with it is told here, and nothing that was filled in is lost."""
        run = self._filled()
        try:
            self._check(run)
        except UsageError as error:
            self.query_one(".fault", Static).update(f"{error.message} {error.hint}")
        else:
            self.dismiss(run)

    def _filled(self) -> AppRun:
        options: dict[str, Any] = {}
        for field in (*self._first, *self._more):
            options |= field.given
        text = options.pop(self._instance.app.input, "") if self._instance.app.input else ""
        return AppRun(self._instance.name, options, str(text))


def _comes_first(instance: Instance, name: str) -> bool:
    """The app's input, its documents, and what it cannot do without."""
    info = instance.app.load_options().model_fields[name]
    return (
        name in {instance.app.input, instance.app.documents}
        or info.is_required()
        or value_type(info.annotation) == (Path, True)
    )
