"""`calpaca plugins`: checked in processes of their own, written, frozen and restored, documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from calpaca.cli.plugins import freeze
from calpaca.cli.plugins.new import KINDS, write_plugin
from calpaca.core.errors import PluginError
from calpaca.core.settings import Settings
from calpaca.plugins import patience
from calpaca.plugins.wiring import build_runtime

HOSTILE = {
    "hangs": ("import time; time.sleep(600)", "not imported within 15 seconds"),
    "kills_itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "leaves_at_once": ("print('no', flush=True); import os; os._exit(7)", "ended with code 7. Its last words: no"),
    "import_error": ("import module_that_is_not_there", "module_that_is_not_there"),
    "raises": (
        "from calpaca import hookimpl\n@hookimpl\ndef register_apps(): raise RuntimeError('no')",
        "RuntimeError: no",
    ),
    "no_target": (
        "from calpaca import App, hookimpl\n@hookimpl\ndef register_apps():\n"
        "    return [App('lost', 'Is not there.', 'nowhere:build', options='nowhere:Options')]",
        "App 'lost'",
    ),
}


@pytest.mark.slow  # it waits for what hangs, longer than anything else may take on a busy machine
def test_check_names_what_hangs_crashes_clashes_or_is_not_there_and_finds_no_fault_with_the_rest(
    calpaca, make_plugin, app_source
) -> None:
    for name, (source, _) in HOSTILE.items():
        make_plugin(name, source)
    clashing = app_source("clash").replace("text: str | None = None", "text: str = ''\n    model: str = ''")
    make_plugin("with_a_flag_of_run", clashing)
    make_plugin("without_its_builder", app_source("lost").replace(':build"', ':biuld"'))
    make_plugin("first", app_source("shout"))
    make_plugin("second", app_source("shout"))
    result = calpaca("plugins", "--check", "--json", "--timeout", "15")
    rows = {row["name"]: row for row in result.json}
    errors = {
        **{name: error for name, (_, error) in HOSTILE.items()},
        "with_a_flag_of_run": "Options.model",
        "without_its_builder": "App 'lost'",
        "second": "plugin 'first' (calpaca-first 1.0) offers already",
    }
    for name, error in errors.items():
        assert (rows[name]["state"], rows[name]["distribution"]) == ("broken", f"calpaca-{name}")
        assert error in rows[name]["error"]
        assert rows[name]["hint"]
    assert {name for name, row in rows.items() if row["state"] != "ok"} == set(errors)
    assert rows["first"]["offers"] == {"register_apps": ["shout"]}
    assert result.code == 4
    assert all(name in result.err for name in errors)


def test_a_plugin_that_hangs_ends_after_a_while_and_the_program_goes_on(
    make_plugin, app_source, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(patience, "WORD_AFTER", 0.05)
    monkeypatch.setattr(patience, "END_AFTER", 0.3)
    monkeypatch.setattr(patience, "_timer_is_free", lambda: True)  # pytest's own timer stands
    make_plugin("hangs", "import time; time.sleep(600)")
    make_plugin("zgood", app_source("shout"))
    runtime = build_runtime(Settings())
    assert "shout" in runtime.apps
    (record,) = runtime.plugins.failed()
    assert record.error == "It was not loaded within 0.3 seconds."
    assert "Plugin 'hangs' (calpaca-hangs 1.0) is still loading." in caplog.text


def test_strict_plugins_makes_a_broken_plugin_an_error(calpaca, make_plugin, monkeypatch) -> None:
    make_plugin("broken", "import module_that_is_not_there")
    monkeypatch.setenv("CALPACA_STRICT_PLUGINS", "0")  # what the flag sets is undone after the test
    assert calpaca("run").code == 0
    result = calpaca("--strict-plugins", "run")
    assert (result.code, result.out) == (4, "")
    assert "Plugin 'broken' (calpaca-broken 1.0) is broken" in result.err
    monkeypatch.setenv("CALPACA_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="module_that_is_not_there"):
        build_runtime(Settings())


IN_AN_ENVIRONMENT = {
    "import_error": "import module_that_is_not_there",
    "leaves": "import sys; sys.exit('bye')",
    "wrong_signature": "from calpaca import hookimpl\n@hookimpl\ndef register_apps(surprise): return []",
    "unknown_hook": "from calpaca import hookimpl\n@hookimpl\ndef register_ap(): return []",
    "raises": "from calpaca import hookimpl\n@hookimpl\ndef register_apps(): raise RuntimeError('never again')",
    "too_new": "calpaca_api = '>=2'",
}
COMMANDS = ("run shout --text hello", "run", "plugins", "jobs list", "models list")
OF_NO_PLUGIN = ("--help", "sessions list", "indexes list", "settings", "chat --help", "generate --help")


@pytest.mark.slow
def test_every_command_works_beside_hostile_plugins_and_names_each(tmp_path, app_source) -> None:
    python = _environment(tmp_path / "env")
    (inner,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for name, source in {**IN_AN_ENVIRONMENT, "zgood": app_source("shout")}.items():
        (inner / f"plugin_{name}.py").write_text(source)
        info = inner / f"calpaca_{name}-6.6.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: calpaca-{name}\nVersion: 6.6\n")
        (info / "entry_points.txt").write_text(f"[calpaca]\n{name} = plugin_{name}\n")
    for command in (*COMMANDS, *OF_NO_PLUGIN):
        asked = [python, "-m", "calpaca", *command.split()]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        named = [f"Plugin '{name}' (calpaca-{name} 6.6) is " in done.stderr for name in IN_AN_ENVIRONMENT]
        assert all(named) or command in OF_NO_PLUGIN, command
        assert command != COMMANDS[0] or done.stdout == "HELLO\n"
    strict = subprocess.run(
        [python, "-m", "calpaca", "--strict-plugins", "run"], cwd=tmp_path, capture_output=True, check=False
    )
    assert strict.returncode == 4


# New ones ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_of_a_new_plugin_pass_in_an_environment_of_its_own(kind, tmp_path) -> None:
    folder = tmp_path / "plugin"
    write_plugin("sea_shell", kind, folder)
    python = _environment(tmp_path / "env")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", str(folder)], check=True
    )
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checked = subprocess.run(
        [python, "-m", "calpaca", "plugins", "--check"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    assert "calpaca-sea-shell" in checked.stdout


def _environment(folder: Path) -> str:
    """An environment beside this one, which sees what is installed here and can have more; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (inner,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (inner / "here.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in here))
    return str(folder / "bin" / "python")


def test_a_new_plugin_is_written_where_it_is_asked_for(calpaca, tmp_path) -> None:
    result = calpaca("plugins", "new", "sea_shell")
    assert (result.code, result.out) == (0, "calpaca-sea-shell\n")
    folder = tmp_path / "calpaca-sea-shell"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        ".github/workflows/test.yml", ".gitignore", "README.md", "calpaca_sea_shell/__init__.py",
        "calpaca_sea_shell/app.py", "calpaca_sea_shell/command.py", "calpaca_sea_shell/options.py", "pyproject.toml",
        "tests/test_sea_shell.py",
    }  # fmt: skip
    assert not [
        path for path in folder.rglob("*") if path.is_file() and "{{" in path.read_text().replace("${{ matrix", "")
    ]
    again = calpaca("plugins", "new", "sea_shell")
    assert (again.code, "not empty" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "told"),
    [("Sea", "no name for a plugin"), ("run", "command of calpaca"), ("retrieval_qa", "is installed already")],
)
def test_a_name_that_no_new_plugin_can_have_is_refused(calpaca, name, told) -> None:
    result = calpaca("plugins", "new", name)
    assert result.code == 2
    assert told in result.err


# The same ones again -------------------------------------------------------------------------------------------------


def test_freeze_prints_versions_and_places(calpaca, make_plugin, site) -> None:
    make_plugin("plain", "", version="1.2")
    make_plugin("linked", "")
    (site / "calpaca_linked-1.0.dist-info" / "direct_url.json").write_text(
        '{"url": "file:///home/me/linked", "dir_info": {"editable": true}}'
    )
    make_plugin("tracked", "")
    (site / "calpaca_tracked-1.0.dist-info" / "direct_url.json").write_text(
        '{"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}'
    )
    lines = calpaca("plugins", "freeze").out.splitlines()
    assert "calpaca-plain==1.2" in lines
    assert "-e file:///home/me/linked" in lines
    assert "calpaca-tracked @ git+https://example.org/x.git@abc" in lines
    assert not any(line.startswith("calpaca==") for line in lines)


def test_sync_installs_what_is_missing_and_nothing_else(calpaca, make_plugin, tmp_path, monkeypatch) -> None:
    make_plugin("plain", "", version="1.2")
    listed = tmp_path / "plugins.txt"
    listed.write_text("# mine\ncalpaca-plain==1.2\ncalpaca-gone==3.0\n")
    asked: list[list[str]] = []
    assert calpaca("plugins", "sync", str(listed), "--dry-run").out == "calpaca-gone==3.0\n"
    monkeypatch.setattr(freeze, "_installer", lambda: asked.append([]) or ["true"])
    assert calpaca("plugins", "sync", str(listed)).code == 0
    assert len(asked) == 1
    monkeypatch.setattr(freeze, "_installer", lambda: ["false"])
    failed = calpaca("plugins", "sync", str(listed))
    assert failed.code == 4
    assert "calpaca-gone==3.0" in failed.err
    listed.write_text("calpaca-plain==1.2\n")
    assert "All plugins of the list are installed" in calpaca("plugins", "sync", str(listed)).err
    listed.write_text("calpaca-plain is nice\n")
    wrong = calpaca("plugins", "sync", str(listed))
    assert (wrong.code, f"{listed}:1" in wrong.err) == (2, True)


@pytest.mark.slow
def test_what_was_frozen_is_installed_again_in_a_new_environment(tmp_path) -> None:
    write_plugin("sea_shell", "loader", tmp_path / "plugin")
    python = _environment(tmp_path / "env")
    environment = {**os.environ, "PIP_NO_BUILD_ISOLATION": "false", "PIP_NO_DEPS": "true"}
    source = (tmp_path / "plugin").as_uri()
    listed = tmp_path / "plugins.txt"
    listed.write_text(f"calpaca-sea-shell @ {source}\n")
    subprocess.run([python, "-m", "calpaca", "plugins", "sync", str(listed)], env=environment, check=True)
    frozen = subprocess.run([python, "-m", "calpaca", "plugins", "freeze"], capture_output=True, text=True, check=True)
    assert f"calpaca-sea-shell @ {source}" in frozen.stdout.splitlines()


# Documentation -------------------------------------------------------------------------------------------------------


def test_docs_shows_hooks_apps_and_commands(calpaca) -> None:
    shown = calpaca("plugins", "docs", "retrieval_qa").out
    assert shown.startswith("# retrieval_qa\n")
    assert "Hooks: register_apps." in shown
    assert "calpaca run retrieval_qa" in shown
    assert "--question" in shown
    assert "calpaca train" in calpaca("plugins", "docs", "trainer").out
    unknown = calpaca("plugins", "docs", "retrieval")
    assert (unknown.code, "retrieval_qa" in unknown.err) == (2, True)
