"""STOMP 1.2 frames: an incremental parser that is bounded in every dimension, and the encoder.

Source: https://stomp.github.io/stomp-specification-1.2.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import attrs

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
_MOST_KNOWN = 1_000
_KNOWN_BYTES = 512
_ACK_BYTES = 64
_PIECE_BYTES = 4096


class FrameError(ProtocolError):
    """Bytes that are not a frame, or a frame over a limit; the stream cannot be read any further."""


Pieces = tuple[bytes | bytearray, ...]


@attrs.define
class Head:
    """The part of a frame before its body. Frames with the same head share it, so nobody changes what it says."""

    command: str
    headers: dict[str, str]
    length: int  # content-length, -1 without one
    plain: bool  # no header needs an escape when it is sent on, so the encoder need not look
    message: bytes = attrs.field(default=b"", eq=False)
    """What a broker sends on of it, once it was worked out."""


class Frame(NamedTuple):
    """One frame, header escapes resolved. A tuple because one is made for every frame received."""

    command: str
    headers: dict[str, str]
    body: bytes = b""
    head: Head | None = None  # of one that was received
    pieces: Pieces = ()
    """A body as it came, of a parser that is to leave it so; `body` is empty then."""

    @property
    def length(self) -> int:
        """Bytes of its body."""
        return sum(map(len, self.pieces)) if self.pieces else len(self.body)


class KnownHeads:
    """Heads of SEND as they were received: clients repeat them, and to find one again costs a tenth of parsing it.

    For all connections of a broker together; bounded.
    """

    def __init__(self) -> None:
        self.heads: dict[bytes, Head] = {}

    def add(self, data: bytes, head: Head) -> None:
        """Keep it if it may come again. Not those of a login, which hold a secret."""
        if head.command == "SEND" and len(data) <= _KNOWN_BYTES:
            if len(self.heads) >= _MOST_KNOWN:
                self.heads.clear()
            self.heads[data] = head


class FrameParser:
    """Turns byte segments of any size into frames, with work linear in the bytes received.

    `feed()` takes a segment, `next_frame()` gives one frame or None when more bytes are needed.
    After a FrameError the parser is not usable any more.
    """

    __slots__ = (
        "_body",
        "_buffer",
        "_had",
        "_head",
        "_heads",
        "_in_pieces",
        "_known",
        "_limits",
        "_position",
        "body_bytes",
    )

    def __init__(self, limits: FrameLimits, known: KnownHeads | None = None, *, in_pieces: bool = False) -> None:
        """`in_pieces`: leave large bodies of SEND as they come, for somebody who sends them on."""
        self._limits = limits
        self._in_pieces = in_pieces
        self._known = known if known is not None else KnownHeads()
        self._heads = self._known.heads
        self.body_bytes = limits.body_bytes
        """The body limit in force; smaller than the configured one until a client has logged in."""
        self._buffer = b""
        self._position = 0
        self._head: Head | None = None
        self._body: list[bytes | bytearray] = []  # what has come of it
        self._had = 0  # its bytes

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
            return self._continue_body(self._head)
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
        if buffer.startswith(b"ACK\nid:", position):
            end = buffer.find(b"\n\n\0", position, position + _ACK_BYTES)
            name = buffer[position + 7 : end]
            # Half of all frames are these: the shortest way for one whose single header holds nothing special.
            if end >= 0 and name.replace(b"-", b"").isalnum():
                self._position = end + 3
                return Frame("ACK", {"id": name.decode("ascii")})
        limit = position + self._limits.header_bytes + 3
        end = buffer.find(b"\n\n", position, limit)
        head = self._heads.get(buffer[position:end]) if end >= 0 else None
        if head is not None:
            start = end + 2
        else:
            crlf_end = buffer.find(b"\n\r\n", position, limit if end < 0 else end + 1)
            if crlf_end >= 0:
                data = buffer[position:crlf_end]
                start = crlf_end + 3
            elif end >= 0:
                data = buffer[position:end]
                start = end + 2
            else:
                self._check_partial_head(buffer, position)
                return None
            head = _parse_head(data, self._limits)
            if crlf_end < 0:
                self._known.add(data, head)
        length = head.length
        if length > self.body_bytes:
            raise self._body_too_large()
        if length < 0:
            stop = buffer.find(b"\0", start, start + self.body_bytes + 1)
        elif start + length < size:
            stop = start + length
            if buffer[stop]:
                raise _wrong_length(head)
        else:
            stop = -1
        if stop >= 0:
            self._position = stop + 1
            return Frame(head.command, head.headers, buffer[start:stop], head)
        self._head = head
        self._position = start
        return self._continue_body(head)

    def _continue_body(self, head: Head) -> Frame | None:
        buffer = self._buffer
        position = self._position
        if head.length < 0:
            stop = buffer.find(b"\0", position)
            length = (stop if stop >= 0 else len(buffer)) - position
            if self._had + length > self.body_bytes:
                raise self._body_too_large()
        else:
            stop = position + head.length - self._had
            if stop >= len(buffer):
                stop = -1
            elif buffer[stop]:
                raise _wrong_length(head)
        if stop < 0:
            self._collect(buffer[position:])
            self._buffer = b""
            self._position = 0
            return None
        self._collect(buffer[position:stop])
        self._position = stop + 1
        self._head = None
        self._had = 0
        pieces, self._body = self._body, []
        if self._in_pieces and len(pieces) > 1 and head.command == "SEND":
            return Frame(head.command, head.headers, b"", head, tuple(pieces))
        return Frame(head.command, head.headers, b"".join(pieces), head)

    def _collect(self, piece: bytes) -> None:
        """Small pieces are put together: of a client that sends two bytes at a time each would cost us dozens."""
        body = self._body
        self._had += len(piece)
        if len(piece) >= _PIECE_BYTES:
            body.append(piece)
            return
        last = body[-1] if body else b""
        if isinstance(last, bytearray):
            last += piece
        else:
            body.append(bytearray(piece))

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


def _wrong_length(head: Head) -> FrameError:
    return FrameError(f"A {head.command} frame does not end after its content-length of {head.length} bytes.")


def _parse_head(head: bytes, limits: FrameLimits) -> Head:
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
        headers = _escaped_headers(lines)
        return Head(command, headers, _content_length(headers), plain=False)
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name:
            raise FrameError(f"A {command!r} frame has a header line that is not name:value.")
        if name not in headers:
            headers[name] = value
    plain = not carriage_returns and text.count(":") == len(lines)
    return Head(command, headers, _content_length(headers), plain)


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
