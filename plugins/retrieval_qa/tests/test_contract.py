"""What every plugin and app must do."""

import pytest

from calpaca.testing import AppContract, PluginContract


@pytest.mark.slow  # it starts processes that import all that the plugin offers
class TestPlugin(PluginContract):
    plugin = "retrieval_qa"


class Documents:
    @pytest.fixture
    def options(self, tmp_path):
        file = tmp_path / "handbook.md"
        file.write_text("# Keys\n\nThe key of the archive is kept by Mrs Abendroth.\n")
        return {"files": [file]}


class TestAnswers(Documents, AppContract):
    app = "retrieval_qa"
    input = "Who keeps the key of the archive?"
    answers = ("Mrs Abendroth keeps it.",)


class TestIndexing(Documents, AppContract):
    app = "retrieval_index"
