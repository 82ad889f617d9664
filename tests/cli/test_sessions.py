"""`calpaca sessions` on conversations of the chat; those about documents are in the plugin's tests."""

from __future__ import annotations

import pytest

from calpaca.core.paths import data_dir
from calpaca.core.sessions import Sessions


@pytest.fixture
def weather(calpaca_home) -> str:
    """The id of a conversation."""
    session = Sessions(data_dir() / "sessions.sqlite").new({}, "weather")
    session.extend([("user", "Will it rain?", {}), ("assistant", "明天下雨。", {"model": "small"})])
    return session.id


def test_conversations_are_listed_found_shown_and_removed(calpaca, weather: str) -> None:
    assert [line.split()[:3] for line in calpaca("sessions", "list").out.splitlines()[1:]] == [[weather, "chat", "2"]]
    assert "明天下雨。" in calpaca("sessions", "search", "下雨").out
    (found,) = calpaca("sessions", "search", "rain", "--json").json
    assert (found["session"]["title"], found["content"]) == ("weather", "Will it rain?")
    assert calpaca("sessions", "show", weather[:4]).out.startswith("# weather\n\n## Question\n\nWill it rain?\n")
    assert calpaca("sessions", "show", "weather", "--json").json["messages"][1]["metadata"] == {"model": "small"}
    assert calpaca("sessions", "remove", "weather").code == 0
    assert calpaca("sessions", "list").err == "No sessions yet.\n"


def test_what_is_not_there_is_said(calpaca, weather: str) -> None:
    outcome = calpaca("sessions", "show", "wether")
    assert outcome.code == 1
    assert "Did you mean 'weather'?" in outcome.err
    assert calpaca("sessions", "search", "snow").err == "Nothing found.\n"
