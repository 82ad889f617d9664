"""`calpaca models`, `plugins` and `settings`."""

from __future__ import annotations

from pathlib import Path

import pytest

from calpaca.core.settings import Settings


def test_models_list_shows_the_catalogue_and_what_lies_here(calpaca) -> None:
    rows = {row["name"]: row for row in calpaca("models", "list", "--json").json}
    assert rows["smollm2-135m-instruct"]["kind"] == "chat"
    assert rows["multilingual-e5-small"]["licence"]
    shown = calpaca("models", "list").out
    assert all(name in shown for name in rows)


def test_models_list_shows_the_named_models_of_the_settings(calpaca, project_file) -> None:
    project_file.write_text('[models.alpaca]\nmodel = "base"\nadapters = ["one"]\n')
    rows = {row["name"]: row for row in calpaca("models", "list", "--json").json}
    assert rows["alpaca"]["summary"] == "base + one"


def test_models_path_prints_one_line(calpaca, smollm2, smollm2_gguf, e5) -> None:
    assert calpaca("models", "path", "smollm2-135m-instruct").out == f"{smollm2}\n"
    assert calpaca("models", "path", "smollm2-135m-instruct", "--format", "gguf").out == f"{smollm2_gguf}\n"
    assert calpaca("models", "path", "multilingual-e5-small").out == f"{e5}\n"
    result = calpaca("models", "path", "multilingual-e5-small", "--format", "gguf")
    assert (result.code, result.out) == (3, "")


def test_models_path_knows_folders_and_named_models(calpaca, smollm2, project_file) -> None:
    assert calpaca("models", "path", str(smollm2)).out == f"{smollm2}\n"
    project_file.write_text(f"[models.mine]\nmodel = '{smollm2}'\n")
    assert calpaca("models", "path", "mine").out == f"{smollm2}\n"


def test_models_pull_prints_where_each_lies(calpaca, smollm2_gguf, e5) -> None:
    result = calpaca("models", "pull", "smollm2-135m-instruct", "multilingual-e5-small")
    first, second = map(Path, result.out.splitlines())
    assert first.exists()
    assert second == e5


def test_models_show_describes_a_model(calpaca, smollm2) -> None:
    card = calpaca("models", "show", str(smollm2), "--json").json
    assert card["architecture"] == "LlamaForCausalLM"
    assert card["parameters"] == 134_515_008
    assert card["context_length"] == 8192
    assert card["path"] == str(smollm2)
    shown = calpaca("models", "show", "smollm2-135m-instruct").out
    assert "Apache-2.0" in shown
    assert "gguf" in shown
    assert card["fingerprint"] not in shown  # the GGUF file is another content


def test_plugins_shows_name_version_distribution_state_and_hooks(calpaca, shouting) -> None:
    rows = {row["name"]: row for row in calpaca("plugins", "--json").json}
    assert rows["shouting"]["distribution"] == "calpaca-shouting"
    assert rows["shouting"]["version"] == "1.0"
    assert rows["shouting"]["state"] == "ok"
    assert rows["shouting"]["hooks"] == ["register_apps"]
    assert rows["shouting"]["offers"] == {"register_apps": ["shout"]}
    assert rows["shouting"]["load_time"] >= 0
    shown = calpaca("plugins").out
    assert "calpaca-shouting" in shown
    assert "register_engines" in shown


def test_plugins_shows_what_is_wrong(calpaca, make_plugin) -> None:
    make_plugin("hostile", "import module_that_is_not_there")
    result = calpaca("plugins")
    assert result.code == 0
    assert "broken" in result.out
    assert "module_that_is_not_there" in result.out


def test_settings_shows_values_and_where_files_lie(calpaca, project_file, monkeypatch, tmp_path) -> None:
    project_file.write_text('device = "cpu"\n[sampling]\nstop = ["羊驼"]\n')
    monkeypatch.setenv("CALPACA_SAMPLING__TEMPERATURE", "0.5")
    shown = calpaca("settings").out
    assert 'device = "cpu"' in shown
    assert 'sampling.stop = ["羊驼"]' in shown
    assert "sampling.temperature = 0.5" in shown
    assert str(project_file) in shown
    everything = calpaca("settings", "--json").json
    assert everything["settings"]["device"] == "cpu"
    assert set(everything["settings"]) == set(Settings.model_fields)
    assert everything["folders"]["data"] == str(tmp_path / "calpaca-data")


@pytest.mark.parametrize("command", ["settings", "plugins", "run"])
def test_a_wrong_settings_file_is_wrong_use(command, calpaca, project_file) -> None:
    project_file.write_text("devise = 'cpu'")
    result = calpaca(command)
    assert result.code == 2
    assert "Unknown setting 'devise'." in result.err
    assert "Did you mean 'device'?" in result.err
