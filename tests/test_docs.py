"""The documentation: complete, fresh, and its examples run."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from calpaca.cli.main import COMMANDS, main, program
from calpaca.core.settings import SamplingSettings, Settings
from calpaca.plugins import hookspecs, wiring
from calpaca.plugins.options import ModelOptions, SamplingOptions, flag_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of the README."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs/generate.py"), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_hook_is_documented() -> None:
    hooks = [name for name, hook in inspect.getmembers(hookspecs, inspect.isfunction) if hasattr(hook, "calpaca_spec")]
    assert len(hooks) >= 5
    for name in hooks:
        assert f"## {name}\n" in page("hooks.md")
        assert inspect.getdoc(getattr(hookspecs, name))


def test_every_hook_is_used_by_a_plugin_of_this_repository() -> None:
    used = {name for record in wiring.runtime().plugins.records for name in record.hooks}
    assert {name for name, hook in vars(hookspecs).items() if hasattr(hook, "calpaca_spec")} <= used


def test_every_setting_is_documented_with_a_sentence() -> None:
    for prefix, model in (("", Settings), ("sampling.", SamplingSettings)):
        for name, info in model.model_fields.items():
            assert info.description, name
            assert f"`{prefix}{name}" in page("settings.md") or name == "sampling"


def test_every_command_is_documented() -> None:
    context = click.Context(program)
    for name in COMMANDS:
        assert f"## calpaca {name}\n" in page("cli.md")
        for nested in getattr(program.get_command(context, name), "commands", {}):
            assert f"## calpaca {name} {nested}\n" in page("cli.md")


def test_every_shared_flag_and_exit_code_is_documented() -> None:
    for model in (ModelOptions, SamplingOptions):
        for name in model.model_fields:
            assert f"--{flag_name(model, name)}" in page("cli.md")
    for code in (0, 1, 2, 3, 4, 130):
        assert f"| {code} |" in page("cli.md")


def test_links_lead_somewhere() -> None:
    for source in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", source.read_text(encoding="utf-8")):
            assert (source.parent / target).exists(), (source.name, target)


def test_the_tree_of_the_readme_exists() -> None:
    tree = README[README.index("## The tree") :]
    named = re.findall(r"^    ((?:calpaca|plugins)/[\w/]+/)", tree, re.MULTILINE)
    assert len(named) >= 5
    for path in named:
        assert (ROOT / path).is_dir(), path


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^    make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert {"demo", "test", "check"} <= named
    for target in named:
        assert f"\n{target}: " in makefile


def test_the_example_settings_are_valid(tmp_path, monkeypatch) -> None:
    from calpaca.core.settings import read_settings

    monkeypatch.chdir(tmp_path)
    examples = [*re.findall(r"^```toml\n(.*?)^```", page("settings.md"), re.MULTILINE | re.DOTALL), blocks("toml")[0]]
    for example in examples:
        (tmp_path / "calpaca.toml").write_text(example, encoding="utf-8")
        assert read_settings().models["alpaca"].chat_template == "alpaca"


def test_the_plugin_of_the_readme_runs(site, tmp_path, monkeypatch, capsys, smollm2_gguf) -> None:
    source = next(block for block in blocks("python") if "register_apps" in block)
    project = tomllib.loads(next(block for block in blocks("toml") if "entry-points" in block))["project"]
    (site / "calpaca_haiku.py").write_text(source, encoding="utf-8")
    info = site / "calpaca_haiku-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"]["calpaca"].items()]
    (info / "entry_points.txt").write_text("[calpaca]\n" + "\n".join(lines) + "\n")
    monkeypatch.setattr(wiring, "_shared", None)
    monkeypatch.chdir(tmp_path)
    model = ["--model", "smollm2-135m-instruct", "--max-new-tokens", "8"]
    try:
        assert main(["run", "haiku", "--topic", "rain", *model]) == 0
    finally:
        wiring.runtime().close()
    assert capsys.readouterr().out.strip()


def test_the_langchain_program_of_the_readme_runs(tmp_path, monkeypatch, capsys) -> None:
    source = next(block for block in blocks("python") if "ChatCalpaca" in block)
    monkeypatch.setattr(wiring, "_shared", None)
    try:
        exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    finally:
        wiring.runtime().close()
    assert "Paris" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plugin_of_the_readme_is_a_whole_distribution(tmp_path) -> None:
    (tmp_path / "calpaca_haiku.py").write_text(next(block for block in blocks("python") if "register_apps" in block))
    (tmp_path / "pyproject.toml").write_text(next(block for block in blocks("toml") if "entry-points" in block))
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert list(tmp_path.glob("calpaca_haiku-0.1.0-*.whl"))
