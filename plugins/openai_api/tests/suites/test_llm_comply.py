"""llm-comply: OpenAI's formats as an independent suite reads them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("llm_comply", reason="llm-comply is not installed: make check-api")

IMAGE = "the model reads text only; an image is refused with a 400"
KNOWN_MISSES = {
    "openai-chat": {"chat-image-input": IMAGE},
    "open-responses": {"image-input": IMAGE},
}
LEAST = {"openai-chat": 9, "open-responses": 13}
"""Tests that each format has; of those for responses one is skipped, since it is for models that reason."""


@pytest.mark.parametrize("form", LEAST)
def test_llm_comply_finds_nothing_but_the_known_misses(target, form):
    command = [sys.executable, "-m", "llm_comply.cli", "--format", form, "--json"]
    command += ["--base-url", target.url, "--api-key", "none", "--model", target.model]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    found = json.loads(result.stdout)["results"]
    assert len(found) >= LEAST[form]
    missed = {each["id"]: each.get("errors") for each in found if each["status"] == "failed"}
    assert set(missed) == set(KNOWN_MISSES[form]), missed
