"""llm-comply: OpenAI's chat format as an independent suite reads it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("llm_comply", reason="llm-comply is not installed: make check-api")

KNOWN_MISSES = {
    "chat-image-input": "the model reads text only; an image is refused with a 400",
}


def test_llm_comply_finds_nothing_but_the_known_misses(target):
    command = [sys.executable, "-m", "llm_comply.cli", "--format", "openai-chat", "--json"]
    command += ["--base-url", target.url, "--api-key", "none", "--model", target.model]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    found = json.loads(result.stdout)["results"]
    assert len(found) >= 9
    missed = {each["id"]: each.get("errors") for each in found if each["status"] == "failed"}
    assert set(missed) == set(KNOWN_MISSES), missed
