"""What imports what: layers, light modules, and a core that knows no plugin by name."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import calpaca
from calpaca.plugins.catalogue import known_plugins

ROOT = Path(__file__).parents[1]
PACKAGE = Path(calpaca.__file__).parent

TORCH = {"torch", "transformers", "peft", "sentence_transformers", "accelerate"}


def modules() -> list[str]:
    """All modules of calpaca but the program's start, which runs when it is imported."""
    found = pkgutil.walk_packages(calpaca.__path__, "calpaca.")
    return [module.name for module in found if module.name != "calpaca.__main__"]


def test_torch_and_its_libraries_are_imported_where_they_are_used() -> None:
    """`pip install calpaca` brings no torch, so no module but the engines' own may need it to be imported."""
    light = [name for name in modules() if not name.startswith("calpaca.core.engines.")]
    code = f"""
import importlib, sys
needing = []
for name in {light}:
    importlib.import_module(name)
    found = {TORCH} & set(sys.modules)
    if found:
        needing.append((name, found))
        break
print(needing)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_import_contracts_hold() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("plugin", known_plugins(), ids=lambda plugin: plugin.name)
def test_the_core_knows_no_plugin_by_name(plugin) -> None:
    names = {plugin.name, plugin.entry_point, plugin.distribution, *plugin.apps}
    word = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    naming = [path for path in PACKAGE.rglob("*.py") if word.search(path.read_text(encoding="utf-8"))]
    assert naming == []


def test_no_plugin_imports_another() -> None:
    packages = {plugin.entry_point for plugin in known_plugins()}
    for path in (ROOT / "plugins").glob("*/calpaca_*/**/*.py"):
        own = path.relative_to(ROOT / "plugins").parts[1]
        imported = set(
            re.findall(r"^\s*(?:from|import)\s+(calpaca_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        )
        assert imported & packages <= {own}, path
