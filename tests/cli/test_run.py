"""`calpaca run`: flags from options, instances from the settings, input from a flag, a pipe or a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import click
import pytest
from pydantic import BaseModel, Field

from calpaca.cli.flags import flags
from calpaca.cli.main import program
from calpaca.core.errors import PluginError
from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions, read_options


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Everything(ModelOptions, SamplingOptions):
    text: str = Field("hello", description="A text.")
    number: int = 3
    share: float = 0.5
    switch: bool = True
    off: bool = False
    colour: Colour = Colour.RED
    strategy: Literal["stuff", "refine"] = "stuff"
    size: Literal[1, 2] = 1
    folder: Path | None = None
    old: Optional[int] = None  # noqa: UP045  # plugins are written in both ways
    names: Annotated[list[str], Flag("name")] = Field([])
    pair: tuple[int, ...] = ()
    needed: Annotated[str, Field(description="Needed.")]


def parse(model: type[BaseModel], *arguments: str) -> dict[str, Any]:
    """What the flags of `model` make of `arguments`."""
    command = click.Command("app", params=flags("app", model), callback=lambda **values: values)
    return command.main(arguments, standalone_mode=False)  # type: ignore[no-any-return]


def test_every_allowed_type_becomes_a_flag() -> None:
    values = parse(
        Everything, "--text", "x", "--number", "7", "--share", "0.1", "--no-switch", "--off", "--colour", "green",
        "--strategy", "refine", "--size", "2", "--folder", "/tmp", "--old", "9", "--name", "a", "--name", "b",
        "--pair", "1", "--pair", "2", "--needed", "yes", "--adapter", "one", "--adapter", "two", "--top-k", "5",
    )  # fmt: skip
    options = read_options(Everything, {key: value for key, value in values.items() if value not in (None, ())}, "app")
    assert options.model_dump(include=set(Everything.__annotations__)) == {
        "text": "x", "number": 7, "share": 0.1, "switch": False, "off": True, "colour": Colour.GREEN,
        "strategy": "refine", "size": 2, "folder": Path("/tmp"), "old": 9, "names": ["a", "b"], "pair": (1, 2),
        "needed": "yes",
    }  # fmt: skip
    assert options.adapters == ["one", "two"]
    assert options.top_k == 5


def test_the_apps_own_flags_come_first_and_carry_description_and_default() -> None:
    options = flags("app", Everything)
    assert [option.name for option in options[:2]] == ["text", "number"]
    by_name = {option.name: option for option in options}
    assert by_name["text"].help == "A text.  [default: hello]"
    assert by_name["needed"].help == "Needed.  [required]"
    assert by_name["colour"].help == "[default: red]"
    assert by_name["top_k"].help == "Keep this many of the likeliest tokens; 0 keeps all."


def test_shared_flags_are_the_documented_ones() -> None:
    class Both(ModelOptions, SamplingOptions):
        pass

    assert {option.opts[0] for option in flags("app", Both)} == {
        "--model", "--adapter", "--tokenizer", "--chat-template", "--embedding", "--engine", "--device", "--dtype",
        "--quantization", "--revision", "--trust-remote-code", "--max-new-tokens", "--temperature", "--top-p", "--top-k",
        "--repetition-penalty", "--seed", "--stop",
    }  # fmt: skip


def test_an_option_called_like_a_shared_flag_names_both() -> None:
    class Own(BaseModel):
        temperature: float = 0.3

    with pytest.raises(PluginError) as caught:
        flags("heater", Own)
    for named in ("'heater'", "--temperature", "Own.temperature", "SamplingOptions.temperature"):
        assert named in caught.value.message

    class Redefined(ModelOptions):
        model: int = 3

    with pytest.raises(PluginError, match=r"Redefined\.model.*ModelOptions\.model"):
        flags("app", Redefined)


@pytest.mark.parametrize("name", ["json", "verbose", "help"])
def test_an_option_called_like_a_flag_of_run_names_both(name) -> None:
    model = type("Own", (BaseModel,), {"__annotations__": {"mine": Annotated[str, Flag(name)]}})
    with pytest.raises(PluginError, match=rf"--{name} \(Own\.mine\).*calpaca run itself"):
        flags("app", model)


def test_two_options_with_one_flag_are_both_named() -> None:
    class Twice(BaseModel):
        files: Annotated[list[str], Flag("file")] = []
        file: str = ""

    with pytest.raises(PluginError, match=r"Twice\.file\b.*Twice\.files"):
        flags("app", Twice)


@pytest.mark.parametrize("annotation", [dict[str, int], int | str, list[list[int]], bytes, list[bool]])
def test_a_type_that_has_no_flag_is_named_with_the_allowed_ones(annotation) -> None:
    model = type("Odd", (BaseModel,), {"__annotations__": {"odd": annotation}})
    with pytest.raises(PluginError, match="'odd' of app 'app'") as caught:
        flags("app", model)
    assert "Allowed: str, int" in caught.value.hint


# Listing and finding --------------------------------------------------------------------------------------------------


def test_run_without_an_app_lists_the_installed_ones(calpaca, shouting) -> None:
    result = calpaca("run")
    assert result.code == 0
    assert "shout" in result.out
    assert "Says it loudly." in result.out
    assert "Answers questions about your documents" in result.out
    (row,) = [row for row in calpaca("run", "--json").json if row["name"] == "shout"]
    assert row == {
        "name": "shout", "app": "shout", "summary": "Says it loudly.", "kind": "answer",
        "plugin": "'shouting' (calpaca-shouting 1.0)",
    }  # fmt: skip
    assert "Says it loudly." in calpaca("run", "--help").out


def test_run_without_any_app_says_what_to_install(calpaca, monkeypatch) -> None:
    monkeypatch.setenv("CALPACA_PLUGINS", "")
    result = calpaca("run")
    assert result.code == 2
    assert "calpaca-retrieval-qa" in result.err


def test_a_known_app_that_is_not_installed_names_its_distribution(calpaca, monkeypatch) -> None:
    from calpaca.plugins import discovery

    found = [plugin for plugin in discovery.installed_plugins() if plugin.name != "retrieval_qa"]
    monkeypatch.setattr("calpaca.plugins.wiring.installed_plugins", lambda: found)
    result = calpaca("run", "retrieval_qa")
    assert result.code == 2
    assert result.err.splitlines() == [
        "calpaca: App 'retrieval_qa' is not installed.",
        "  Install it with: pip install calpaca-retrieval-qa",
    ]


def test_a_known_app_whose_plugin_is_blocked_says_so(calpaca, monkeypatch) -> None:
    monkeypatch.setenv("CALPACA_PLUGINS", "nothing")
    result = calpaca("run", "retrieval_qa")
    assert "is blocked" in result.err
    assert "CALPACA_PLUGINS" in result.err


def test_an_apps_help_groups_its_flags(calpaca) -> None:
    result = calpaca("run", "retrieval_qa", "--help")
    own, model, sampling, output = (
        result.out.index(f"{heading}:")
        for heading in ("Options", "Model options", "Sampling options", "Output options")
    )
    assert own < result.out.index("--question") < min(model, sampling)
    assert model < result.out.index("--adapter")
    assert sampling < result.out.index("--temperature")
    assert max(model, sampling) < output < result.out.index("--json")


# Running --------------------------------------------------------------------------------------------------------------


def test_an_answer_goes_to_stdout_and_nothing_else(calpaca, shouting) -> None:
    result = calpaca("run", "shout", "--text", "hello")
    assert (result.code, result.out, result.err) == (0, "HELLO\n", "")


def test_json_prints_one_object(calpaca, shouting) -> None:
    result = calpaca("run", "shout", "--text", "你好", "--json")
    assert result.json == {"answer": "你好"}
    assert "你好" in result.out


def test_without_its_input_an_app_answers_the_lines_of_a_pipe_until_a_blank_one(calpaca, shouting) -> None:
    result = calpaca("run", "shout", stdin="one\ntwo\n\nthree\n")
    assert (result.out, result.err) == ("ONE\n\nTWO\n", "")


def test_what_is_piped_into_an_app_of_documents_is_one_text(calpaca, make_plugin, app_source) -> None:
    source = app_source("shout").replace('input="text"', 'input="text", documents="names"')
    make_plugin("shouting", source.replace("None = None", "None = None\n    names: list[str] = []"))
    result = calpaca("run", "shout", stdin="one\n\ntwo 二\n")
    assert (result.code, result.out.rstrip(), result.err) == (0, "ONE\n\nTWO 二", "")
    named = calpaca("run", "shout", "--names", "a.txt", stdin="not read")
    assert (named.code, named.out) == (0, "\n")


def test_json_answers_to_a_pipe_are_one_object_a_line(calpaca, shouting) -> None:
    assert calpaca("run", "shout", "--json", stdin="one\ntwo\n").out == '{"answer": "ONE"}\n{"answer": "TWO"}\n'


def test_an_instance_of_the_settings_runs_with_its_options(calpaca, shouting, project_file) -> None:
    project_file.write_text('[apps.greeting]\napp = "shout"\ntext = "good morning"\n')
    assert calpaca("run", "greeting").out == "GOOD MORNING\n"
    assert calpaca("run", "greeting", "--text", "bye").out == "BYE\n"
    assert "greeting" in calpaca("run").out


def test_a_section_called_like_an_app_gives_its_defaults(calpaca, shouting, project_file) -> None:
    project_file.write_text('[apps.shout]\ntext = "always"\n')
    assert calpaca("run", "shout").out == "ALWAYS\n"


def test_a_wrong_option_in_an_instance_is_named(calpaca, shouting, project_file) -> None:
    project_file.write_text('[apps.greeting]\napp = "shout"\ntxet = "x"\n')
    result = calpaca("run", "greeting")
    assert result.code == 2
    assert "Unknown option of greeting: 'txet'." in result.err
    assert "Did you mean 'text'?" in result.err


def test_an_instance_of_an_unknown_app_names_the_app(calpaca, project_file) -> None:
    project_file.write_text('[apps.greeting]\napp = "retrieval_qq"\n')
    result = calpaca("run", "greeting")
    assert "Unknown app 'retrieval_qq'." in result.err


def test_what_an_app_prints_by_accident_does_not_mix_with_the_answer(calpaca, make_plugin, app_source) -> None:
    make_plugin(
        "chatty", app_source("shout").replace("    return Runner()", "    print('loading')\n    return Runner()")
    )
    result = calpaca("run", "shout", "--text", "x", "--json")
    assert result.json == {"answer": "X"}
    assert result.err == "loading\n"


def test_a_bug_of_an_app_is_no_traceback(calpaca, make_plugin, app_source, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    make_plugin("buggy", app_source("shout").replace("return Runner()", "return 1 / 0"))
    result = calpaca("run", "shout", "--text", "x")
    assert result.code == 1
    assert "ZeroDivisionError" in result.err
    assert "Traceback" not in result.err


def test_in_a_terminal_the_prompt_goes_to_stderr_and_ctrl_d_ends(start, shouting, site) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "calpaca", "run", "shout"], stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    os.close(slave)
    os.write(master, "你好 hello\n".encode())
    time.sleep(0.5)
    os.write(master, b"\x04")
    out, err = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0
    assert out.decode() == "你好 HELLO\n"
    assert err.decode().count("text> ") == 2


REMEMBERING = """
from calpaca import App, hookimpl
from calpaca.core.events import Result
from pydantic import BaseModel

class Options(BaseModel):
    text: str | None = None

class Runner:
    def stream(self, text, history=()):
        said = " ".join(turn["content"] for turn in history)
        yield Result({"answer": f"{text} after [{said}]"})

@hookimpl
def register_apps():
    target = __name__ + ":build"
    return [App("remember", "Remembers.", target, options=__name__ + ":Options", input="text", history=True)]

def build(options, runtime):
    return Runner()
"""


def test_in_a_terminal_the_lines_are_one_conversation_and_in_a_pipe_they_are_not(
    start, calpaca, make_plugin, site
) -> None:
    make_plugin("remembering", REMEMBERING)
    assert calpaca("run", "remember", stdin="a\nb\n").out.split("\n\n") == ["a after []", "b after []\n"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "calpaca", "run", "remember"], stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    os.close(slave)
    os.write(master, b"a\nb\n\n")
    out, _ = process.communicate(timeout=60)
    os.close(master)
    assert out.decode() == "a after []\n\nb after [a a after []]\n"


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_a_job_runs_is_listed_and_explained(calpaca, counting) -> None:
    result = calpaca("run", "count", "--steps", "5")
    assert (result.code, result.out) == (0, "counted to 5\n")
    (row,) = calpaca("jobs", "list", "--json").json
    assert (row["kind"], row["state"], row["done"], row["total"]) == ("count", "done", 5, 5)
    assert row["id"] in calpaca("jobs", "list").out
    why = calpaca("jobs", "why", row["id"][:6]).out
    assert "Count to 5" in why
    assert "steps = 5" in why


def test_no_jobs_is_said_on_stderr(calpaca) -> None:
    result = calpaca("jobs", "list")
    assert (result.code, result.out, result.err) == (0, "", "No jobs yet.\n")
    assert calpaca("jobs", "list", "--json").json == []


def test_ctrl_c_stops_a_job_before_its_next_step_and_resume_finishes_it(start, counting, calpaca) -> None:
    process = start("run", "count", "--steps", "30", "--seconds", "0.1")
    while not any(row["done"] for row in calpaca("jobs", "list", "--json").json):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    (row,) = calpaca("jobs", "list", "--json").json
    assert (row["state"], row["done"] < 30) == ("cancelled", True)
    assert err.splitlines() == [
        "calpaca: Cancelled; what is finished is kept.",
        f"  Go on with: calpaca jobs resume {row['id']}",
    ]
    assert f"calpaca jobs resume {row['id']}" in calpaca("jobs", "why", row["id"]).out
    result = calpaca("jobs", "resume", row["id"], "--json")
    assert result.json["answer"] == "counted to 30"
    assert result.json["reused"] >= row["done"] > 0
    assert calpaca("jobs", "list", "--json").json[0]["state"] == "done"


def test_resuming_an_unknown_job_or_one_whose_app_is_gone_is_a_clear_error(calpaca, counting, monkeypatch) -> None:
    assert "Unknown job 'abc'." in calpaca("jobs", "resume", "abc").err
    calpaca("run", "count")
    (row,) = calpaca("jobs", "list", "--json").json
    monkeypatch.setenv("CALPACA_PLUGINS", "")
    result = calpaca("jobs", "resume", row["id"])
    assert result.code == 2
    assert "Unknown app 'count'." in result.err


def test_every_command_describes_itself_and_each_of_its_options() -> None:
    context = click.Context(program)
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        nested = getattr(command, "commands", {})
        for each in (command, *nested.values()):
            assert each.help, name
            for parameter in each.params:
                if isinstance(parameter, click.Option):
                    assert parameter.help, (name, parameter.name)
