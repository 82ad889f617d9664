"""What is typed after a slash."""

import pytest

from calpaca.core.errors import UsageError
from calpaca.tui.commands import COMMANDS, Command, help_text, matching, parse

APPS = {"summarize": Command(lambda _chat, _rest: None, "Summarize documents.", "[TEXT]")}


def test_a_command_comes_with_the_rest_of_its_line():
    command, rest = parse("/export  talk.md ", APPS)
    assert (command, rest) == (COMMANDS["export"], "talk.md")
    assert parse("/summarize", APPS) == (APPS["summarize"], "")


@pytest.mark.parametrize("text", ["hello", "a /new idea", "//new"])
def test_other_texts_are_no_commands(text: str):
    assert parse(text, APPS) is None


@pytest.mark.parametrize(("text", "said"), [("/exprot x", "Did you mean 'export'"), ("/export", "/export FILE")])
def test_a_wrong_command_says_what_to_type(text: str, said: str):
    with pytest.raises(UsageError, match=said):
        parse(text, APPS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_help(name: str):
    assert f"`/{name}" in help_text(APPS)
    assert "`/summarize [TEXT]`" in help_text(APPS)


def test_a_name_that_is_begun_is_completed_from_commands_and_apps():
    assert list(matching("/s", APPS)) == ["sessions", "system", "set", "sources", "stop", "summarize"]
    assert matching("/set temperature", APPS) == matching("//s", APPS) == matching("hello", APPS) == {}
