"""langchain-tests on ChatCalpaca with a real model.

The model is a very small one: the test that wants it to decide by itself to call a tool is the only one that fails.
"""

import json
import shutil
from contextlib import chdir
from importlib import import_module

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from safetensors.torch import load_file, save_file

from calpaca import ChatCalpaca, runtime

MODEL = "smollm2-135m-instruct"
OTHER = "smollm2-of-28-layers"
SMALL = "needs a more capable model than one of 135 million parameters"

# test_stream_time asks for the fixture and uses it only with recorded HTTP traffic.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


@pytest.fixture(scope="module", autouse=True)
def weights(smollm2, tmp_path_factory):
    """Fetch the weights, lay a second model of other weights into the current folder, and free both at the end."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(smollm2, root / OTHER, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = json.loads((smollm2 / "config.json").read_text())
    (root / OTHER / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 28}))
    cut = ("model.layers.28.", "model.layers.29.")
    kept = {name: value for name, value in load_file(smollm2 / "model.safetensors").items() if not name.startswith(cut)}
    save_file(kept, root / OTHER / "model.safetensors", {"format": "pt"})
    with chdir(root):
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
        return OTHER

    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    @pytest.mark.xfail(reason=SMALL, raises=AssertionError, strict=True)
    def test_agent_loop(self, model):
        super().test_agent_loop(model)


def test_a_model_named_in_a_call_answers_with_its_own_weights():
    own, other = (ChatCalpaca(model=name, max_tokens=8) for name in (MODEL, OTHER))
    question = "What is a llama?"
    answers = [own.invoke(question), own.invoke(question, model=OTHER), other.invoke(question), own.invoke(question)]
    assert [answer.response_metadata["model_name"] for answer in answers] == [MODEL, OTHER, OTHER, MODEL]
    texts = [answer.content for answer in answers]
    assert texts[1] == texts[2] != texts[0] == texts[3]
    assert len({answer.response_metadata["system_fingerprint"] for answer in answers}) == 2
