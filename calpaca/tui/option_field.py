"""One option of an app as a field of a form: a choice, a switch, lines or a line, by its type."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Input, Label, Select, Switch, TextArea

from calpaca.plugins.options import value_type


class OptionField(Vertical):
    """`value` is what it shows at first, in place of the option's default."""

    def __init__(self, model: type[BaseModel], name: str, value: Any = None) -> None:
        super().__init__(classes="field")
        self.option = name
        self._info = model.model_fields[name]
        self._kind, self._several = value_type(self._info.annotation)
        self._default = None if self._info.is_required() else self._info.get_default(call_default_factory=True)
        self._value = self._default if value is None else value

    def compose(self) -> ComposeResult:
        required = " (needed)" if self._info.is_required() else ""
        yield Label(f"{self.option.replace('_', ' ')}{required}", markup=False, classes="name")
        if self._info.description:
            yield Label(self._info.description, markup=False, classes="hint")
        yield self._editor()

    def _editor(self) -> Widget:
        if self._kind is bool:
            return Switch(bool(self._value))
        if self._several:
            return TextArea("\n".join(map(str, self._value or ())), placeholder="One a line", tab_behavior="focus")
        if choices := _choices(self._kind):
            shown = _plain(self._value)
            given = {"value": shown} if shown in choices else {}
            return Select([(str(each), each) for each in choices], allow_blank=self._default is None, **given)
        kind: Literal["integer", "number", "text"] = "text"
        if self._kind in {int, float}:
            kind = "integer" if self._kind is int else "number"
        return Input("" if self._value is None else str(_plain(self._value)), type=kind)

    @property
    def given(self) -> dict[str, Any]:
        """The option by name, where something else than its default is written. Values are what JSON holds."""
        value = self._written()
        default = [str(each) for each in self._default or ()] if self._several else _plain(self._default)
        return {} if value in (None, default) else {self.option: value}

    def _written(self) -> Any:
        editor = self.query_one("Switch, TextArea, Select, Input")
        match editor:
            case Switch():
                return editor.value
            case TextArea():
                return [line.strip() for line in editor.text.splitlines() if line.strip()]
            case Select():
                return None if editor.is_blank() else editor.value
            case Input():
                return _read(editor.value.strip(), self._kind)
        raise TypeError(editor)


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(each.value for each in kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _read(text: str, kind: Any) -> Any:
    """A number where one is wanted and written; what is no number is refused with the other options."""
    if not text:
        return None
    try:
        return kind(text) if kind in {int, float} else text
    except ValueError:
        return text
