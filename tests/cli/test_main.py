"""The program as a whole: speed, encodings, errors and exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import click
import pytest

import calpaca as package
from calpaca.cli import failure
from calpaca.cli.main import COMMANDS
from calpaca.core.errors import ModelError, UsageError

HEAVY = ("torch", "transformers", "langchain", "langchain_core", "textual", "fastapi", "numpy", "pydantic", "faiss")


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print('\\n', ' '.join({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models", "--help"], ["jobs", "--help"]])
def test_help_imports_nothing_heavy(arguments) -> None:
    code = f"from calpaca.cli.main import main\nassert main({arguments}) == 0"
    assert not imported_by(code) & {
        "torch",
        "transformers",
        "langchain",
        "langchain_core",
        "textual",
        "fastapi",
        "numpy",
    }


def test_the_first_help_imports_not_even_pydantic() -> None:
    assert not imported_by("from calpaca.cli.main import main\nmain(['--help'])") & set(HEAVY)


def test_listing_apps_imports_no_engine() -> None:
    code = "from calpaca.cli.main import main\nassert main(['plugins']) == 0"
    assert not imported_by(code) & {"torch", "transformers", "langchain", "langchain_core", "faiss"}


def test_import_calpaca_is_light_and_offers_all_its_names() -> None:
    assert not imported_by("import calpaca") & set(HEAVY)
    assert set(package.__all__) <= set(dir(package))
    assert package.App.__name__ == "App"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_help_takes_at_most_a_quarter_of_a_second() -> None:
    command = [sys.executable, "-m", "calpaca", "--help"]
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25


def test_help_lists_every_command(calpaca) -> None:
    result = calpaca("--help")
    assert result.code == 0
    for name, (_, sentence) in COMMANDS.items():
        assert name in result.out
        assert sentence in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_sentence_of_a_command_is_that_of_its_own_help(name, calpaca) -> None:
    sentence = COMMANDS[name][1]
    assert sentence in calpaca(name, "--help").out


def test_version(calpaca) -> None:
    assert calpaca("--version").out == f"calpaca {package.__version__}\n"


def test_without_a_command_the_help_is_shown_and_it_is_wrong_use(calpaca) -> None:
    result = calpaca()
    assert (result.code, result.out) == (2, "")
    assert "Usage: calpaca" in result.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["modles"], "Unknown command 'modles'.", "Did you mean 'models'?"),
        (["models", "lst"], "Unknown command 'lst'.", "Did you mean 'list'?"),
        (["run", "retrival_qa"], "Unknown app 'retrival_qa'.", "Did you mean 'retrieval_qa'?"),
        (["models", "path", "smollm2-135m"], "Unknown chat model 'smollm2-135m'.", "Did you mean 'smollm2-135m-instruct'"),
        (["models", "list", "--jsn"], "Unknown option '--jsn'.", "Did you mean '--json'?"),
        (["models", "path"], "Missing argument 'NAME'.", "See: calpaca models path --help"),
        (["models", "path", "x", "--format", "zip"], "'zip' is not one of 'hf', 'gguf'.", "calpaca models path --help"),
    ],
)  # fmt: skip
def test_wrong_use_is_two_lines_with_the_nearest_match(arguments, message, hint, calpaca) -> None:
    result = calpaca(*arguments)
    assert result.code in {2, 3}
    assert result.out == ""
    first, second = result.err.splitlines()
    assert message in first
    assert hint in second


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UsageError("Wrong\nthing.", "Do\nthis."), 2, ["calpaca: Wrong thing.", "  Do this."]),
        (ModelError("No model."), 3, ["calpaca: No model."]),
        (KeyboardInterrupt(), 130, ["calpaca: Interrupted."]),
        (click.Abort(), 130, ["calpaca: Interrupted."]),
    ],
)
def test_each_error_has_its_exit_code_and_at_most_two_lines(error, code, lines, capsys) -> None:
    assert failure.report(error) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_a_full_disk_is_no_bug(capsys) -> None:
    assert failure.report(OSError(errno.ENOSPC, "No space left on device", "/cache/file")) == 1
    message, hint = capsys.readouterr().err.splitlines()
    assert message == "calpaca: No space left on device: /cache/file."
    assert "CALPACA_CACHE" in hint


def test_an_unexpected_error_keeps_its_traceback_in_a_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path))
    monkeypatch.delenv("CALPACA_DEBUG", raising=False)
    try:
        raise RuntimeError("unheard of")
    except RuntimeError as error:
        assert failure.report(error) == 1
    shown = capsys.readouterr().err
    assert "This is a bug in calpaca or a plugin: RuntimeError: unheard of" in shown
    assert "Traceback" not in shown
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in shown
    assert "Traceback" in log.read_text()


def test_a_traceback_that_cannot_be_written_is_no_second_error(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "file"))
    assert failure.report(RuntimeError("x")) == 1
    assert "could not be written" in capsys.readouterr().err


def test_calpaca_debug_shows_the_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setenv("CALPACA_DEBUG", "1")
    try:
        raise ModelError("No model.")
    except ModelError as error:
        failure.report(error)
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_quiet(start) -> None:
    process = start("settings", PYTHONUNBUFFERED="1")
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    process.wait(timeout=30)
    process.stderr.close()


def test_stdout_is_utf8_whatever_the_locale_says(start, shouting) -> None:
    process = start("run", "shout", "--text", "羊驼 🦙", LC_ALL="C", PYTHONIOENCODING="latin-1")
    out, _ = process.communicate(timeout=60)
    assert out == "羊驼 🦙\n"


def test_python_m_calpaca_is_the_same_program() -> None:
    result = subprocess.run([sys.executable, "-m", "calpaca", "nothing"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Unknown command 'nothing'." in result.stderr


def test_a_broken_plugin_is_one_line_on_stderr_and_nothing_on_stdout(make_plugin, shouting, calpaca) -> None:
    make_plugin("hostile", "print('hello from a plugin')\nimport module_that_is_not_there")
    result = calpaca("run", "shout", "--text", "a", "--json")
    assert (result.code, result.json) == (0, {"answer": "A"})
    lines = [line for line in result.err.splitlines() if "module_that_is_not_there" in line]
    assert len(lines) == 1
    assert "calpaca-hostile 1.0" in lines[0]
    assert "hello from a plugin" in result.err


def test_the_environment_is_not_needed_for_a_home_that_cannot_be_written(calpaca, monkeypatch) -> None:
    monkeypatch.setenv("HOME", os.devnull)
    assert calpaca("plugins").code == 0


# Commands of plugins -------------------------------------------------------------------------------------------------

COMMAND = """
import click

calpaca_api = ">=1,<2"

@click.command()
def shout():
    click.echo("HELLO")
"""


@pytest.fixture
def make_command(make_plugin, site):
    """`make_command(name, target=…)` installs a plugin that adds a command."""

    def make(name: str, command: str, target: str = "") -> None:
        make_plugin(name, COMMAND)
        folder = site / f"calpaca_{name}-1.0.dist-info"
        with (folder / "METADATA").open("a") as metadata:
            metadata.write(f"Summary: What {name} does.\n")
        with (folder / "entry_points.txt").open("a") as entries:
            entries.write(f"\n[calpaca.commands]\n{command} = {target or f'plugin_calpaca_{name}:shout'}\n")

    return make


def test_a_plugin_adds_a_command_which_help_lists_without_importing_it(make_command, calpaca) -> None:
    make_command("loud", "shout")
    listed = calpaca("--help").out
    assert "shout" in listed
    assert "What loud does." in listed
    assert "plugin_calpaca_loud" not in sys.modules
    assert calpaca("shout").out == "HELLO\n"


def test_a_plugin_that_is_left_out_adds_no_command(make_command, calpaca, monkeypatch) -> None:
    make_command("loud", "shout")
    monkeypatch.setenv("CALPACA_PLUGINS", "retrieval_qa")
    assert "shout" not in calpaca("--help").out
    assert calpaca("shout").code == 2


def test_a_command_of_the_program_cannot_be_taken_and_both_sides_are_named(make_command, calpaca) -> None:
    make_command("greedy", "jobs")
    listed = calpaca("--help").out
    assert "calpaca-greedy" in listed
    assert "calpaca itself" in listed
    assert calpaca("jobs", "list").code == 0


def test_two_plugins_with_one_command_are_both_named_and_it_is_used_by_neither(make_command, calpaca) -> None:
    make_command("first", "shout")
    make_command("second", "shout")
    result = calpaca("shout")
    assert result.code == 4
    assert "calpaca-first" in result.err
    assert "calpaca-second" in result.err


def test_a_command_that_cannot_be_imported_names_its_distribution(make_command, calpaca) -> None:
    make_command("empty", "shout", "module_that_is_not_there:shout")
    result = calpaca("shout")
    assert result.code == 4
    assert "calpaca-empty" in result.err


def test_a_command_of_a_known_plugin_that_is_not_installed_says_what_to_install(calpaca, monkeypatch) -> None:
    monkeypatch.setenv("CALPACA_PLUGINS", "")
    result = calpaca("serve")
    assert result.code == 2
    assert "pip install calpaca-openai-api" in result.err
