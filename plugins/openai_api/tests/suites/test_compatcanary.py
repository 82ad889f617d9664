"""CompatCanary, a scanner for Node.js: its score of 100 is full marks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from calpaca.core.paths import cache_dir

PINS = Path(__file__).parent / "compatcanary"
SCORES = {"chat": 100, "modern": 100}
"""The score that each profile must reach."""


@pytest.fixture(scope="session")
def compatcanary() -> list[str]:
    """The command. npm checks the package against the digest in `package-lock.json`; it lies in the cache then."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        assert "CI" not in os.environ, "CI runs this suite: install Node.js 20 or newer"
        pytest.skip("Node.js 20 or newer is not installed")
    folder = cache_dir() / "test-assets" / "compatcanary-0.2.2"
    script = folder / "node_modules/compatcanary/src/cli.js"
    if not script.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(PINS / name, folder)
        subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=120)
    return [node, str(script)]


@pytest.mark.parametrize("profile", SCORES)
def test_compatcanary_gives_full_marks(compatcanary, target, profile):
    command = [*compatcanary, "scan", "--base-url", target.url, "--model", target.model, "--profile", profile]
    result = subprocess.run([*command, "--format", "json"], check=False, capture_output=True, text=True, timeout=120)
    report = json.loads(result.stdout)
    assert report["score"] == SCORES[profile], report
    assert report["compatible"] is True
