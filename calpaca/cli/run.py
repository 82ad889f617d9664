"""`calpaca run [APP]`: list the apps of the installed plugins, or run one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import click

from calpaca.core.errors import UsageError
from calpaca.plugins.instances import Instance, find_instance, instances

if TYPE_CHECKING:
    from pydantic import BaseModel

    from calpaca.cli.answer import AnswerPrinter
    from calpaca.core.events import Event
    from calpaca.core.jobs import JobRecord
    from calpaca.core.runtime import Runtime
    from calpaca.plugins.app import App, Turn


class Apps(click.Group):
    """The apps as subcommands, each with the flags of its options."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(instances(shared_runtime()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return app_command(find_instance(cmd_name, shared_runtime()))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, instance.app.summary) for name, instance in sorted(instances(shared_runtime()).items())]
        with formatter.section("Apps"):
            formatter.write_dl(rows or [("none", "No plugin with an app is installed.")])


@click.group(cls=Apps, invoke_without_command=True, subcommand_metavar="[APP] [OPTIONS]...")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def run(ctx: click.Context, as_json: bool) -> None:
    """Run an app, or list the installed ones. `calpaca run APP --help` shows an app's options."""
    if ctx.invoked_subcommand is None:
        _list_apps(shared_runtime(), as_json)


class AppCommand(click.Command):
    """A command whose flags are listed under the headings of `groups`: heading by parameter name."""

    def __init__(self, *arguments: Any, groups: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None:
                sections.setdefault(self.groups.get(parameter.name or "", "Output options"), []).append(row)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def app_command(instance: Instance) -> click.Command:
    """The command that runs an app. Its shared flags are the same for every app. Raises PluginError."""
    from calpaca.cli.flags import flags, group_of

    model = instance.app.load_options()
    fields = flags(instance.app.name, model)
    # No pydantic field begins with an underscore, so these names cannot be those of an option.
    output = [
        click.Option(["_json", "--json"], is_flag=True, help="Print one JSON object and nothing else on stdout."),
        click.Option(["_verbose", "--verbose"], is_flag=True, help="Show earlier steps, and the sources' text."),
    ]

    @click.pass_context
    def command(ctx: click.Context, /, **values: Any) -> None:
        typed = {name: value for name, value in values.items() if was_typed(ctx, name)}
        as_json, verbose = typed.pop("_json", False), typed.pop("_verbose", False)
        _run(instance, typed, as_json=as_json, verbose=verbose)

    return AppCommand(
        instance.name,
        params=[*fields, *output],
        callback=command,
        help=instance.app.summary,
        groups={name: group_of(model, name) for name in model.model_fields},
    )


def was_typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def shared_runtime() -> Runtime:
    """The runtime of this process."""
    from calpaca.plugins.wiring import runtime

    with redirect_stdout(sys.stderr):  # what a plugin prints while it is imported is no answer
        return runtime()


def _list_apps(runtime: Runtime, as_json: bool) -> None:
    found = sorted(instances(runtime).items())
    if as_json:
        rows = [
            {"name": name, "app": one.app.name, "summary": one.app.summary, "kind": one.app.kind, "plugin": runtime.apps.owner(one.app.name)}
            for name, one in found
        ]  # fmt: skip
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    if not found:
        from calpaca.plugins.catalogue import known_plugins

        names = ", ".join(plugin.distribution for plugin in known_plugins())
        raise UsageError("No app is installed.", f"Install a plugin with pip, for example: {names}")
    width = max(len(name) for name, _ in found)
    for name, one in found:
        click.echo(f"{name:<{width}}  {one.app.summary}")


def _run(instance: Instance, typed: Mapping[str, Any], *, as_json: bool, verbose: bool) -> None:
    """Build the app and print what it reports; without its input, ask for one after the other."""
    from calpaca.cli.answer import AnswerPrinter
    from calpaca.plugins.options import read_options

    app, runtime = instance.app, shared_runtime()
    runtime.attaches = runtime.settings.attach
    options = read_options(app.load_options(), {**instance.presets, **typed}, instance.name)
    with answers_only() as out:
        runner = app.build(options, runtime)
        given = _given_input(app, options)
        printer = partial(
            AnswerPrinter, out, sys.stderr, answer=app.answer, as_json=as_json,
            indent=2 if given is not None else None, verbose=verbose,
        )  # fmt: skip
        if not hasattr(runner, "stream"):  # a job, or work on an app's answers
            _run_job(runner, printer())
        elif given is not None:
            printer().show(runner.stream(given))
        else:
            _converse(app, runner, printer, out if not as_json else None)


def _given_input(app: App, options: BaseModel) -> str | None:
    """The app's input; empty where it takes none or has documents in its place, None where lines are to be asked for."""
    given = getattr(options, app.input) if app.input else ""
    if given is not None or app.documents is None:
        return given if given is None else str(given)
    if getattr(options, app.documents) or sys.stdin is None or sys.stdin.isatty():
        return ""
    from calpaca.core.encoding import decode

    return decode(sys.stdin.buffer.read(), "stdin")[0]


def _converse(app: App, runner: Any, printer: Callable[[], AnswerPrinter], out: TextIO | None) -> None:
    """Answer line after line, parted by blank lines on `out`. What a person types is one conversation; the lines of a
    pipe have nothing to do with each other.
    """
    turns: list[Turn] | None = [] if app.history and sys.stdin is not None and sys.stdin.isatty() else None
    for number, text in enumerate(_asked_for(str(app.input))):
        if out is not None and number:
            out.write("\n")
        events = runner.stream(text) if turns is None else runner.stream(text, history=tuple(turns))
        printer().show(events if turns is None else _noted(events, app, text, turns))


def _noted(events: Generator[Event], app: App, text: str, turns: list[Turn]) -> Iterator[Event]:
    """The same events; the result becomes a turn."""
    from calpaca.core.events import Result

    with closing(events):
        for event in events:
            if isinstance(event, Result):
                answer = str(event.value.get(app.answer, ""))
                turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            yield event


@contextmanager
def answers_only() -> Iterator[TextIO]:
    """The real stdout; what libraries print meanwhile goes to stderr."""
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        yield out


def _asked_for(what: str) -> Iterator[str]:
    """The lines of stdin until a blank one; on a terminal with a prompt."""
    if sys.stdin is None:  # closed, as under some schedulers
        return
    asks = sys.stdin.isatty()
    while True:
        if asks:
            click.echo(f"{what}> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            break
        yield line
    if asks:
        click.echo(err=True)


def resume_job(record: JobRecord, runtime: Runtime, out: TextIO, *, as_json: bool) -> None:
    """Start a job again as the app that it is a run of, with the options it had."""
    from calpaca.cli.answer import AnswerPrinter
    from calpaca.plugins.options import read_options

    app = find_instance(record.kind, runtime).app
    options = read_options(app.load_options(), record.parameters, record.kind)
    with answers_only():
        _run_job(app.build(options, runtime), AnswerPrinter(out, sys.stderr, answer=app.answer, as_json=as_json))


def _run_job(runner: Any, printer: AnswerPrinter) -> None:
    """Do a job's work. Ctrl-C cancels it; the ledger keeps what is finished."""
    from calpaca.core.jobs import JobCancelled

    try:
        printer.show(runner.events())
    except KeyboardInterrupt:
        runner.cancel()
        hint = f"Go on with: calpaca jobs resume {runner.id}"
        raise JobCancelled("Cancelled; what is finished is kept.", hint) from None
