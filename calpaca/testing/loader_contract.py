"""What every document loader must do, as a test class: subclass it, name the loader, and give it files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from langchain_core.documents import Document

from calpaca.core.errors import CalpacaError
from calpaca.documents.loaders import LoaderComponent

Load = Callable[[str, bytes], list[Document]]


class LoaderContract:
    """One contract for all loaders: they give documents with text, and a CalpacaError for what they cannot read."""

    loader: str
    """The loader's name."""
    files: Mapping[str, bytes]
    """Names and contents of files that it can read."""

    @pytest.fixture
    def described(self, calpaca_runtime: Callable[..., object]) -> LoaderComponent:
        component = calpaca_runtime([]).loaders.get(self.loader)  # type: ignore[attr-defined]
        assert isinstance(component, LoaderComponent)
        return component

    def test_it_names_the_endings_that_it_reads(self, described: LoaderComponent) -> None:
        assert described.suffixes
        for suffix in described.suffixes:
            assert suffix == suffix.lower()
            assert suffix.startswith(".")
        for name in self.files:
            assert name.lower().endswith(described.suffixes), f"{name} would be read by another loader"

    def test_it_gives_documents_with_text(self, calpaca_load: Load) -> None:
        for name, data in self.files.items():
            documents = calpaca_load(name, data)
            assert documents, f"nothing came of {name}"
            assert all(document.page_content.strip() for document in documents)

    def test_it_can_be_asked_twice(self, calpaca_load: Load) -> None:
        for name, data in self.files.items():
            first, second = calpaca_load(name, data), calpaca_load(name, data)
            assert [each.page_content for each in first] == [each.page_content for each in second]

    def test_the_file_is_left_as_it_was(self, calpaca_load: Load, calpaca_home: Path) -> None:
        for name, data in self.files.items():
            calpaca_load(name, data)
            assert (calpaca_home / name).read_bytes() == data

    @pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
    def test_a_damaged_file_is_read_or_a_clear_error(self, damage: str, calpaca_load: Load) -> None:
        for name, data in self.files.items():
            broken = {"empty": b"", "cut": data[: len(data) // 2], "noise": bytes(range(256)) * 8}[damage]
            try:
                calpaca_load(name, broken)
            except CalpacaError as error:
                assert error.message
                assert "\n" not in error.message
