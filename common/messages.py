"""Every message that the host agent and the guest agent exchange, and how it looks on the wire.

A message is one STOMP body: a JSON object on one line and, after the newline, an optional payload of raw bytes:

    {"t":"OUTPUT","v":2,"from":"3f…","to":"a0…","seq":12,"ack":7,"command":"c-1","stream":"stdout","offset":0}\n<bytes>

`t` names the message, `v` is the protocol's version; `from`, `to`, `seq` and `ack` belong to the link
(`link.py`): the sender's and the receiver's session, the number of this message (0: not numbered, may be lost)
and the last number received without a gap. All other keys are the message's own fields.
Unknown keys are ignored, so that a newer peer can add fields; unknown messages and bad values are refused.

`docs/protocol.md` describes the conversation; a test fails when a message here is missing there.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import attrs

from .errors import ProtocolError

VERSION = 2

MAX_HEAD = 256 * 1024  # bytes of the JSON line
MAX_PAYLOAD = 256 * 1024  # bytes after it
MAX_TEXT = 32 * 1024  # one string
MAX_ITEMS = 4096  # one list or mapping
MAX_COUNT = 2**63 - 1

MOST_TOLD = 16  # commands of a BEACON

RUNNING, ENDED = "running", "ended"  # what HELLO says of a command

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_to_json = json.JSONEncoder(separators=(",", ":")).encode


# --- what a field may hold -------------------------------------------------------------------------------------


def _text(limit: int = MAX_TEXT) -> Callable[[Any, Any, Any], None]:
    def check(_: Any, field: Any, value: Any) -> None:
        if not isinstance(value, str) or len(value) > limit or "\0" in value:
            raise ProtocolError(f"{field.name} must be a text of at most {limit} characters")

    return check


_any_text = _text()


def _id(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, str) or _ID.fullmatch(value) is None:
        raise ProtocolError(f"{field.name} must be an id of 1 to 64 letters, digits, '-' and '_'")


def _optional_id(instance: Any, field: Any, value: Any) -> None:
    if value != "":
        _id(instance, field, value)


def _count(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
        raise ProtocolError(f"{field.name} must be a whole number from 0")


def _number(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e15:
        raise ProtocolError(f"{field.name} must be a number from 0")


def _flag(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, bool):
        raise ProtocolError(f"{field.name} must be true or false")


def _optional_count(instance: Any, field: Any, value: Any) -> None:
    if value is not None:
        _count(instance, field, value)


def _texts(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) > MAX_ITEMS:
        raise ProtocolError(f"{field.name} must be a list of at most {MAX_ITEMS} texts")
    for item in value:
        _any_text(None, field, item)


def _ids(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) > MAX_ITEMS:
        raise ProtocolError(f"{field.name} must be a list of at most {MAX_ITEMS} ids")
    for item in value:
        _id(None, field, item)


def _text_map(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, Mapping) or len(value) > MAX_ITEMS:
        raise ProtocolError(f"{field.name} must be an object of at most {MAX_ITEMS} texts")
    for key, item in value.items():
        _any_text(None, field, key)
        _any_text(None, field, item)


def _ages(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, Mapping) or len(value) > MOST_TOLD:
        raise ProtocolError(f"{field.name} must be an object of at most {MOST_TOLD} ids")
    for key, item in value.items():
        _id(None, field, key)
        _number(None, field, item)


def _held(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, Mapping) or len(value) > MAX_ITEMS:
        raise ProtocolError(f"{field.name} must be an object of at most {MAX_ITEMS} ids")
    for key, item in value.items():
        _id(None, field, key)
        if item not in (RUNNING, ENDED):
            raise ProtocolError(f"{field.name} must say {RUNNING} or {ENDED} of each id")


def _one_of(*allowed: str) -> Callable[[Any, Any, Any], None]:
    def check(_: Any, field: Any, value: Any) -> None:
        if value not in allowed:
            raise ProtocolError(f"{field.name} must be one of {', '.join(allowed)}")

    return check


def _payload(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, bytes) or len(value) > MAX_PAYLOAD:
        raise ProtocolError(f"{field.name} must be at most {MAX_PAYLOAD} bytes")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# --- the registry ----------------------------------------------------------------------------------------------


class Message:
    """Base of all messages. `numbered` ones are delivered in order, once, and re-sent until acknowledged."""

    NAME: ClassVar[str]
    SENDER: ClassVar[str]  # "host" or "guest" or "both"
    NUMBERED: ClassVar[bool]


MESSAGES: dict[str, type[Message]] = {}

_M = TypeVar("_M", bound="type[Message]")


def _message(name: str, sender: str, *, numbered: bool) -> Callable[[_M], _M]:
    def register(cls: _M) -> _M:
        cls.NAME, cls.SENDER, cls.NUMBERED = name, sender, numbered
        MESSAGES[name] = cls
        return cls

    return register


# --- presence: may be lost, tell the state of things -----------------------------------------------------------


@_message("HELLO", "guest", numbered=False)
@attrs.frozen
class Hello(Message):
    """The guest agent is there and ready; sent after every (re)connection until a WELCOME answers it.

    Safe to repeat: the host answers each one, and only a new session starts the numbering anew.
    `boot` is new whenever the guest's keeper has started over, and all programs with it. `epoch` is the last one that
    a WELCOME told this agent, 0 for none: the link opens only in the host's present epoch, so that what a guest said
    before it was restored or rebooted can never be taken for its present view. `commands` is that view: every command
    and copy that it holds, with `running` or `ended` (and not yet confirmed). `proof` shows that the sender knows this
    guest's secret: a guest that has a login of its own cannot speak for another.
    """

    guest: str = attrs.field(validator=_id)
    boot: str = attrs.field(validator=_id)
    proof: str = attrs.field(validator=_text(64), repr=False)
    agent_version: str = attrs.field(validator=_text(64))
    epoch: int = attrs.field(default=0, validator=_count)
    system: str = attrs.field(default="", validator=_text(256))
    home: str = attrs.field(default="", validator=_text(4096))
    commands: Mapping[str, str] = attrs.field(factory=dict, validator=_held)


@_message("WELCOME", "host", numbered=False)
@attrs.frozen
class Welcome(Message):
    """The host's answer to HELLO; or, unasked and to any session, its call for one: it has started anew.

    `epoch` counts the boots and restores of this guest, from 1. `opened`: HELLO was in that epoch, the session is
    open and both sides go on. Else the guest takes the epoch over, in a new session if it knew another epoch before,
    and says HELLO again. `beacon_s` is the wished time between beacons, in seconds; `clock` the host's time
    (seconds since 1970).
    """

    host: str = attrs.field(validator=_id)
    opened: bool = attrs.field(validator=_flag)
    epoch: int = attrs.field(validator=_count)
    beacon_s: float = attrs.field(validator=_number)
    clock: float = attrs.field(default=0.0, validator=_number)


@_message("BEACON", "guest", numbered=False)
@attrs.frozen
class Beacon(Message):
    """Still alive, on the presence topic: for everybody who watches. Seconds, bytes, a 1-minute load.

    The guest alone says all this, and no proof goes with it: a beacon shows that somebody speaks, never who.
    `host` is the guest's own and `name` what people call it, so that it can be placed while its host agent is silent.
    `cpu_s` is what all its processors have worked since it booted. `running`: how many seconds each of its oldest
    commands has run.
    """

    guest: str = attrs.field(validator=_id)
    uptime_s: float = attrs.field(validator=_number)
    load: float = attrs.field(default=0.0, validator=_number)
    commands: int = attrs.field(default=0, validator=_count)
    memory_bytes: int = attrs.field(default=0, validator=_count)
    host: str = attrs.field(default="", validator=_optional_id)
    name: str = attrs.field(default="", validator=_text(64))
    agent_version: str = attrs.field(default="", validator=_text(64))
    memory_total_bytes: int = attrs.field(default=0, validator=_count)
    cpus: int = attrs.field(default=0, validator=_count)
    cpu_s: float = attrs.field(default=0.0, validator=_number)
    running: Mapping[str, float] = attrs.field(factory=dict, validator=_ages)


@_message("STATUS", "host", numbered=False)
@attrs.frozen
class Status(Message):
    """What a host agent tells of itself on the status topic, for monitors elsewhere: a few words of its control
    interface, in the same form.

    `host` is its login on this broker, `agent` its id, `clock` its time. `payload` is a JSON object with any of `host`,
    `vms`, `commands`, `copies` (as those calls answer), `checkpoints` and `events` (lists of events, those of
    the events' log `log`). A view of everything is `parts` messages, `part` counting from 0, of one `round`; its lists
    are put together. `parts` 0: only events. `gone`: the agent has ended in order.
    """

    host: str = attrs.field(validator=_id)
    agent: str = attrs.field(validator=_id)
    clock: float = attrs.field(validator=_number)
    log: str = attrs.field(default="", validator=_optional_id)
    round: int = attrs.field(default=0, validator=_count)
    part: int = attrs.field(default=0, validator=_count)
    parts: int = attrs.field(default=0, validator=_count)
    gone: bool = attrs.field(default=False, validator=_flag)
    payload: bytes = attrs.field(default=b"", validator=_payload, repr=False)


@_message("BYE", "guest", numbered=False)
@attrs.frozen
class Bye(Message):
    """The guest agent ends on purpose; commands that still ran are killed and will not be heard of again."""

    guest: str = attrs.field(validator=_id)
    reason: str = attrs.field(default="", validator=_text(1024))


@_message("PING", "host", numbered=False)
@attrs.frozen
class Ping(Message):
    """Are you there? Answered at once by a PONG with the same nonce."""

    nonce: str = attrs.field(validator=_id)


@_message("PONG", "guest", numbered=False)
@attrs.frozen
class Pong(Message):
    """The answer to a PING."""

    nonce: str = attrs.field(validator=_id)


@_message("ACK", "both", numbered=False)
@attrs.frozen
class Ack(Message):
    """Nothing but the link's `ack`: sent when there was no other message to carry it."""


# --- commands: numbered, so in order, each once ----------------------------------------------------------------


@_message("RUN", "host", numbered=True)
@attrs.frozen
class Run(Message):
    """Run a program. Safe to repeat: an id that the guest knows is answered from its journal, never run again.

    `argv` goes to the operating system as it is, no shell. `env` is added to the agent's own environment.
    `cwd` and `stdin` are paths relative to the agent's home ("" = the home itself, /dev/null).
    `fraction_file`: a file whose last number is the fraction done (0…1). `deadline_s`: seconds of run time after
    which the command is killed, 0 for none. `attempt` counts deliveries, for the logs. `have_stdout` and
    `have_stderr` say how many bytes of the streams the host already holds: the guest goes on from there.
    """

    command: str = attrs.field(validator=_id)
    argv: tuple[str, ...] = attrs.field(converter=_tuple, validator=_texts)
    env: Mapping[str, str] = attrs.field(factory=dict, validator=_text_map)
    cwd: str = attrs.field(default="", validator=_text(4096))
    stdin: str = attrs.field(default="", validator=_text(4096))
    fraction_file: str = attrs.field(default="", validator=_text(4096))
    deadline_s: float = attrs.field(default=0.0, validator=_number)
    attempt: int = attrs.field(default=1, validator=_count)
    have_stdout: int = attrs.field(default=0, validator=_count)
    have_stderr: int = attrs.field(default=0, validator=_count)

    def __attrs_post_init__(self) -> None:
        if not self.argv or not self.argv[0]:
            raise ProtocolError("argv must name a program")


@_message("SIGNAL", "host", numbered=True)
@attrs.frozen
class Signal(Message):
    """Send a signal to the whole process group of a running command. Without effect once it has ended."""

    command: str = attrs.field(validator=_id)
    signal: str = attrs.field(validator=_one_of("TERM", "KILL", "STOP", "CONT", "INT", "HUP", "USR1", "USR2"))


@_message("COPY_IN", "host", numbered=True)
@attrs.frozen
class CopyIn(Message):
    """Fetch files from the host's file port to `destination` (relative to the agent's home). Safe to repeat.

    `token` opens this one copy and nothing else. The bytes go by HTTP, not through the broker.
    """

    command: str = attrs.field(validator=_id)
    token: str = attrs.field(validator=_id, repr=False)
    destination: str = attrs.field(validator=_text(4096))


@_message("COPY_OUT", "host", numbered=True)
@attrs.frozen
class CopyOut(Message):
    """Send `source` (relative to the agent's home; a file or a directory) to the host's file port."""

    command: str = attrs.field(validator=_id)
    token: str = attrs.field(validator=_id, repr=False)
    source: str = attrs.field(validator=_text(4096))


@_message("CONFIRM", "host", numbered=True)
@attrs.frozen
class Confirm(Message):
    """The host holds the results of these commands and copies for good: the guest may forget them."""

    commands: tuple[str, ...] = attrs.field(converter=_tuple, validator=_ids)


@_message("STARTED", "guest", numbered=True)
@attrs.frozen
class Started(Message):
    """The program runs, as process `pid` of the guest. Not sent when it ended within a moment: RESULT has `pid` too."""

    command: str = attrs.field(validator=_id)
    pid: int = attrs.field(validator=_count)


@_message("OUTPUT", "guest", numbered=True)
@attrs.frozen
class Output(Message):
    """A piece of a stream: `payload` stands at byte `offset`. Pieces of a stream come in order, without gaps."""

    command: str = attrs.field(validator=_id)
    stream: str = attrs.field(validator=_one_of("stdout", "stderr"))
    offset: int = attrs.field(validator=_count)
    payload: bytes = attrs.field(default=b"", validator=_payload, repr=False)


@_message("USAGE", "guest", numbered=True)
@attrs.frozen
class Usage(Message):
    """How a running command does: CPU seconds so far (user + system), resident bytes, fraction done (or null)."""

    command: str = attrs.field(validator=_id)
    cpu_s: float = attrs.field(validator=_number)
    rss_bytes: int = attrs.field(default=0, validator=_count)
    fraction: float | None = attrs.field(default=None, validator=attrs.validators.optional(_number))


@_message("RESULT", "guest", numbered=True)
@attrs.frozen
class Result(Message):
    """A program's end: exactly one for every RUN. The guest keeps it until CONFIRM.

    `outcome`: exited (`exit_code`), signalled (`signal`), not_started (`reason`: nothing was run),
    deadline (killed when its time was up), lost (it was started and its end is not known; `reason`).
    Times in seconds; `stdout_bytes` and `stderr_bytes` are the whole streams' lengths; `pid` is 0 if nothing was run,
    or if it is not known any more.
    """

    command: str = attrs.field(validator=_id)
    outcome: str = attrs.field(validator=_one_of("exited", "signalled", "not_started", "deadline", "lost"))
    exit_code: int | None = attrs.field(default=None, validator=_optional_count)
    signal: str = attrs.field(default="", validator=_text(32))
    reason: str = attrs.field(default="", validator=_text(2048))
    user_s: float = attrs.field(default=0.0, validator=_number)
    system_s: float = attrs.field(default=0.0, validator=_number)
    wall_s: float = attrs.field(default=0.0, validator=_number)
    max_rss_bytes: int = attrs.field(default=0, validator=_count)
    stdout_bytes: int = attrs.field(default=0, validator=_count)
    stderr_bytes: int = attrs.field(default=0, validator=_count)
    pid: int = attrs.field(default=0, validator=_count)


@_message("COPIED", "guest", numbered=True)
@attrs.frozen
class Copied(Message):
    """A copy's end: exactly one for every COPY_IN and COPY_OUT. An empty `reason` means success."""

    command: str = attrs.field(validator=_id)
    reason: str = attrs.field(default="", validator=_text(2048))
    files: int = attrs.field(default=0, validator=_count)
    bytes: int = attrs.field(default=0, validator=_count)
    sha256: str = attrs.field(default="", validator=_text(64))


# --- the wire --------------------------------------------------------------------------------------------------


@attrs.frozen
class Envelope:
    """A message with what the link adds to it."""

    message: Message
    sender: str  # session ids; "" where none is known yet
    receiver: str
    seq: int = 0
    ack: int = 0


_ALL_FIELDS = {cls: tuple(cls.__annotations__) for cls in MESSAGES.values()}
_FIELDS = {cls: tuple(name for name in names if name != "payload") for cls, names in _ALL_FIELDS.items()}
_HAS_PAYLOAD = {cls for cls, names in _ALL_FIELDS.items() if "payload" in names}


def fields_of(message: Message, *, but: str = "") -> dict[str, Any]:
    """A message's own fields (but a payload) as JSON can hold them: what its class makes it of again."""
    return {name: getattr(message, name) for name in _FIELDS[type(message)] if name != but}


def encode(envelope: Envelope) -> bytes:
    """The STOMP body of a message."""
    message = envelope.message
    head: dict[str, Any] = {
        "t": message.NAME,
        "v": VERSION,
        "from": envelope.sender,
        "to": envelope.receiver,
        "seq": envelope.seq,
        "ack": envelope.ack,
    }
    for name in _FIELDS[type(message)]:  # as `fields_of`, without a second dictionary
        head[name] = getattr(message, name)
    line = _to_json(head).encode("ascii")
    if len(line) > MAX_HEAD:
        raise ProtocolError(f"{message.NAME} is too large: {len(line)} bytes, at most {MAX_HEAD}")
    payload: bytes = getattr(message, "payload", b"")
    return b"%b\n%b" % (line, payload) if payload else line


def decode(body: bytes) -> Envelope:
    """The message in a STOMP body; ProtocolError says what is wrong with it."""
    end = body.find(b"\n", 0, MAX_HEAD + 1)
    line, payload = (body, b"") if end < 0 else (body[:end], body[end + 1 :])
    if len(line) > MAX_HEAD:
        raise ProtocolError(f"a message's head is longer than {MAX_HEAD} bytes")
    try:
        head = json.loads(line.decode())  # bytes would be searched for their encoding
    except (ValueError, RecursionError):
        raise ProtocolError("a message is not JSON") from None
    if not isinstance(head, dict):
        raise ProtocolError("a message is not a JSON object")
    if head.get("v") != VERSION:
        raise ProtocolError(f"a message speaks protocol version {head.get('v')!r:.20}, not {VERSION}")
    cls = MESSAGES.get(head["t"]) if isinstance(head.get("t"), str) else None
    if cls is None:
        raise ProtocolError(f"unknown message {head.get('t')!r:.40}")
    fields = {name: head[name] for name in _FIELDS[cls] if name in head}
    if cls in _HAS_PAYLOAD:
        fields["payload"] = payload
    elif payload:
        raise ProtocolError(f"{cls.NAME} carries no payload")
    try:
        message = cls(**fields)
    except TypeError:
        raise ProtocolError(f"{cls.NAME} lacks a field") from None
    except ProtocolError as error:
        raise ProtocolError(f"{cls.NAME}: {error}") from None
    sender, receiver = head.get("from", ""), head.get("to", "")
    seq, ack = head.get("seq", 0), head.get("ack", 0)
    if not (isinstance(sender, str) and isinstance(receiver, str) and len(sender) <= 64 and len(receiver) <= 64):
        raise ProtocolError(f"{cls.NAME}: sessions must be short texts")
    for number in (seq, ack):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= MAX_COUNT:
            raise ProtocolError(f"{cls.NAME}: seq and ack must be whole numbers")
    if cls.NUMBERED != (seq > 0):
        raise ProtocolError(f"{cls.NAME} must {'' if cls.NUMBERED else 'not '}be numbered")
    return Envelope(message, sender, receiver, seq, ack)


def claims(body: bytes) -> Mapping[str, str]:
    """What a refused message says of itself, unchecked: its own guest and agent_version, where it has such texts."""
    try:
        head = json.loads(body.partition(b"\n")[0][:MAX_HEAD])
        return {key: head[key][:64] for key in ("guest", "agent_version") if isinstance(head.get(key), str)}
    except (ValueError, RecursionError, AttributeError):
        return {}


def proof_of(secret: str, guest: str, session: str) -> str:
    """What HELLO carries: HMAC-SHA256 (hex) of the guest and its session under the guest's secret."""
    return hmac.new(secret.encode("utf-8"), f"{guest} {session}".encode(), "sha256").hexdigest()


def guest_queue(guest: str) -> str:
    """Where a guest receives; only that guest may read it."""
    return f"/queue/vmwrapper.guest.{guest}"


def host_queue(host: str) -> str:
    """Where a host agent receives from its guests."""
    return f"/queue/vmwrapper.host.{host}"


PRESENCE = "/topic/vmwrapper.presence"
STATUS = "/topic/vmwrapper.status"
