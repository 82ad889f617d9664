"""`calpaca doctor`."""

from __future__ import annotations

import re

import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Engines are probed in processes that take seconds; what they say is tested with the core."""
    monkeypatch.setattr("calpaca.core.doctor.engine_state.probe", lambda engine, patience: ({"threads": "1"}, None))


def test_it_prints_every_part(calpaca, monkeypatch, project_file) -> None:
    project_file.write_text('[remote]\nendpoints = ["http://me:secret@gpu:8000/v1"]\n')
    monkeypatch.setenv("CALPACA_API_KEY", "sk-secret")
    outcome = calpaca("doctor")
    assert outcome.code == 0, outcome.err
    for heading in ("Machine", "Engines", "Libraries", "Folders", "Settings", "Environment"):
        assert f"\n{heading}\n" in outcome.out
    assert "remote" in outcome.out and "http://gpu:8000/v1" in outcome.out
    assert re.search(rf"{re.escape(str(project_file))} +read", outcome.out)
    assert "secret" not in outcome.out + outcome.err


def test_json_has_the_same(calpaca) -> None:
    found = calpaca("doctor", "--json").json
    assert {"machine", "engines", "libraries", "folders", "settings_files", "environment", "advice"} <= found.keys()
    assert found["machine"]["processor"]["usable_cores"] > 0
    assert {"transformers", "remote"} <= {engine["name"] for engine in found["engines"]}


def test_broken_settings_and_plugins_are_problems(calpaca, project_file, make_plugin) -> None:
    project_file.write_text("modle = 1\n")
    make_plugin("broken", "raise RuntimeError('no such library')")
    outcome = calpaca("doctor")
    assert outcome.code == 0
    assert "Problems" in outcome.out and "Unknown setting 'modle'" in outcome.out
    assert "no such library" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err
