"""What every app must do, as a test class: subclass it, name the app, and override what it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from calpaca.cli.run import app_command
from calpaca.core.errors import UsageError
from calpaca.core.events import Result, Step, Token
from calpaca.core.runtime import Runtime
from calpaca.plugins.app import App
from calpaca.plugins.instances import Instance
from calpaca.plugins.options import SHARED, read_options
from calpaca.plugins.testing import fake_runtime


class AppContract:
    """One contract for answer apps and jobs, on a model that answers from a script."""

    app: str
    """The app's name."""
    input: str = "What is a llama?"
    """What it is given, where it takes an input."""
    answers: Sequence[str] = ("The llama is a camelid.",)
    """What the model says, in turn and then over again."""

    @pytest.fixture
    def options(self) -> Mapping[str, Any]:
        """Options that a run needs, such as files."""
        return {}

    @pytest.fixture
    def runtime(self, calpaca_home: Any) -> Iterator[Runtime]:  # noqa: ARG002  # for its effect
        with fake_runtime(self.answers) as runtime:
            yield runtime

    @pytest.fixture
    def described(self, runtime: Runtime) -> App:
        app: App = runtime.apps.get(self.app)  # type: ignore[assignment]
        return app

    @pytest.fixture
    def runner(self, described: App, options: Mapping[str, Any], runtime: Runtime) -> Any:
        return described.build(read_options(described.load_options(), options, self.app), runtime)

    # What is said of it --------------------------------------------------------------------------------------------
    def test_every_option_is_a_flag_and_described(self, described: App) -> None:
        command = app_command(Instance(described.name, described, {}))
        shared = {name for model in SHARED for name in model.model_fields}
        undescribed = [
            option.name for option in command.params if option.name not in shared and not getattr(option, "help", "")
        ]
        assert not undescribed, f"without a description: {undescribed}"

    def test_its_input_and_documents_are_options(self, described: App) -> None:
        fields = described.load_options().model_fields
        assert described.input is None or described.input in fields
        assert described.documents is None or described.documents in fields

    def test_its_options_make_a_schema(self, described: App) -> None:
        assert json.dumps(described.load_options().model_json_schema())

    def test_an_unknown_option_is_named(self, described: App) -> None:
        with pytest.raises(UsageError, match="no_such_option"):
            read_options(described.load_options(), {"no_such_option": 1}, self.app)

    # A run ---------------------------------------------------------------------------------------------------------
    def test_a_run_ends_with_its_result(self, described: App, runner: Any) -> None:
        events = self._events(described, runner)
        assert isinstance(events[-1], Result), f"the last event is {events[-1]!r}"
        assert sum(isinstance(event, Result) for event in events) == 1
        assert described.answer in events[-1].value, f"the result has no '{described.answer}'"

    def test_the_result_is_json(self, described: App, runner: Any) -> None:
        value = self._events(described, runner)[-1].value
        assert json.loads(json.dumps(value, default=str)).keys() == value.keys()

    def test_the_text_of_the_last_step_is_the_answer(self, described: App, runner: Any) -> None:
        text, shown = "", True
        events = self._events(described, runner)
        for event in events:
            match event:
                case Step():
                    shown, text = event.index == event.total, ""
                case Token() if shown:
                    text += event.text
        assert text in ("", events[-1].value[described.answer])

    def test_it_prints_nothing(self, described: App, runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
        self._events(described, runner)
        assert capsys.readouterr().out == ""

    def test_a_run_can_be_left(self, described: App, runner: Any) -> None:
        events = self._started(described, runner)
        next(events)
        events.close()

    # Answers -------------------------------------------------------------------------------------------------------
    def test_invoke_gives_what_the_stream_ends_with(self, described: App, runner: Any, runtime: Runtime) -> None:
        self._needs(described, "answer")
        streamed = self._events(described, runner)[-1].value
        again = self._again(described, runner, runtime)
        assert again.invoke(self._input(described)).keys() == streamed.keys()

    def test_a_conversation_is_taken_where_it_says_so(self, described: App, runner: Any) -> None:
        self._needs(described, "answer")
        if not described.history:
            pytest.skip("it takes no history")
        told = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
        assert isinstance([*runner.stream(self._input(described), history=told)][-1], Result)

    def test_the_program_prints_the_answer_and_nothing_else(
        self, described: App, options: Mapping[str, Any], runtime: Runtime, calpaca_program: Any
    ) -> None:
        self._needs(described, "answer")
        arguments = [*_as_flags(described, options), "--json"]
        if described.input and (described.documents is None or not options.get(described.documents)):
            arguments += _as_flags(described, {described.input: self.input})
        outcome = calpaca_program("run", self.app, *arguments, runtime=runtime)
        assert outcome.code == 0, outcome.err
        assert described.answer in outcome.json

    # Jobs ----------------------------------------------------------------------------------------------------------
    def test_a_job_is_in_the_ledger_as_a_run_of_this_app(self, described: App, runner: Any, runtime: Runtime) -> None:
        self._needs(described, "job")
        self._events(described, runner)
        record = runtime.jobs.get(runner.id)
        assert (record.kind, record.state) == (self.app, "done")
        read_options(described.load_options(), record.parameters, self.app)  # what `calpaca jobs resume` starts it with

    # -------------------------------------------------------------------------------------------------------------------
    def _events(self, described: App, runner: Any) -> list[Any]:
        return list(self._started(described, runner))

    def _started(self, described: App, runner: Any) -> Any:
        return runner.events() if described.kind == "job" else runner.stream(self._input(described))

    def _input(self, described: App) -> str:
        return self.input if described.input else ""

    @staticmethod
    def _again(described: App, runner: Any, runtime: Runtime) -> Any:
        options = getattr(runner, "options", None)
        return runner if options is None else described.build(options, runtime)

    @staticmethod
    def _needs(described: App, kind: str) -> None:
        if described.kind != kind:
            pytest.skip(f"it is of the kind '{described.kind}'")


def _as_flags(app: App, options: Mapping[str, Any]) -> list[str]:
    """Options as they are typed."""
    from calpaca.plugins.options import flag_name

    model, typed = app.load_options(), list[str]()
    for name, value in options.items():
        flag = flag_name(model, name)
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            typed += [f"--{flag}", str(each)]
    return typed
