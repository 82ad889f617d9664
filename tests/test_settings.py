"""Settings and paths: where values come from, and what a wrong one says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calpaca.core import paths, settings
from calpaca.core.errors import UsageError
from calpaca.core.paths import atomic_file, atomic_folder
from calpaca.core.settings import Settings, read_settings, user_file


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch) -> Path:
    """A folder of its own as current and configuration folder, and no settings in the environment."""
    import os

    for name in list(os.environ):
        if name.startswith("CALPACA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CALPACA_CONFIG", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    return tmp_path


def test_everything_has_a_default() -> None:
    assert read_settings() == Settings()


def test_typed_option_beats_environment_beats_project_file_beats_user_file(monkeypatch) -> None:
    user_file().write_text('model = "user"\nembedding = "user"\ndevice = "cpu"\nengine = "user"\n')
    Path("calpaca.toml").write_text('model = "project"\nembedding = "project"\nengine = "project"\n')
    monkeypatch.setenv("CALPACA_MODEL", "environment")
    monkeypatch.setenv("CALPACA_EMBEDDING", "environment")
    settings = read_settings(model="typed")
    assert (settings.model, settings.embedding, settings.engine, settings.device) == (
        "typed",
        "environment",
        "project",
        "cpu",
    )


def test_sections_are_merged_value_by_value(monkeypatch) -> None:
    user_file().write_text("[sampling]\ntop_k = 7\ntemperature = 0.1\n")
    Path("calpaca.toml").write_text("[sampling]\ntemperature = 0.2\n")
    monkeypatch.setenv("CALPACA_SAMPLING__TOP_P", "0.5")
    sampling = read_settings().sampling
    assert (sampling.top_k, sampling.temperature, sampling.top_p) == (7, 0.2, 0.5)


def test_named_models_and_apps_are_read() -> None:
    Path("calpaca.toml").write_text(
        '[models.alpaca]\nmodel = "base"\nadapters = ["one", "two@0.5"]\n'
        '[apps.handbook]\napp = "retrieval_qa"\nfiles = ["a.md"]\n[plugins.mine]\nkey = 1\n'
    )
    settings = read_settings()
    assert str(settings.models["alpaca"]) == "base + one + two@0.5"
    assert settings.apps["handbook"] == {"app": "retrieval_qa", "files": ["a.md"]}
    assert settings.plugins["mine"] == {"key": 1}


def test_calpaca_plugins_in_the_environment_is_no_setting(monkeypatch) -> None:
    monkeypatch.setenv("CALPACA_PLUGINS", "one,two")
    assert read_settings().plugins == {}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('modle = "x"', "Unknown setting 'modle'.", "Did you mean 'model'?"),
        ("[sampling]\ntemprature = 1", "Unknown setting 'sampling.temprature'.", "Did you mean 'temperature'?"),
        ('[models.a]\nmodle = "x"', "Unknown setting 'models.a.modle'.", "Did you mean 'model'?"),
        ('[sampling]\ntemperature = "hot"', "Setting 'sampling.temperature' is 'hot'", "calpaca settings"),
        ("model = ", "not valid TOML", "calpaca.toml"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(text: str, message: str, hint: str) -> None:
    Path("calpaca.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_settings()
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_wrong_environment_variable_is_named_as_such(monkeypatch) -> None:
    monkeypatch.setenv("CALPACA_SAMPLING", "{not json")
    with pytest.raises(UsageError) as caught:
        read_settings()
    assert "sampling" in caught.value.message
    assert "TOML" not in caught.value.message


def warnings_about(variable: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    settings._check_variable.cache_clear()
    caplog.clear()
    read_settings()
    read_settings()
    return [record.getMessage() for record in caplog.records if variable in record.getMessage()]


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("CALPACA_MODLE", "Did you mean CALPACA_MODEL?"),
        ("CALPACA_PLUGIN", "Did you mean CALPACA_PLUGINS?"),
        ("CALPACA_MODELS", "Did you mean CALPACA_MODEL?"),
        ("CALPACA_CACHE_DIR", "Did you mean CALPACA_CACHE?"),
        ("CALPACA_TEMPERATURE", "Did you mean CALPACA_SAMPLING__TEMPERATURE?"),
        ("CALPACA_QQQQ", "`calpaca settings` lists the known ones."),
    ],
)
def test_a_variable_that_nothing_reads_is_named_once(variable, suggestion, monkeypatch, caplog) -> None:
    monkeypatch.setenv(variable, "1")
    assert warnings_about(variable, caplog) == [f"Nothing reads the environment variable {variable}. {suggestion}"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *((name, "1") for name in settings.VARIABLES if name != "CALPACA_CONFIG"),
        ("CALPACA_MODEL", "x"),
        ("calpaca_hub_timeout", "1"),
        ("CALPACA_SAMPLING", '{"top_k": 4}'),
        ("CALPACA_SAMPLING__TOP_K", "4"),
        ("CALPACA_PLUGINS__MINE__KEY", "1"),
        ("CALPACA_MODELS__A__MODEL", "x"),
        ("CALPACA_APPS__A__APP", "x"),
    ],
)
def test_variables_that_are_read_are_not_remarked(variable, value, monkeypatch, caplog) -> None:
    monkeypatch.setenv(variable, value)
    assert warnings_about("", caplog) == []


def test_every_variable_that_the_code_reads_is_described() -> None:
    root = Path(__file__).parents[1]
    code = "".join(
        file.read_text(encoding="utf-8") for folder in ("calpaca", "plugins") for file in (root / folder).rglob("*.py")
    )
    read = set(re.findall(r"""(?:environ(?:\.get)?[(\[]|getenv\(|secret_from_env\()"(CALPACA_[A-Z_]+)""", code))
    assert read == set(settings.VARIABLES)


def test_a_file_in_another_encoding_is_a_clear_error() -> None:
    Path("calpaca.toml").write_bytes('model = "模型"'.encode("gb18030"))
    with pytest.raises(UsageError, match="not valid TOML"):
        read_settings()


@pytest.mark.parametrize(
    ("variable", "function"),
    [("CALPACA_CACHE", paths.cache_dir), ("CALPACA_DATA", paths.data_dir), ("CALPACA_CONFIG", paths.config_dir)],
)
def test_each_folder_can_be_moved(variable, function, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "moved"))
    assert function() == tmp_path / "moved"
    monkeypatch.delenv(variable)
    assert "calpaca" in str(function())


def test_atomic_file_replaces_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_atomic_file_gives_the_usual_permissions(tmp_path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "file").stat().st_mode == usual.stat().st_mode


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert list(tmp_path.glob("*folder*")) == []
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "whole").touch()
    assert [each.name for each in (tmp_path / "folder").iterdir()] == ["whole"]


def test_atomic_folder_keeps_what_another_process_made_meanwhile(tmp_path) -> None:
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "ours").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").touch()
    assert [each.name for each in (tmp_path / "folder").iterdir()] == ["theirs"]
