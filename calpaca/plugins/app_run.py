"""A run of an app as it is asked for from another process or screen: by name, with plain values."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from calpaca.core.events import Event
from calpaca.plugins.app import Turn
from calpaca.plugins.instances import Instance, find_instance
from calpaca.plugins.options import SHARED, read_options

if TYPE_CHECKING:
    from pydantic import BaseModel

    from calpaca.core.runtime import Runtime
    from calpaca.plugins.chat_setup import ChatSetup


@dataclass(frozen=True)
class AppRun:
    """`name` is that of an instance, `options` go over its presets, `history` are the turns before `input`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    input: str = ""
    history: tuple[Turn, ...] = ()


class RunningApp(Protocol):
    """An app at work. Iterated, it says what it does; it ends by itself some time after `cancel`."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> None: ...


def app_events(run: AppRun, runtime: Runtime) -> Generator[Event]:
    """Build the app and pass on what it reports. Closing the generator stops it.

    Raises UsageError for a name or an option that there is not, and what the app raises.
    """
    instance = find_instance(run.name, runtime)
    app, options = instance.app, read_run(instance, run)
    runner = app.build(options, runtime)
    if not hasattr(runner, "stream"):  # a job, or work on an app's answers
        yield from runner.events()
        return
    history = {"history": run.history} if app.history and run.history else {}
    with closing(runner.stream(run.input, **history)) as events:
        yield from events


def read_run(instance: Instance, run: AppRun) -> BaseModel:
    """The options of a run, checked. Raises UsageError."""
    return read_options(instance.app.load_options(), {**instance.presets, **run.options}, instance.name)


def shared_values(setup: ChatSetup, model: type[BaseModel]) -> dict[str, Any]:
    """The model and sampling options of a set-up, for an app whose options share them: it runs the chat's model."""
    known = {name for owner in SHARED if issubclass(model, owner) for name in owner.model_fields}
    return {name: value for name, value in setup.given().items() if name in known}
