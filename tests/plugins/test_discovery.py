"""Finding plugins: a broken one is kept and shown, and never stops another."""

from __future__ import annotations

import logging
import threading

import pytest

from calpaca.core.errors import PluginError
from calpaca.core.registry import Component
from calpaca.core.settings import Settings
from calpaca.plugins import hookspecs, wiring
from calpaca.plugins.app import App
from calpaca.plugins.discovery import (
    Candidate,
    PluginRecord,
    allowed_plugins,
    installed_plugins,
    load_plugins,
)
from calpaca.plugins.wiring import build_runtime

HOSTILE = {
    "import_error": ("import module_that_is_not_there", "broken", "module_that_is_not_there"),
    "syntax_error": ("def broken(:", "broken", "SyntaxError"),
    "leaves": ("import sys; sys.exit('bye')", "broken", "SystemExit: bye"),
    "wrong_signature": (
        "from calpaca import hookimpl\n@hookimpl\ndef register_apps(surprise): return []",
        "broken",
        "surprise",
    ),
    "unknown_hook": (
        "from calpaca import hookimpl\n@hookimpl\ndef register_ap(): return []",
        "broken",
        "There is no hook 'register_ap'.",
    ),
    "raises": (
        "from calpaca import hookimpl\n@hookimpl\ndef register_apps(): raise RuntimeError('never again')",
        "broken",
        "RuntimeError: never again",
    ),
    "no_list": ("from calpaca import hookimpl\n@hookimpl\ndef register_apps(): return 7", "broken", "returned int"),
    "wrong_items": (
        "from calpaca import hookimpl\n@hookimpl\ndef register_apps(): return ['app']",
        "broken",
        "register_apps returned 'app'",
    ),
    "too_new": ("calpaca_api = '>=2'", "incompatible", "needs the plugin API >=2"),
    "odd_version": ("calpaca_api = 'the latest'", "broken", "calpaca_api is 'the latest'"),
}


def record_of(runtime, name: str) -> PluginRecord:
    return next(record for record in runtime.plugins.records if record.name == name)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_plugin_is_shown_and_the_good_one_still_works(kind, make_plugin, app_source, caplog) -> None:
    source, state, error = HOSTILE[kind]
    make_plugin("hostile", source, distribution=f"calpaca-{kind.replace('_', '-')}", version="6.6")
    make_plugin("zgood", app_source("shout"))
    with caplog.at_level(logging.WARNING, logger="calpaca"):
        runtime = build_runtime(Settings())
    record = record_of(runtime, "hostile")
    assert record.state == state
    assert error in record.error
    assert record.hint
    assert record.version == "6.6"
    lines = [entry.getMessage() for entry in caplog.records if "hostile" in entry.getMessage()]
    assert len(lines) == 1
    assert record.distribution in lines[0]
    assert "\n" not in lines[0]
    assert record_of(runtime, "zgood").state == "ok"
    assert "shout" in runtime.apps
    assert "transformers" in runtime.engines


def test_all_hostile_plugins_together_leave_the_good_one_alone(make_plugin, app_source) -> None:
    for kind, (source, _, _) in HOSTILE.items():
        make_plugin(kind, source)
    make_plugin("good", app_source("shout"))
    runtime = build_runtime(Settings())
    assert {record.name for record in runtime.plugins.failed()} == set(HOSTILE)
    assert "shout" in runtime.apps


def test_a_misspelt_hook_suggests_the_nearest(make_plugin) -> None:
    make_plugin("misspelt", "from calpaca import hookimpl\n@hookimpl\ndef register_ap(): return []")
    assert "Did you mean 'register_apps'?" in record_of(build_runtime(Settings()), "misspelt").hint


def test_two_plugins_with_one_app_are_both_named_and_the_first_keeps_it(make_plugin, app_source) -> None:
    make_plugin("first", app_source("shout"), distribution="dist-first")
    make_plugin(
        "second",
        app_source("shout") + "\n@hookimpl\ndef register_engines():\n    from calpaca.core.registry import Component\n"
        "    return [Component('mine', 'An engine.', 'x:y')]",
        distribution="dist-second",
    )
    runtime = build_runtime(Settings())
    record = record_of(runtime, "second")
    assert record.state == "broken"
    for named in ("dist-first", "dist-second", "shout"):
        assert named in record.error
    assert runtime.apps.owner("shout") == "'first' (dist-first 1.0)"
    assert "mine" not in runtime.engines  # a plugin is in wholly or not at all


def test_two_distributions_with_one_entry_name_are_both_named(make_plugin, app_source) -> None:
    make_plugin("same", app_source("shout"), distribution="dist-a")
    make_plugin("same", app_source("whisper"), distribution="dist-b")
    runtime = build_runtime(Settings())
    first, second = (record for record in runtime.plugins.records if record.name == "same")
    assert (first.state, first.distribution) == ("ok", "dist-a")
    assert second.state == "broken"
    assert "dist-a" in second.error
    assert "dist-b" in second.error
    assert "shout" in runtime.apps
    assert "whisper" not in runtime.apps


def test_an_older_copy_further_along_the_path_is_not_a_second_distribution(make_plugin, app_source, tmp_path) -> None:
    import sys

    make_plugin("good", app_source("shout"))
    older = tmp_path / "older" / "calpaca_good-0.9.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: Calpaca_Good\nVersion: 0.9\n")
    (older / "entry_points.txt").write_text("[calpaca]\ngood = nothing_here\n")
    sys.path.append(str(older.parent))
    try:
        records = [record for record in build_runtime(Settings()).plugins.records if record.name == "good"]
    finally:
        sys.path.remove(str(older.parent))
    assert [(record.version, record.state) for record in records] == [("1.0", "ok")]


def test_calpaca_plugins_limits_what_is_imported(make_plugin, app_source, monkeypatch) -> None:
    make_plugin("good", app_source("shout"))
    make_plugin("other", "raise RuntimeError('imported')")
    monkeypatch.setenv("CALPACA_PLUGINS", "good, retrieval_qa")
    runtime = build_runtime(Settings())
    assert record_of(runtime, "other").state == "blocked"
    assert "shout" in runtime.apps
    monkeypatch.setenv("CALPACA_PLUGINS", "")
    runtime = build_runtime(Settings())
    assert {record.name for record in runtime.plugins.records if record.state == "ok"} == {"builtin"}
    assert "transformers" in runtime.engines
    assert not runtime.plugins.failed()


def test_allowed_plugins_reads_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("CALPACA_PLUGINS", raising=False)
    assert allowed_plugins() is None
    monkeypatch.setenv("CALPACA_PLUGINS", "a, b,")
    assert allowed_plugins() == {"a", "b"}


def test_plugins_are_sorted_with_the_built_in_one_first(make_plugin, app_source) -> None:
    make_plugin("zzz", app_source("z"))
    make_plugin("aaa", app_source("a"))
    names = [candidate.name for candidate in installed_plugins()]
    assert names[:2] == ["builtin", "aaa"]
    assert names[-1] == "zzz"
    assert names[1:] == sorted(names[1:])


def test_a_record_holds_hooks_and_the_time_that_loading_took(make_plugin, app_source) -> None:
    make_plugin("slow", "import time\ntime.sleep(0.05)\n" + app_source("shout"))
    record = record_of(build_runtime(Settings()), "slow")
    assert record.hooks == ["register_apps"]
    assert record.load_time >= 0.05
    assert str(record) == "'slow' (calpaca-slow 1.0)"


def test_a_plugin_may_be_given_without_being_installed() -> None:
    class Plugin:
        @hookspecs.hookimpl
        def register_engines(self) -> list[Component]:
            return [Component("mine", "An engine.", "json:dumps")]

    plugins = load_plugins([Candidate("mine", "none", "0", Plugin)])
    runtime = build_runtime(Settings(), plugins)
    assert runtime.engines.names() == ["mine"]
    assert runtime.plugins is plugins


def test_a_plugin_may_implement_a_hook_of_a_later_calpaca_if_it_says_so() -> None:
    class Plugin:
        @hookspecs.hookimpl(optionalhook=True)
        def register_later(self) -> list[Component]:
            return []

    (record,) = load_plugins([Candidate("later", "none", "0", Plugin)]).records
    assert (record.state, record.hooks) == ("ok", [])


def test_ctrl_c_during_an_import_is_no_broken_plugin() -> None:
    def load() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_plugins([Candidate("x", "x", "0", load)])


def test_the_runtime_of_the_process_is_made_once_for_all_threads(monkeypatch) -> None:
    monkeypatch.setattr(wiring, "_shared", None)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(wiring.runtime())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(runtime) for runtime in found}) == 1
    assert len(found) == 8


def test_an_app_whose_builder_returns_no_runner_is_named() -> None:
    app = App("odd", "Odd.", "json:dumps", options="calpaca.core.settings:SamplingSettings")
    runner = type("Builder", (App,), {"load": lambda self: lambda options, runtime: object()})
    with pytest.raises(PluginError, match="'odd' is of kind 'answer'"):
        runner(app.name, app.summary, app.target, options=app.options).build(app.load_options()(), None)
