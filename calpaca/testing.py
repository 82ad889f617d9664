"""The test kit for plugin and engine authors. It needs pytest."""

from calpaca.plugins.engine_contract import EngineContract
from calpaca.plugins.testing import FakeEmbedder, FakeEngine, FakeRuntime, fake_model, fake_runtime

__all__ = ["EngineContract", "FakeEmbedder", "FakeEngine", "FakeRuntime", "fake_model", "fake_runtime"]
