"""STOMP 1.2 frames: an incremental parser that is bounded in every dimension, and the encoder.

Source: https://stomp.github.io/stomp-specification-1.2.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from common.errors import ProtocolError
from host_agent.broker.limits import FrameLimits

_END_OF_LINES = re.compile(rb"[\r\n]*")
_ESCAPED = re.compile(r"\\(.?)", re.DOTALL)
_TO_ESCAPE = re.compile(r"[\\\r\n:]")
_ESCAPES = {"\\": "\\\\", "\r": "\\r", "\n": "\\n", ":": "\\c"}
_UNESCAPES = {"\\": "\\", "r": "\r", "n": "\n", "c": ":"}
_UNESCAPED_COMMANDS = ("CONNECT", "CONNECTED")
"""These two keep the rules of STOMP 1.0, because they are exchanged before a version is agreed."""

_MOST_LENGTH_DIGITS = 12


class FrameError(ProtocolError):
    """Bytes that are not a frame, or a frame over a limit; the stream cannot be read any further."""


class Frame(NamedTuple):
    """One frame, header escapes resolved. A tuple because one is made for every frame received."""

    command: str
    headers: dict[str, str]
    body: bytes = b""
    plain: bool = False
    """No header needs an escape when it is sent on, so the encoder need not look."""


class FrameParser:
    """Turns byte segments of any size into frames, with work linear in the bytes received.

    `feed()` takes a segment, `next_frame()` gives one frame or None when more bytes are needed.
    After a FrameError the parser is not usable any more.
    """

    __slots__ = ("_body", "_body_length", "_buffer", "_head", "_limits", "_position", "body_bytes")

    def __init__(self, limits: FrameLimits) -> None:
        self._limits = limits
        self.body_bytes = limits.body_bytes
        """The body limit in force; smaller than the configured one until a client has logged in."""
        self._buffer = b""
        self._position = 0
        # A body that has not arrived whole is collected in a bytearray: a list of segments would
        # cost a client that sends two bytes at a time dozens of our bytes for each of its own.
        self._head: tuple[str, dict[str, str], bool] | None = None
        self._body = bytearray()
        self._body_length = -1

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        position = self._position
        if position < len(self._buffer):
            self._buffer = self._buffer[position:] + data
        else:
            self._buffer = data
        self._position = 0

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._head is not None or self._position < len(self._buffer)

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None; raises FrameError."""
        if self._head is not None:
            return self._continue_body(*self._head)
        buffer = self._buffer
        position = self._position
        size = len(buffer)
        if position < size and buffer[position] <= 13:
            found = _END_OF_LINES.match(buffer, position)
            position = found.end() if found else position
        if position >= size:
            self._buffer = b""
            self._position = 0
            return None
        self._position = position
        limit = position + self._limits.header_bytes + 3
        end = buffer.find(b"\n\n", position, limit)
        crlf_end = buffer.find(b"\n\r\n", position, limit if end < 0 else end + 1)
        if crlf_end >= 0:
            head = buffer[position:crlf_end]
            body_start = crlf_end + 3
        elif end >= 0:
            head = buffer[position:end]
            body_start = end + 2
        else:
            self._check_partial_head(buffer, position)
            return None
        command, headers, plain = _parse_head(head, self._limits)
        length = _content_length(headers)
        if length > self.body_bytes:
            raise self._body_too_large()
        if length < 0:
            stop = buffer.find(b"\0", body_start, body_start + self.body_bytes + 1)
        elif body_start + length < size:
            stop = body_start + length
            if buffer[stop]:
                raise FrameError(f"A {command} frame does not end after its content-length of {length} bytes.")
        else:
            stop = -1
        if stop >= 0:
            self._position = stop + 1
            return Frame(command, headers, buffer[body_start:stop], plain)
        self._head = (command, headers, plain)
        self._body_length = length
        self._position = body_start
        return self._continue_body(command, headers, plain)

    def _continue_body(self, command: str, headers: dict[str, str], plain: bool) -> Frame | None:
        buffer = self._buffer
        position = self._position
        body = self._body
        if self._body_length < 0:
            stop = buffer.find(b"\0", position)
            length = (stop if stop >= 0 else len(buffer)) - position
            if len(body) + length > self.body_bytes:
                raise self._body_too_large()
        else:
            stop = position + self._body_length - len(body)
            if stop >= len(buffer):
                stop = -1
            elif buffer[stop]:
                raise FrameError(
                    f"A {command} frame does not end after its content-length of {self._body_length} bytes."
                )
        if stop < 0:
            body += memoryview(buffer)[position:]
            self._buffer = b""
            self._position = 0
            return None
        body += memoryview(buffer)[position:stop]
        self._position = stop + 1
        self._head = None
        self._body = bytearray()
        return Frame(command, headers, bytes(body), plain)

    def _check_partial_head(self, buffer: bytes, position: int) -> None:
        """Refuse what can no longer become a frame's head, before more of it is collected."""
        limits = self._limits
        if len(buffer) - position > limits.header_bytes + 2:
            raise FrameError(f"The headers of a frame are larger than {limits.header_bytes} bytes.")
        if buffer.find(b"\0", position) >= 0:
            raise FrameError("A frame ends before the blank line that closes its headers.")
        longest = position + limits.command_bytes + 2
        if len(buffer) >= longest and buffer.find(b"\n", position, longest) < 0:
            raise FrameError(f"A frame's command is longer than {limits.command_bytes} bytes.")

    def _body_too_large(self) -> FrameError:
        return FrameError(f"The body of a frame is larger than {self.body_bytes} bytes.")


def _parse_head(head: bytes, limits: FrameLimits) -> tuple[str, dict[str, str], bool]:
    if len(head) > limits.header_bytes:
        raise FrameError(f"The headers of a frame are larger than {limits.header_bytes} bytes.")
    carriage_returns = b"\r" in head
    if carriage_returns:
        head = head.replace(b"\r\n", b"\n").removesuffix(b"\r")
    # Counted in bytes, as a command that has not arrived whole is: segments must make no difference.
    if head.find(b"\n", 0, limits.command_bytes + 1) < 0 and len(head) > limits.command_bytes:
        raise FrameError(f"A frame's command is longer than {limits.command_bytes} bytes.")
    try:
        text = head.decode()
    except UnicodeDecodeError:
        raise FrameError("The headers of a frame are not UTF-8.") from None
    lines = text.split("\n")
    command = lines[0]
    if len(lines) > limits.header_count + 1:
        raise FrameError(f"A frame has more than {limits.header_count} headers.")
    if "\0" in text:
        raise FrameError("A frame ends before the blank line that closes its headers.")
    if len(head) > limits.header_line_bytes and max(map(len, head.split(b"\n"))) > limits.header_line_bytes:
        raise FrameError(f"A header is longer than {limits.header_line_bytes} bytes.")
    del lines[0]
    if "\\" in text and command not in _UNESCAPED_COMMANDS:
        return command, _escaped_headers(lines), False
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name:
            raise FrameError(f"A {command!r} frame has a header line that is not name:value.")
        if name not in headers:
            headers[name] = value
    plain = not carriage_returns and text.count(":") == len(lines)
    return command, headers, plain


def _escaped_headers(lines: Iterable[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name:
            raise FrameError("A frame has a header line that is not name:value.")
        headers.setdefault(_ESCAPED.sub(_unescape, name), _ESCAPED.sub(_unescape, value))
    return headers


def _unescape(found: re.Match[str]) -> str:
    try:
        return _UNESCAPES[found.group(1)]
    except KeyError:
        raise FrameError("A header has an escape that is none of \\\\, \\n, \\r and \\c.") from None


def _content_length(headers: Mapping[str, str]) -> int:
    """The value of content-length, or -1 without one."""
    text = headers.get("content-length")
    if text is None:
        return -1
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_LENGTH_DIGITS):
        raise FrameError("A frame's content-length is not a number.")
    return int(text)


def escape(text: str) -> str:
    """A header name or value as it is written in a frame of STOMP 1.2."""
    if "\0" in text:
        raise FrameError("A header cannot hold a NUL.")
    return _TO_ESCAPE.sub(lambda found: _ESCAPES[found.group()], text)


def header_lines(headers: Mapping[str, str]) -> str:
    """The headers as lines, escaped, each with its line end."""
    return "".join([f"{escape(name)}:{escape(value)}\n" for name, value in headers.items()])


def encode(command: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """One frame's bytes, with a content-length whenever there is a body."""
    if command in _UNESCAPED_COMMANDS:
        for name, value in headers.items():
            if ":" in name or any(character in name + value for character in "\0\r\n"):
                raise FrameError(f"A header of a {command} frame holds a character that cannot be sent.")
        lines = "".join([f"{name}:{value}\n" for name, value in headers.items()])
    else:
        lines = header_lines(headers)
    if body and "content-length" not in headers:
        lines += f"content-length:{len(body)}\n"
    return b"%b\n%b\n%b\0" % (command.encode(), lines.encode(), body)
