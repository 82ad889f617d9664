"""Server-sent events (the WHATWG's format), read as the bytes come in."""

from __future__ import annotations

import re

from calpaca.core.errors import ModelError

LONGEST = 8 << 20
"""Bytes that one event may have."""

_LINE_END = re.compile(rb"\r\n|\r|\n")


class EventReader:
    """Gives the data of each event once it is whole. Comments, which keep a connection alive, give nothing.

    Lines end with LF, CR LF or CR; a byte order mark at the start and bytes that are no UTF-8 do no harm. An event that
    the stream's end cuts off is left out.
    """

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._line = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self._started = False

    def feed(self, received: bytes) -> list[str]:
        """The data of the events that end in `received`. Raises ModelError for an event that is too long."""
        if self._after_cr and received.startswith(b"\n"):  # the second half of a CR LF
            received = received[1:]
        if not received:
            return []
        self._after_cr = received.endswith(b"\r")
        first, *rest = _LINE_END.split(received)
        lines = [self._line + first, *rest]
        self._line = lines.pop()
        events = [event for line in lines if (event := self._end_line(line)) is not None]
        if len(self._line) + sum(map(len, self._data)) > self._longest:
            raise ModelError(
                f"The server sent an event of more than {self._longest >> 20} MB.", "Is it an OpenAI-compatible one?"
            )
        return events

    def _end_line(self, line: bytes) -> str | None:
        """Take a whole line; a blank one ends an event."""
        if not self._started:
            self._started = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        data, self._data = self._data, []
        return b"\n".join(data).decode(errors="replace") if data else None
