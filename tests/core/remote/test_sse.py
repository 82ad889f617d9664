"""Server-sent events in every shape that servers give them."""

from __future__ import annotations

import pytest

from calpaca.core.engines.remote.sse import EventReader
from calpaca.core.errors import ModelError

STREAM = (
    b"\xef\xbb\xbf: a comment\n"
    b"event: message\nid: 7\nretry: 10\ndata: one\n\n"
    b": keep-alive\n\n\n"
    b"data:two\ndata: lines\n\n" + 'data: {"text": "é 🦙 \u2028 \x85 line"}\n\n'.encode() + b"data\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = ["one", "two\nlines", '{"text": "é 🦙 \u2028 \x85 line"}', "[DONE]"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_out_whole_however_the_bytes_are_cut(end: bytes, size: int) -> None:
    stream = STREAM.replace(b"\n", end)
    reader = EventReader()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert [event for piece in pieces for event in reader.feed(piece) if event] == EVENTS


def test_an_event_is_given_as_soon_as_its_blank_line_is_there() -> None:
    reader = EventReader()
    assert reader.feed(b"data: a\r\n\r") == ["a"]
    assert reader.feed(b"\ndata: b\r\n\r\n") == ["b"]


def test_bytes_that_are_no_utf_8_are_replaced() -> None:
    assert EventReader().feed(b"data: caf\xe9 \xff\n\n") == ["caf\ufffd \ufffd"]


def test_an_event_that_the_end_cuts_off_is_left_out() -> None:
    assert EventReader().feed(b"data: whole\n\ndata: ha") == ["whole"]


@pytest.mark.parametrize("received", [b"data: " + b"x" * 2000, b"data: xxxxxxxxx\n" * 200])
def test_an_event_without_end_is_refused(received: bytes) -> None:
    with pytest.raises(ModelError, match="an event of more than"):
        EventReader(longest=1000).feed(received)
