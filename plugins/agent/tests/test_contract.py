"""What every plugin must do."""

from calpaca.testing import PluginContract


class TestPlugin(PluginContract):
    plugin = "agent"
