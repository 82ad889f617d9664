"""langchain-tests on CalpacaEmbeddings with a real model."""

import pytest
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from calpaca import CalpacaEmbeddings

MODEL = "multilingual-e5-small"


@pytest.fixture(scope="module", autouse=True)
def weights(e5):
    """Fetch the weights."""


class TestCalpacaEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self):
        return CalpacaEmbeddings

    @property
    def embedding_model_params(self):
        return {"model": MODEL}


class TestCalpacaEmbeddingsIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self):
        return CalpacaEmbeddings

    @property
    def embedding_model_params(self):
        return {"model": MODEL}
