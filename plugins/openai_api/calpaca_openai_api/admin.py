"""Adapters loaded and unloaded while the server runs, by the paths and fields that vLLM has for it."""

from __future__ import annotations

from pydantic import Field

from calpaca.core.errors import ModelError, UsageError
from calpaca.core.spec import AdapterSpec
from calpaca_openai_api.bodies import Body
from calpaca_openai_api.faults import ApiError
from calpaca_openai_api.served import ServedModels

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS = frozenset({LOAD, UNLOAD})
"""Paths that want a key with the scope `admin`."""


class LoadAdapterBody(Body):
    """A request to load an adapter; `model` is the id of the model that it is put beside, by default the main one."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]{0,127}$")
    lora_path: str = Field(min_length=1)
    scale: float = 1.0
    model: str | None = None


class UnloadAdapterBody(Body):
    """A request to unload an adapter."""

    lora_name: str


def load_adapter(body: LoadAdapterBody, models: ServedModels) -> dict[str, object]:
    """Load, and describe what is served then. Takes long: not for an event loop. Raises ApiError."""
    try:
        models.add_adapter(body.lora_name, AdapterSpec(source=body.lora_path, scale=body.scale), body.model)
    except (ModelError, UsageError) as error:
        field = "lora_name" if isinstance(error, UsageError) else "lora_path"
        raise ApiError(400, str(error), param=field) from error  # with its hint, which is for who runs the server
    return models.describe(body.lora_name)


def unload_adapter(body: UnloadAdapterBody, models: ServedModels) -> dict[str, object]:
    """Unload; running requests end. Raises ApiError."""
    models.remove_adapter(body.lora_name)
    return {"id": body.lora_name, "object": "model", "deleted": True}
