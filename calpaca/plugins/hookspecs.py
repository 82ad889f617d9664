"""The hooks of calpaca: what a plugin can offer. Every hook returns a list of light descriptors.

A descriptor holds import paths, so a plugin module imports nothing heavy:

    from calpaca import App, hookimpl

    @hookimpl
    def register_apps():
        return [App("hello", "Greets.", "my_plugin.hello:build", options="my_plugin.hello:Options")]
"""

from __future__ import annotations

import pluggy

from calpaca.core.registry import Component
from calpaca.plugins.app import App

PROJECT = "calpaca"
API_VERSION = (1, 0)
"""Version of these hooks. A plugin may state what it needs: `calpaca_api = ">=1,<2"`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_apps() -> list[App]:  # type: ignore[empty-body]
    """Apps to run: `calpaca run NAME`."""


@hookspec
def register_engines() -> list[Component]:  # type: ignore[empty-body]
    """Engines. The target is called with (files, runtime) and returns an Engine."""


@hookspec
def register_sources() -> list[Component]:  # type: ignore[empty-body]
    """Places that weights come from, asked in order. The target is a `calpaca.core.sources.Source`."""


@hookspec
def register_loaders() -> list[Component]:  # type: ignore[empty-body]
    """Document loaders: `calpaca.documents.loaders.LoaderComponent`, with the file endings they read."""


@hookspec
def register_stores() -> list[Component]:  # type: ignore[empty-body]
    """Vector stores. The target is called with (folder, embedder) and returns a store."""
