"""ModelSpec: everything that names a model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator


class AdapterSpec(BaseModel):
    """A LoRA adapter: a folder or id, and how strongly it is applied (1.0 as trained)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    scale: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Read `path` or `path@0.5`."""
        if not isinstance(value, str):
            return value
        source, at, scale = value.rpartition("@")
        try:
            return {"source": source, "scale": float(scale)} if at else {"source": value}
        except ValueError:
            return {"source": value}

    def __str__(self) -> str:
        return self.source if self.scale == 1.0 else f"{self.source}@{self.scale:g}"


class ModelSpec(BaseModel):
    """A model by name: where it comes from, what is put on it and how it is run.

    `model` is a catalogue name, hub id, folder or `.gguf` file, or a server's model: a name for the engine `remote`, or
    `http://host:8000/v1#name`; None is the default of the catalogue. Adapters are applied in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    adapters: tuple[AdapterSpec, ...] = ()
    tokenizer: str | None = Field(None, description="Folder or id of another tokenizer.")
    chat_template: str | None = Field(None, description="Name of a built-in template, or a Jinja file.")
    engine: str = Field("auto", description="Engine that runs it, or auto.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 or cuda:0,1.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")
    quantization: str | None = Field(None, description="8bit or 4bit, on CUDA.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    api_key: SecretStr | None = Field(
        None, exclude=True, repr=False, description="Key for the server that runs it, where there is one."
    )

    def __str__(self) -> str:
        return " + ".join([self.model or "default", *(str(adapter) for adapter in self.adapters)])


def is_address(reference: str | None) -> bool:
    """Whether a model is named by the address of the server that runs it."""
    return reference is not None and reference.startswith(("http://", "https://"))
