from pathlib import Path

import pytest

from calpaca.core.errors import DocumentError
from calpaca.documents.loaders import find_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.md", "b.txt", "draft.md", "build/x.md", "deep/draft.md", "deep/more/c.md", "deep/more/d.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("Some words.")
    return tmp_path


@pytest.fixture
def names(runtime, tree):
    """`names(path)` are the files found there, from `tree` on."""
    return lambda *paths: [path.relative_to(tree.resolve()).as_posix() for path in find_files(paths, runtime.loaders)]


def test_ignore_files_hold_below_their_folder_and_the_nearest_decides(tree, names) -> None:
    (tree / ".gitignore").write_text("# made by the build\nbuild/\ndraft.md\n*.log\n")
    (tree / "deep" / ".calpacaignore").write_text("!draft.md\n/more/c.md\n")
    assert names(tree) == ["a.md", "b.txt", "deep/draft.md"]


def test_a_rule_for_one_folder_leaves_others_alone(tree, names) -> None:
    (tree / "deep" / ".gitignore").write_text("draft.md\n")
    assert "draft.md" in names(tree) and "deep/draft.md" not in names(tree)


def test_what_rules_leave_out_is_said(tree, make_index, sync, notices) -> None:
    (tree / ".gitignore").write_text("build/\ndraft.md\n")
    assert [line for line in notices(sync(make_index(tree))) if "left out: 3." in line]


def test_a_file_named_itself_is_read_whatever_rules_say(tree, names) -> None:
    (tree / ".gitignore").write_text("*")
    assert names(tree / "a.md") == ["a.md"]


def test_patterns_find_files(tree, names) -> None:
    assert names(tree / "*.md") == ["a.md", "draft.md"]
    assert names(tree / "**/d*.md") == ["deep/draft.md", "draft.md"]
    assert names(tree / "dee[p]/draft.md", tree / "a.md") == ["a.md", "deep/draft.md"]


def test_a_pattern_that_fits_nothing_is_an_error(tree, names) -> None:
    with pytest.raises(DocumentError, match="No file fits the pattern"):
        names(tree / "*.pdf")


def test_files_that_failed_are_listed_with_their_reason_until_they_are_mended(tree, make_index, sync) -> None:
    (tree / "bad.json").write_text("{")
    index = make_index(tree)
    sync(index)
    assert {path.name: "is no JSON" in error.message for path, error in index.failed.items()} == {"bad.json": True}
    (tree / "bad.json").unlink()
    sync(index)
    assert index.failed == {}
