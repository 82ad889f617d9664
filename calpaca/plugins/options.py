"""The options that every app shares, and how an app's options model becomes flags.

An app that runs a model inherits its `Options` from these two; then its flags, its section in the settings and its
JSON schema carry the shared options under the names they have everywhere:

    class Options(ModelOptions, SamplingOptions):
        files: Annotated[list[Path], Flag("file")] = Field([], description="A document or folder; repeat for several.")
        question: str | None = Field(None, description="What to ask.")

A field's type is one of str, int, float, bool, Path, an Enum, a Literal, a list or tuple of one of these, or one of
them `| None`. Its description is the flag's help.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from calpaca.core.engine import Sampling
from calpaca.core.errors import UsageError, unknown_name
from calpaca.core.settings import Settings
from calpaca.core.spec import AdapterSpec, ModelSpec


@dataclass(frozen=True)
class Flag:
    """Another name for a field on the command line: a list called `files` reads better as a repeated `--file`."""

    name: str


@dataclass(frozen=True)
class OwnersOnly:
    """Marks an option that a server's clients may not set, as files and models are: `Annotated[str, OwnersOnly()]`."""


class ModelOptions(BaseModel):
    """Which model an app runs, and how. What is left out comes from the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="Catalogue name, hub id, folder, .gguf file or name from the settings.")
    adapters: Annotated[list[str], Flag("adapter")] = Field(
        [], description="LoRA adapter to put on the model; repeat for several, in order. PATH@0.5 halves its strength."
    )
    tokenizer: str | None = Field(None, description="Folder or id of another tokenizer.")
    chat_template: str | None = Field(None, description="Name of a built-in chat template, or a Jinja file.")
    embedding: str | None = Field(None, description="Embedding model: name, id or sentence-transformers folder.")
    engine: str = Field("auto", description="Engine that runs the model.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 or cuda:0,1.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Type of the weights.")
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="Load the weights smaller; needs CUDA.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    def spec(self) -> ModelSpec:
        """The model these options name, without its embedding model."""
        shared = {name: getattr(self, name) for name in ModelSpec.model_fields if name not in {"adapters", "api_key"}}
        return ModelSpec(**shared, adapters=tuple(AdapterSpec.model_validate(adapter) for adapter in self.adapters))


class SamplingOptions(BaseModel):
    """How tokens are chosen. What is left out comes from the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int | None = Field(None, description="Longest answer in tokens.")
    temperature: float | None = Field(None, description="0 always takes the likeliest token.")
    top_p: float | None = Field(None, description="Keep the likeliest tokens that together reach this probability.")
    top_k: int | None = Field(None, description="Keep this many of the likeliest tokens; 0 keeps all.")
    repetition_penalty: float | None = Field(None, description="Above 1 makes tokens that occurred less likely.")
    seed: int | None = Field(None, description="Makes sampling repeatable.")
    stop: list[str] | None = Field(None, description="Text that ends an answer; repeat for several.")

    def sampling(self, settings: Settings) -> Sampling:
        """These options over the defaults of the settings. Raises UsageError for a value out of range."""
        given = {name: getattr(self, name) for name in SamplingOptions.model_fields}
        values = settings.sampling.model_dump() | {name: value for name, value in given.items() if value is not None}
        return Sampling(**{**values, "stop": tuple(values["stop"])})


SHARED = (ModelOptions, SamplingOptions)


def read_options(model: type[BaseModel], values: Mapping[str, Any], where: str) -> BaseModel:
    """Validate an app's options. Raises UsageError that names the option, `where` it was given, and the nearest name."""
    for name in values:
        if name not in model.model_fields:
            raise UsageError(*unknown_name(f"option of {where}:", name, model.model_fields))
    try:
        return model(**values)
    except ValidationError as error:
        raise UsageError(_fault(model, error.errors()[0], where), f"See: calpaca run {where} --help") from error


def _fault(model: type[BaseModel], error: ErrorDetails, where: str) -> str:
    if not error["loc"]:
        return f"{where}: {error['msg']}."
    flag = flag_name(model, str(error["loc"][0]))
    if error["type"] == "missing":
        return f"{where} needs the option --{flag}."
    return f"Option --{flag} is {error['input']!r}: {error['msg']}."


def value_type(annotation: Any) -> tuple[Any, bool]:
    """The type of one value of a field, and whether it holds several."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value_type(arguments[0])
    if origin in {Union, types.UnionType}:
        inner = [argument for argument in arguments if argument is not type(None)]
        return value_type(inner[0]) if len(inner) == 1 else (annotation, False)
    if origin is list or (origin is tuple and arguments[1:] == (Ellipsis,)):
        kind, nested = value_type(arguments[0])
        return (annotation if nested or kind is bool else kind), True
    return annotation, False


def owner_of(model: type[BaseModel], field: str) -> type[BaseModel]:
    """The class in whose body a field stands: one of `SHARED` for a shared option."""
    return next((owner for owner in model.__mro__ if field in inspect.get_annotations(owner)), model)  # type: ignore[return-value]


def flag_name(model: type[BaseModel], field: str) -> str:
    """The name of a field's flag, without the dashes in front."""
    info = model.model_fields.get(field)
    marks = [mark for mark in info.metadata if isinstance(mark, Flag)] if info is not None else []
    return marks[0].name if marks else field.replace("_", "-")
