"""Distributions: the catalogue of plugins, the pins, and what is inside the wheels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from calpaca import __version__
from calpaca.plugins import catalogue
from calpaca.plugins.catalogue import known_plugins, plugin_offering, plugin_with_command

ROOT = Path(__file__).parents[1]
CORE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def plugin_projects() -> list[Path]:
    return sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


def test_the_catalogue_agrees_with_every_plugins_project_file() -> None:
    projects = {}
    for folder in plugin_projects():
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for name, module in project["entry-points"]["calpaca"].items():
            projects[name] = (project["name"], project["description"], module)
    assert projects == {
        plugin.name: (plugin.distribution, plugin.summary, plugin.entry_point) for plugin in known_plugins()
    }


@pytest.mark.parametrize("plugin", known_plugins(), ids=lambda plugin: plugin.name)
def test_the_catalogue_lists_the_apps_that_the_plugin_registers(plugin) -> None:
    offered = [app.name for app in getattr(import_module(plugin.entry_point), "register_apps", list)()]
    assert sorted(plugin.apps) == sorted(offered)
    for app in plugin.apps:
        assert plugin_offering(app) == plugin


def test_the_catalogue_lists_the_commands_that_the_plugins_add() -> None:
    for folder in plugin_projects():
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for command in project["entry-points"].get("calpaca.commands", {}):
            plugin = plugin_with_command(command)
            assert plugin is not None
            assert plugin.distribution == project["name"]
    assert plugin_with_command("nothing") is None


def test_an_app_that_no_first_party_plugin_brings_is_not_in_the_catalogue() -> None:
    assert plugin_offering("nothing") is None


def test_plugins_accept_this_version_of_calpaca() -> None:
    for folder in plugin_projects():
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needs = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
        assert needs["calpaca"].specifier.contains(__version__)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pinned}


def test_torch_is_pinned_first() -> None:
    assert next(iter(pins())) == "torch"


def test_every_dependency_that_setup_installs_has_a_pin_that_suits_it() -> None:
    extras = CORE["project"]["optional-dependencies"]
    wanted = [
        *CORE["project"]["dependencies"], *extras["torch"], *extras["chroma"], *CORE["dependency-groups"]["dev"]
    ]  # fmt: skip
    for requirement in map(Requirement, wanted):
        version = pins().get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(version), f"{requirement} is not met by {version}"


def test_the_core_depends_on_no_heavy_or_sunset_library() -> None:
    names = {canonicalize_name(Requirement(each).name) for each in CORE["project"]["dependencies"]}
    assert not names & {"torch", "transformers", "langchain", "langchain-community", "langchain-classic", "chromadb"}


def test_the_catalogue_is_found_in_a_checkout() -> None:
    assert catalogue.catalogue_file().is_file()


# In environments of their own ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """The wheels of the core and every plugin, built without a network."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in [ROOT, *plugin_projects()]:
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(project)]
        subprocess.run(command, check=True, capture_output=True)
    return folder


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)

    def pip(self, *arguments: str) -> None:
        command = [str(self.folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("CALPACA", "PYTHON"))}
        home = {name: str(self.home / name) for name in ("CALPACA_CACHE", "CALPACA_DATA", "CALPACA_CONFIG")}
        command = [str(self.folder / "venv/bin/calpaca"), *arguments]
        return subprocess.run(
            command, cwd=self.folder, env={**variables, **home}, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory) -> Environment:
    """The core alone, as `pip install calpaca` gives it."""
    fresh = Environment(tmp_path_factory.mktemp("environment"))
    fresh.pip("-c", str(ROOT / "constraints.txt"), str(next(wheels.glob("calpaca-*.whl"))))
    return fresh


@pytest.mark.slow
def test_the_core_wheel_carries_the_catalogue_and_its_types(wheels) -> None:
    names = zipfile.ZipFile(next(wheels.glob("calpaca-*.whl"))).namelist()
    assert "calpaca/entry_points.toml" in names
    assert "calpaca/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "plugins/", "docs/"))]


@pytest.mark.slow
def test_the_core_alone_is_light_and_says_what_to_install(environment) -> None:
    site = environment.folder / "venv/lib"
    assert not list(site.glob("python*/site-packages/torch"))
    assert environment.run("--help").returncode == 0
    assert environment.run("models", "list").returncode == 0
    assert environment.run("plugins", "--check").returncode == 0
    for plugin in known_plugins():
        for arguments in (*(("run", app) for app in plugin.apps), *((command,) for command in plugin.commands)):
            missing = environment.run(*arguments)
            assert missing.returncode == 2
            assert f"pip install {plugin.distribution}" in missing.stderr


@pytest.mark.slow
def test_each_plugins_wheel_works_alone_and_names_the_extra_it_needs(environment, wheels) -> None:
    for plugin in known_plugins():
        (wheel,) = wheels.glob(f"{plugin.distribution.replace('-', '_')}-*.whl")
        environment.pip("--no-deps", str(wheel))
        rows = {row["name"]: row for row in json.loads(environment.run("plugins", "--json").stdout)}
        assert rows[plugin.name]["state"] == "ok"
        listed = environment.run("run").stdout
        for app in plugin.apps:
            assert app in listed
            assert environment.run("run", app, "--help").returncode == 0
        for command in plugin.commands:
            assert environment.run(command, "--help").returncode == 0


@pytest.mark.slow
def test_without_torch_an_app_says_which_extra_to_install(environment, wheels, tmp_path) -> None:
    environment.pip("--no-deps", str(next(wheels.glob("calpaca_retrieval_qa-*.whl"))))
    (tmp_path / "a.txt").write_text("Llamas live in the Andes.")
    result = environment.run("run", "retrieval_qa", "--file", str(tmp_path / "a.txt"), "--question", "Where?")
    assert result.returncode == 2
    assert "pip install 'calpaca[torch]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_hostile_distributions_beside_a_good_one_are_named(environment, tmp_path) -> None:
    sources = {
        "broken": "import module_that_is_not_there",
        "leaving": "raise SystemExit(3)",
        "wrong": "from calpaca import hookimpl\n@hookimpl\ndef register_apps(surprise): return []",
        "toonew": "calpaca_api = '>=9'",
    }
    for name, source in sources.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"hostile_{name}.py").write_text(source)
        (folder / "pyproject.toml").write_text(
            f'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            f'[project]\nname = "hostile-{name}"\nversion = "6.6"\n'
            f'[project.entry-points.calpaca]\n{name} = "hostile_{name}"\n'
            f'[tool.hatch.build.targets.wheel]\ninclude = ["hostile_{name}.py"]\n'
        )
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    environment.pip("--no-deps", *map(str, tmp_path.glob("hostile_*.whl")))
    result = environment.run("plugins", "--json")
    assert result.returncode == 0
    states = {row["name"]: row["state"] for row in json.loads(result.stdout)}
    assert states["builtin"] == "ok"
    assert {states[name] for name in ("broken", "leaving", "wrong")} == {"broken"}
    assert states["toonew"] == "incompatible"
    for name in sources:
        assert f"hostile-{name} 6.6" in result.stderr
    assert environment.run("models", "list").returncode == 0
    assert environment.run("plugins", "--check").returncode == 4
