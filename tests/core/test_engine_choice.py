"""Which engine `auto` means, and measuring them for it."""

import json
from dataclasses import replace

import pytest

import calpaca
from calpaca.core.engine_choice import (
    DEFAULT,
    Measurement,
    choose_engine,
    model_key,
    read_measurements,
    record_measurements,
)
from calpaca.core.engine_plot import plot_throughput
from calpaca.core.files import ModelFiles
from calpaca.core.paths import data_dir
from calpaca.core.registry import Component
from calpaca.core.spec import ModelSpec

CHATTY = Measurement("transformers", {1: 60.0, 8: 100.0}, first_token=0.1, load=1.0, memory=10**9)
BUSY = Measurement("busy", {1: 50.0, 8: 300.0, 32: 900.0})


@pytest.fixture
def runtime(own_places):
    with calpaca.runtime() as runtime:
        runtime.engines.add(Component("busy", "A fast one.", "json:loads", packages=("json",)), "a test")
        runtime.engines.add(Component("absent", "Not here.", "json:loads", packages=("no_such_package",)), "a test")
        yield runtime
        runtime.purpose = "chat"
        runtime.engines.withdraw("a test")


def test_what_was_measured_is_read_back(own_places):
    record_measurements("model", [CHATTY])
    record_measurements("model", [BUSY])
    assert read_measurements("model") == [CHATTY, BUSY]
    assert read_measurements("another model") == []


def test_a_new_measurement_replaces_the_old_one(own_places):
    record_measurements("model", [CHATTY, BUSY])
    record_measurements("model", [Measurement("busy", {1: 1.0})])
    assert {each.engine: each.speed("chat") for each in read_measurements("model")} == {
        "transformers": 60.0,
        "busy": 1.0,
    }


@pytest.fixture
def model(tmp_path):
    """Files of a model; what is in them does not matter here."""
    (tmp_path / "config.json").write_text("{}")
    return ModelFiles("model", ModelSpec(), tmp_path, (), tmp_path, None)


def with_spec(model, **changes):
    return replace(model, spec=ModelSpec(**changes))


def test_one_stream_and_load_may_choose_different_engines(runtime, model):
    record_measurements(model_key(model), [CHATTY, BUSY])
    assert choose_engine(model, runtime) == "transformers"
    assert choose_engine(model, runtime, "load") == "busy"
    runtime.purpose = "load"
    assert choose_engine(model, runtime) == "busy"


def test_without_a_measurement_of_this_model_the_exact_engine_runs_it(runtime, model):
    record_measurements("another model", [BUSY])
    assert choose_engine(model, runtime) == DEFAULT == "transformers"


def test_a_measurement_holds_for_the_dtype_it_was_made_with(runtime, model):
    record_measurements(model_key(model), [BUSY])
    assert choose_engine(model, runtime) == "busy"
    assert choose_engine(with_spec(model, dtype="float16"), runtime) == DEFAULT


@pytest.mark.parametrize("asked", [{"device": "cuda:0"}, {"quantization": "8bit"}, {"trust_remote_code": True}])
def test_what_only_the_default_engine_does_is_left_to_it(runtime, model, asked):
    record_measurements(model_key(model), [BUSY])
    assert choose_engine(with_spec(model, **asked), runtime) == DEFAULT


def test_an_engine_that_failed_or_is_no_longer_installed_is_not_chosen(runtime, model):
    failed = Measurement("busy", error="it crashed")
    record_measurements(model_key(model), [CHATTY, failed, Measurement("absent", {1: 999.0})])
    assert choose_engine(model, runtime) == "transformers"


def test_quantized_weights_are_not_chosen_for_their_speed(runtime, model):
    quantized = Measurement("busy", {1: 999.0}, details={"weights": "Q4_1"})
    record_measurements(model_key(model), [CHATTY, quantized])
    assert choose_engine(model, runtime) == "transformers"


def test_a_file_that_was_given_quantized_may_be_run_as_it_is(runtime, smollm2_gguf, smollm2):
    given = ModelFiles("model", ModelSpec(model=str(smollm2_gguf)), smollm2, (), smollm2, None)
    for weights, chosen in (("Q4_1", "busy"), ("Q4_0", "transformers")):
        record_measurements(
            model_key(given), [CHATTY, replace(BUSY, tokens_per_second={1: 999.0}, details={"weights": weights})]
        )
        assert choose_engine(given, runtime) == chosen


def test_a_damaged_file_counts_as_nothing_measured(runtime, model):
    record_measurements(model_key(model), [BUSY])
    (data_dir() / "engines.json").write_text("{")
    assert choose_engine(model, runtime) == DEFAULT
    record_measurements(model_key(model), [BUSY])
    assert choose_engine(model, runtime) == "busy"


def test_throughput_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'calpaca[plot]'")
    plot_throughput([CHATTY, BUSY, Measurement("broken", error="it crashed")], tmp_path / "plot.png", "a model")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_measuring_the_transformers_engine_lets_auto_take_it(smollm2, own_places, tmp_path, capsys):
    from calpaca.cli.main import main

    arguments = ["bench", "engines", "--model", str(smollm2), "--engine", "transformers", "--streams", "1", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    (measured,) = printed["engines"]
    assert printed["auto"] == {"chat": "transformers", "load": "transformers"}
    assert measured["error"] is None
    assert measured["tokens_per_second"]["1"] > 0
    assert measured["first_token"] > 0
    assert measured["memory"] > 100_000_000


def test_an_engine_that_cannot_load_the_model_is_told(own_places, tmp_path):
    from calpaca.core.engine_bench import measure

    measured = measure("transformers", ModelSpec(model=str(tmp_path)), [1])
    assert measured.error is not None
    assert str(tmp_path) in measured.error
