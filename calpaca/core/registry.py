"""Registries of named components (engines, sources, loaders, stores, apps) that are imported when first used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from calpaca.core.errors import MissingExtraError, PluginError, UsageError, unknown_name


@dataclass(frozen=True)
class Component:
    """A named part that a plugin offers: an import path instead of the thing itself, so that listing costs nothing.

    `target` is `module:attribute`; `extra` names the optional dependency group of calpaca that `target` needs, and
    `packages` the import packages of it that tell whether it is installed.
    """

    name: str
    summary: str
    target: str
    extra: str | None = None
    packages: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import and return the target.

        Raises MissingExtraError when a package of its extra is not installed, PluginError when the path is wrong.
        """
        return load_target(self.target, feature=f"'{self.name}'", extra=self.extra)


def load_target(target: str, *, feature: str, extra: str | None = None) -> Any:
    """Import `module:attribute`."""
    module_name, _, attribute = target.partition(":")
    try:
        module = import_module(module_name)
        return getattr(module, attribute)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if extra is not None and missing.partition(".")[0] != module_name.partition(".")[0]:
            raise MissingExtraError(feature, extra, missing) from error
        raise PluginError(
            f"{feature} points to {target}, but the module '{missing}' is missing.",
            "Reinstall the distribution that offers it; `calpaca plugins` names it.",
        ) from error
    except AttributeError as error:
        raise PluginError(f"{feature} points to {target}, which does not exist.", f"Found: {error}.") from error


C = TypeVar("C", bound=Component)


class Registry(Generic[C]):
    """Components of one kind by name. Two owners of one name are an error that names both."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._components: dict[str, C] = {}
        self._owners: dict[str, str] = {}

    def add(self, component: C, owner: str) -> None:
        """Add a component offered by `owner` (a plugin's name). Raises PluginError when the name is taken."""
        if component.name in self._components:
            raise PluginError(
                f"Plugin {owner} offers the {self.kind} '{component.name}', "
                f"which plugin {self._owners[component.name]} offers already.",
                "Uninstall one of the two, or name the plugins to load in CALPACA_PLUGINS.",
            )
        self._components[component.name] = component
        self._owners[component.name] = owner

    def get(self, name: str) -> C:
        """The component called `name`. Raises UsageError with the nearest match when there is none."""
        try:
            return self._components[name]
        except KeyError:
            raise UsageError(*unknown_name(self.kind, name, self._components)) from None

    def owner(self, name: str) -> str:
        """The plugin that offers `name`."""
        return self._owners[name]

    def withdraw(self, owner: str) -> None:
        """Take out everything that `owner` offers."""
        for name in [name for name, offered_by in self._owners.items() if offered_by == owner]:
            del self._components[name], self._owners[name]

    def names(self) -> list[str]:
        return sorted(self._components)

    def __iter__(self) -> Iterator[C]:
        return iter(self._components.values())

    def __contains__(self, name: str) -> bool:
        return name in self._components
