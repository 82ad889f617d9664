"""The registry of components and the exception tree."""

from __future__ import annotations

import pytest

from calpaca.core import errors
from calpaca.core.errors import CalpacaError, MissingExtraError, PluginError, UsageError, nearest, unknown_name
from calpaca.core.registry import Component, Registry, load_target


def component(name: str, target: str = "json:dumps", extra: str | None = None) -> Component:
    return Component(name, f"Does {name}.", target, extra)


def test_a_component_is_imported_when_it_is_loaded() -> None:
    import json

    assert component("dumps").load() is json.dumps


def test_registry_gives_components_in_the_order_of_their_registration_and_names_sorted() -> None:
    registry: Registry[Component] = Registry("engine")
    for name in ("b", "a", "c"):
        registry.add(component(name), "plugin")
    assert [each.name for each in registry] == ["b", "a", "c"]
    assert registry.names() == ["a", "b", "c"]
    assert "a" in registry
    assert "d" not in registry
    assert registry.owner("a") == "plugin"


def test_two_owners_of_one_name_are_both_named() -> None:
    registry: Registry[Component] = Registry("engine")
    registry.add(component("fast"), "'one' (dist-one 1.0)")
    with pytest.raises(PluginError, match=r"'two' \(dist-two 2.0\).*engine 'fast'.*'one' \(dist-one 1.0\)"):
        registry.add(component("fast"), "'two' (dist-two 2.0)")
    assert registry.owner("fast") == "'one' (dist-one 1.0)"


def test_withdraw_takes_out_what_one_owner_offers() -> None:
    registry: Registry[Component] = Registry("engine")
    registry.add(component("a"), "one")
    registry.add(component("b"), "two")
    registry.withdraw("one")
    assert registry.names() == ["b"]
    registry.add(component("a"), "two")
    assert registry.owner("a") == "two"


def test_an_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    registry: Registry[Component] = Registry("engine")
    registry.add(component("transformers"), "builtin")
    registry.add(component("remote"), "builtin")
    with pytest.raises(UsageError) as caught:
        registry.get("transfomers")
    assert caught.value.message == "Unknown engine 'transfomers'."
    assert caught.value.hint == "Did you mean 'transformers'? Known: remote, transformers."


def test_a_missing_package_of_an_extra_names_the_install_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "needs_something.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError) as caught:
        component("store", "needs_something:open", extra="chroma").load()
    assert "package_that_is_not_there" in caught.value.message
    assert "pip install 'calpaca[chroma]'" in caught.value.hint


@pytest.mark.parametrize("target", ["no_such_module_here:x", "json:no_such_attribute", "json.nothing:x"])
def test_a_wrong_import_path_is_the_plugins_fault(target: str) -> None:
    with pytest.raises(PluginError, match=target):
        load_target(target, feature="'x'", extra="torch")


def test_every_error_has_a_message_a_hint_and_a_documented_exit_code() -> None:
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CalpacaError)]
    assert len(tree) > 10
    assert {kind.exit_code for kind in tree} == {1, 2, 3, 4}
    error = UsageError("It went wrong.", "Do this.")
    assert str(error) == "It went wrong. Do this."


def test_nearest_and_unknown_name() -> None:
    assert nearest("retrival_qa", ["retrieval_qa", "summarize"]) == "retrieval_qa"
    assert nearest("xyz", ["retrieval_qa"]) is None
    assert unknown_name("app", "xyz", []) == ("Unknown app 'xyz'.", "Known: none.")


def test_context_overflow_states_the_numbers_and_the_room() -> None:
    error = errors.ContextOverflowError(prompt_tokens=90, max_new_tokens=20, context_length=100)
    assert "90 tokens" in error.message
    assert "100" in error.message
    assert "--max-new-tokens 10" in error.hint
    assert "--max-new-tokens" not in errors.ContextOverflowError(120, 20, 100).hint
