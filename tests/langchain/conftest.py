"""Callbacks that count."""

import pytest
from langchain_core.callbacks import BaseCallbackHandler


class Recorder(BaseCallbackHandler):
    """Keeps what it is told: the name of each event, and the tokens."""

    def __init__(self):
        self.events = []
        self.tokens = []
        self.results = []

    def on_llm_start(self, *_, **__):
        self.events.append("start")

    def on_chat_model_start(self, *_, **__):
        self.events.append("start")

    def on_llm_new_token(self, token, **_):
        self.tokens.append(token)

    def on_llm_end(self, result, **_):
        self.events.append("end")
        self.results.append(result)

    def on_llm_error(self, error, **_):
        self.events.append(type(error).__name__)


@pytest.fixture
def recorder():
    return Recorder()
