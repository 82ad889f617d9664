"""What every plugin and app must do."""

import pytest

from calpaca.testing import AppContract, PluginContract


@pytest.mark.slow  # it starts processes that import all that the plugin offers
class TestPlugin(PluginContract):
    plugin = "summarize"


class TestSummariesOfATextThatIsGiven(AppContract):
    app = "summarize"
    input = "The keeper rang twice. Nobody came."


class TestSummariesOfDocuments(AppContract):
    app = "summarize"
    input = ""

    @pytest.fixture
    def options(self, tmp_path):
        file = tmp_path / "note.txt"
        file.write_text("The keeper rang twice. Nobody came.")
        return {"files": [file]}
