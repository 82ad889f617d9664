"""Shared options, and reading an app's options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from calpaca.core.engine import Sampling
from calpaca.core.errors import UsageError
from calpaca.core.settings import SamplingSettings, Settings
from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions, flag_name, read_options


class Options(ModelOptions, SamplingOptions):
    files: Annotated[list[Path], Flag("file")] = Field([], description="Files.")
    question: str


def test_model_options_name_a_model() -> None:
    options = ModelOptions(model="base", adapters=["one", "two@0.5"], device="cpu", dtype="float32", revision="main")
    spec = options.spec()
    assert str(spec) == "base + one + two@0.5"
    assert (spec.device, spec.dtype, spec.revision, spec.engine) == ("cpu", "float32", "main", "auto")


def test_every_field_of_a_model_spec_is_a_shared_option() -> None:
    from calpaca.core.spec import ModelSpec

    assert set(ModelSpec.model_fields) - set(ModelOptions.model_fields) == {"api_key"}  # no key on a command line


def test_sampling_options_override_the_settings_one_by_one() -> None:
    settings = Settings(sampling=SamplingSettings(temperature=0.7, top_k=5, stop=("###",)))
    assert SamplingOptions().sampling(settings) == Sampling(temperature=0.7, top_k=5, stop=("###",))
    given = SamplingOptions(temperature=0.0, stop=[], seed=1).sampling(settings)
    assert given == Sampling(temperature=0.0, top_k=5, seed=1)


def test_every_sampling_setting_is_a_shared_option() -> None:
    assert set(SamplingOptions.model_fields) == set(SamplingSettings.model_fields)


def test_a_sampling_value_out_of_range_is_wrong_use() -> None:
    with pytest.raises(UsageError, match=r"top_p is 2\.0"):
        SamplingOptions(top_p=2.0).sampling(Settings())


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"question": "?", "qestion": "x"}, "Unknown option of retrieval_qa: 'qestion'.", "Did you mean 'question'?"),
        ({}, "retrieval_qa needs the option --question.", "calpaca run retrieval_qa --help"),
        ({"question": "?", "top_k": "many"}, "Option --top-k is 'many'", "calpaca run retrieval_qa --help"),
        ({"question": "?", "files": 7}, "Option --file is 7", "calpaca run retrieval_qa --help"),
    ],
)
def test_wrong_options_are_one_clear_error(values, message, hint) -> None:
    with pytest.raises(UsageError) as caught:
        read_options(Options, values, "retrieval_qa")
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_flag_names() -> None:
    assert flag_name(Options, "files") == "file"
    assert flag_name(Options, "max_new_tokens") == "max-new-tokens"
    assert flag_name(BaseModel, "anything") == "anything"
