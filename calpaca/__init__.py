"""calpaca turns local LLaMA-family weights into applications.

from calpaca import ChatCalpaca

llm = ChatCalpaca(model="smollm2-135m-instruct")
print(llm.invoke("What is a llama?").content)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "App": "calpaca.plugins.app",
    "CalpacaEmbeddings": "calpaca.core.langchain",
    "CalpacaError": "calpaca.core.errors",
    "CalpacaLLM": "calpaca.core.langchain",
    "ChatCalpaca": "calpaca.core.langchain",
    "ModelSpec": "calpaca.core.spec",
    "hookimpl": "calpaca.plugins.hookspecs",
    "runtime": "calpaca.plugins.wiring",
}

__all__ = [
    "App",
    "CalpacaEmbeddings",
    "CalpacaError",
    "CalpacaLLM",
    "ChatCalpaca",
    "ModelSpec",
    "__version__",
    "hookimpl",
    "runtime",
]

if TYPE_CHECKING:
    from calpaca.core.errors import CalpacaError
    from calpaca.core.langchain import CalpacaEmbeddings, CalpacaLLM, ChatCalpaca
    from calpaca.core.spec import ModelSpec
    from calpaca.plugins.app import App
    from calpaca.plugins.hookspecs import hookimpl
    from calpaca.plugins.wiring import runtime


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import calpaca` stays cheap."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'calpaca' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
