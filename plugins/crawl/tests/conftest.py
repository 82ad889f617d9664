"""The site of traps, for several files of tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def trap_site_module() -> ModuleType:
    """trap_site.py, which tests cannot import by name."""
    spec = importlib.util.spec_from_file_location("trap_site", Path(__file__).with_name("trap_site.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trap_site(trap_site_module: ModuleType) -> Callable:
    """`with trap_site(links) as site`: a website on this machine; see trap_site.py."""
    return trap_site_module.trap_site
