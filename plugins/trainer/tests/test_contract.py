"""What every plugin must do."""

import pytest

from calpaca.testing import PluginContract


@pytest.mark.slow  # it starts processes that import all that the plugin offers
class TestPlugin(PluginContract):
    plugin = "trainer"
