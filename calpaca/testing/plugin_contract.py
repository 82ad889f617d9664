"""What every plugin must do, as a test class: subclass it and name the plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from calpaca.cli.main import COMMANDS
from calpaca.cli.plugins.probe import probe_plugin
from calpaca.plugins.commands import GROUP, plugin_commands
from calpaca.plugins.discovery import Candidate, PluginRecord, installed_plugins, load_plugins

HEAVY = ("faiss", "fastapi", "langchain_core", "numpy", "sklearn", "torch", "transformers")
"""What no plugin's module may import: every start of `calpaca run` would wait for it."""


class PluginContract:
    """The plugin is installed, loads fast and alone, and all that it offers is there."""

    plugin: str
    """The name of the entry point."""

    @pytest.fixture
    def candidate(self) -> Candidate:
        found = [each for each in installed_plugins() if each.name == self.plugin]
        assert found, f"no plugin '{self.plugin}' is installed: pip install -e ."
        assert len(found) == 1, f"several distributions bring '{self.plugin}': {[each.distribution for each in found]}"
        return found[0]

    @pytest.fixture
    def record(self, candidate: Candidate) -> PluginRecord:
        (record,) = load_plugins([candidate]).records
        return record

    def test_it_loads(self, record: PluginRecord) -> None:
        assert (record.state, record.error) == ("ok", "")

    def test_it_says_which_version_of_the_hooks_it_needs(self, candidate: Candidate) -> None:
        wanted = getattr(candidate.load(), "calpaca_api", "")
        assert wanted, 'calpaca_api is missing; such as calpaca_api = ">=1,<2"'

    def test_it_offers_something(self, record: PluginRecord) -> None:
        assert record.hooks or self._commands(record.distribution), "neither a hook nor a command"

    def test_its_module_imports_nothing_heavy(self) -> None:
        code = (
            "import json, sys; from calpaca.plugins.discovery import installed_plugins, load_plugins;"
            f"before = set(sys.modules); load_plugins([each for each in installed_plugins() if each.name == {self.plugin!r}]);"
            "print(json.dumps(sorted(set(sys.modules) - before)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
        imported = set(json.loads(done.stdout.splitlines()[-1]))
        assert imported.isdisjoint(HEAVY), f"{sorted(imported.intersection(HEAVY))} belong where they are used"

    def test_all_that_it_offers_can_be_imported(self, candidate: Candidate) -> None:
        record = probe_plugin(candidate, timeout=60)
        assert (record.state, record.error) == ("ok", "")

    def test_what_it_offers_is_described_in_a_sentence(self, record: PluginRecord) -> None:
        for components in record.offers.values():
            for component in components:
                assert component.summary.endswith("."), f"{component.name}: {component.summary!r}"
                assert "\n" not in component.summary

    def test_its_commands_have_names_of_their_own_and_describe_their_options(self, record: PluginRecord) -> None:
        for name in self._commands(record.distribution):
            command = plugin_commands(COMMANDS)[name]
            assert not command.clash, f"{command.clash} has the command '{name}' already"
            _describes_itself(command.load(), name)

    def test_it_is_documented(self, calpaca_program: Any) -> None:
        outcome = calpaca_program("plugins", "docs", self.plugin)
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith(f"# {self.plugin}\n")

    @staticmethod
    def _commands(distribution: str) -> list[str]:
        return [entry.name for entry in metadata.distribution(distribution).entry_points.select(group=GROUP)]


def _describes_itself(command: Any, path: str) -> None:
    assert command.help, f"calpaca {path} does not say what it does"
    undescribed = [
        option.name
        for option in command.params
        if option.param_type_name == "option" and not getattr(option, "help", "")
    ]
    assert not undescribed, f"calpaca {path} does not describe {undescribed}"
    for name in getattr(command, "commands", ()):
        _describes_itself(command.commands[name], f"{path} {name}")
