"""Every screen as it is drawn, in two sizes and two themes. `pytest --snapshot-update` takes a wanted change over."""

import importlib.util
import sys
from pathlib import Path

import pytest
from syrupy.extensions.image import SVGImageSnapshotExtension

FILE = Path(__file__).parents[2] / "docs" / "screenshots.py"
_spec = importlib.util.spec_from_file_location("screenshots", FILE)
screenshots = importlib.util.module_from_spec(_spec)
sys.modules["screenshots"] = screenshots
_spec.loader.exec_module(screenshots)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("theme", screenshots.THEMES)
@pytest.mark.parametrize("size", screenshots.SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("scene", screenshots.SCENES)
async def test_a_screen_is_drawn_as_before(scene, size, theme, tmp_path, monkeypatch, snapshot):
    for name in ("DATA", "CONFIG", "CACHE"):
        monkeypatch.setenv(f"CALPACA_{name}", str(tmp_path / name))
    drawn = await screenshots.capture(scene, size, theme, tmp_path / "DATA")
    assert drawn == snapshot(extension_class=SVGImageSnapshotExtension)
