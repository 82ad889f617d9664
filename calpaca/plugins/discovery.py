"""Finding and loading plugins, one by one: a broken one is kept and shown, and never stops another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from calpaca.core.errors import PluginError, nearest
from calpaca.core.registry import Component
from calpaca.plugins import hookspecs
from calpaca.plugins.app import App
from calpaca.plugins.patience import patience

BUILTIN = "builtin"

State = Literal["ok", "blocked", "broken", "incompatible"]


class IncompatiblePluginError(PluginError):
    """A plugin needs another version of the hooks."""


@dataclass(frozen=True)
class Candidate:
    """A plugin that is installed but not imported yet."""

    name: str
    distribution: str
    version: str
    load: Callable[[], Any]


@dataclass
class PluginRecord:
    """What is known about an installed plugin. `load_time` is in seconds, `error` empty unless the state says so."""

    name: str
    distribution: str
    version: str
    state: State = "ok"
    error: str = ""
    hint: str = ""
    load_time: float = 0.0
    hooks: list[str] = field(default_factory=list)
    offers: dict[str, list[Component]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"'{self.name}' ({self.distribution} {self.version})"

    def fail(self, error: BaseException) -> None:
        """Mark the plugin as broken or incompatible; it offers nothing then."""
        self.state = "incompatible" if isinstance(error, IncompatiblePluginError) else "broken"
        self.offers = {}
        if isinstance(error, PluginError):
            self.error, self.hint = error.message, error.hint
        else:
            self.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self.hint = f"Upgrade or uninstall {self.distribution}."


@dataclass(frozen=True)
class PluginSet:
    """All installed plugins, and the manager that holds the working ones."""

    manager: pluggy.PluginManager
    records: list[PluginRecord]

    def failed(self) -> list[PluginRecord]:
        return [record for record in self.records if record.state in {"broken", "incompatible"}]

    def refuse(self, record: PluginRecord, error: BaseException) -> None:
        """Take a plugin out again."""
        record.fail(error)
        if self.manager.has_plugin(record.name):
            self.manager.unregister(name=record.name)


def allowed_plugins() -> frozenset[str] | None:
    """Names in `CALPACA_PLUGINS`, separated by commas; None when it is not set. Empty means only the built-in one."""
    value = os.environ.get("CALPACA_PLUGINS")
    return None if value is None else frozenset(name.strip() for name in value.split(",") if name.strip())


def installed_plugins() -> list[Candidate]:
    """Every entry point of the group `calpaca`, sorted, the built-in plugin first."""
    seen: set[str] = set()
    found: list[Candidate] = []
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or "unknown"
        if canonicalize_name(name) in seen:
            continue  # an older copy further along the path, which imports would not reach either
        seen.add(canonicalize_name(name))
        for entry_point in distribution.entry_points.select(group=hookspecs.PROJECT):
            found.append(Candidate(entry_point.name, name, distribution.version, entry_point.load))
    return sorted(found, key=lambda candidate: (candidate.name != BUILTIN, candidate.name, candidate.distribution))


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows the hooks."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def load_plugins(candidates: Iterable[Candidate], allowed: frozenset[str] | None = None) -> PluginSet:
    """Import and register plugins, and ask each what it offers. Never raises for a plugin's fault."""
    plugins = PluginSet(new_manager(), [])
    for candidate in candidates:
        record = PluginRecord(candidate.name, candidate.distribution, candidate.version)
        start = time.perf_counter()
        try:
            refuse_second(record, plugins.records)
            if allowed is not None and candidate.name not in allowed | {BUILTIN}:
                record.state = "blocked"
            else:
                with patience(str(record)):
                    _load(candidate, record, plugins.manager)
        except (Exception, SystemExit) as error:
            plugins.refuse(record, error)
        record.load_time = time.perf_counter() - start
        plugins.records.append(record)
    return plugins


def refuse_second(record: PluginRecord, earlier: Iterable[PluginRecord]) -> None:
    """Raise PluginError when an earlier plugin of another distribution has the same name."""
    for other in earlier:
        if other.name == record.name:
            raise PluginError(
                f"The distributions {other.distribution} and {record.distribution} both bring a plugin '{record.name}'.",
                "Uninstall one of them.",
            )


def _load(candidate: Candidate, record: PluginRecord, manager: pluggy.PluginManager) -> None:
    plugin = candidate.load()
    _check_api(plugin)
    try:
        manager.register(plugin, name=candidate.name)
    except pluggy.PluginValidationError as error:
        raise PluginError(" ".join(str(error).split()), "The hooks' signatures are in docs/hooks.md.") from error
    record.hooks = _known_hooks(plugin, manager)
    record.offers = {hook: list(_offered(plugin, hook, manager)) for hook in record.hooks}


def _check_api(plugin: Any) -> None:
    """Raise IncompatiblePluginError when the plugin's `calpaca_api` leaves out this version of the hooks."""
    wanted = getattr(plugin, "calpaca_api", "")
    version = ".".join(map(str, hookspecs.API_VERSION))
    try:
        fits = version in SpecifierSet(wanted)
    except (InvalidSpecifier, TypeError, AttributeError) as error:
        raise PluginError(f"calpaca_api is {wanted!r}.", 'It must be like ">=1,<2".') from error
    if not fits:
        raise IncompatiblePluginError(
            f"It needs the plugin API {wanted}, and this calpaca has {version}.", "Upgrade calpaca or the plugin."
        )


def _known_hooks(plugin: Any, manager: pluggy.PluginManager) -> list[str]:
    """Names of the hooks that `plugin` implements. Raises PluginError for one that does not exist."""
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        optional = any(implementation.optionalhook for implementation in caller.get_hookimpls())
        if not caller.has_spec() and not optional:
            match = nearest(caller.name, _hook_names(manager))
            suggestion = f"Did you mean '{match}'? " if match else ""
            raise PluginError(
                f"There is no hook '{caller.name}'.", f"{suggestion}Known: {', '.join(_hook_names(manager))}."
            )
    return sorted(caller.name for caller in callers if caller.has_spec())


def _hook_names(manager: pluggy.PluginManager) -> list[str]:
    return sorted(name for name, caller in vars(manager.hook).items() if caller.has_spec())


def _offered(plugin: Any, hook: str, manager: pluggy.PluginManager) -> Iterator[Component]:
    """What one plugin's implementation of one hook returns, checked. A fault raises and concerns this plugin only."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    wanted: type[Component] = App if hook == "register_apps" else Component
    for returned in manager.subset_hook_caller(hook, remove_plugins=others)():
        if not isinstance(returned, list | tuple):
            raise PluginError(
                f"{hook} returned {type(returned).__name__}.", f"It must return a list of {wanted.__name__}."
            )
        for component in returned:
            if not isinstance(component, wanted):
                raise PluginError(f"{hook} returned {component!r}.", f"It must return a list of {wanted.__name__}.")
            yield component
