"""What is typed after a slash."""

import pytest

from calpaca.core.errors import UsageError
from calpaca.tui.app import ChatApp
from calpaca.tui.commands import COMMANDS, help_text, parse


def test_a_command_comes_with_the_rest_of_its_line():
    command, rest = parse("/export  talk.md ")
    assert (command.action, rest) == ("export", "talk.md")


@pytest.mark.parametrize("text", ["hello", "a /new idea", "//new"])
def test_other_texts_are_no_commands(text: str):
    assert parse(text) is None


@pytest.mark.parametrize(("text", "said"), [("/exprot x", "Did you mean 'export'"), ("/export", "/export FILE")])
def test_a_wrong_command_says_what_to_type(text: str, said: str):
    with pytest.raises(UsageError, match=said):
        parse(text)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_help_and_does_something(name: str):
    assert f"`/{name}" in help_text()
    assert callable(getattr(ChatApp, f"action_{COMMANDS[name].action}"))
