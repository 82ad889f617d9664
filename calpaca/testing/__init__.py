"""The test kit for authors of plugins. It needs pytest, which finds its fixtures by itself (`calpaca.pytest_plugin`).

    from calpaca.testing import AppContract, PluginContract

    class TestPlugin(PluginContract):
        plugin = "haiku"

    class TestHaiku(AppContract):
        app = "haiku"

Contracts are test classes to inherit: what every plugin, app, engine, document loader and vector store must do.
"""

from calpaca.plugins.engine_contract import EngineContract
from calpaca.plugins.testing import FakeEmbedder, FakeEngine, FakeRuntime, fake_model, fake_runtime
from calpaca.testing.app_contract import AppContract
from calpaca.testing.loader_contract import LoaderContract
from calpaca.testing.plugin_contract import PluginContract
from calpaca.testing.store_contract import StoreContract

__all__ = [
    "AppContract",
    "EngineContract",
    "FakeEmbedder",
    "FakeEngine",
    "FakeRuntime",
    "LoaderContract",
    "PluginContract",
    "StoreContract",
    "fake_model",
    "fake_runtime",
]
