"""Values as the XML-RPC interface of 2010 takes and gives them."""

from __future__ import annotations

import ast
import hashlib
import re
import signal
from collections.abc import Mapping
from typing import Any

from twisted.web import xmlrpc

from common.errors import ConfigError

SAVED = "saved"  # a state, not one of the snapshots that people make

# By the words of `docs/control.md`.
STATES = {
    "defined": "PoweredOff",
    "starting": "Starting",
    "running": "Running",
    "paused": "Paused",
    "saved": "Saved",
    "stopped": "PoweredOff",
    "crashed": "Aborted",
    "destroyed": "PoweredOff",
}
# In the order of getrusage(2); what a guest does not measure is 0.
RUSAGE = (
    "ru_utime", "ru_stime", "ru_maxrss", "ru_ixrss", "ru_idrss", "ru_isrss", "ru_minflt", "ru_majflt",
    "ru_nswap", "ru_inblock", "ru_oublock", "ru_msgsnd", "ru_msgrcv", "ru_nsignals", "ru_nvcsw", "ru_nivcsw",
)  # fmt: skip
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|\r")
_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def as_results(result: Mapping[str, Any], out: bytes, err: bytes) -> dict[str, Any]:
    """As the original had it. What ended otherwise than by exiting is not `finished`, and tells its signal or -1."""
    finished = result["outcome"] == "exited"
    number = result["exit_code"] if finished else -1
    if result["outcome"] == "signalled":
        number = getattr(signal.Signals.__members__.get(f"SIG{result['signal']}"), "value", -1)
    if not finished and result.get("reason"):
        err += f"{result['reason']}\n".encode()
    used = {
        "ru_utime": result["user_s"],
        "ru_stime": result["system_s"],
        "ru_maxrss": result["max_rss_bytes"] // 1024,
    }
    return {
        "out": _printable(out),
        "err": _printable(err),
        "finished": finished,
        "exitCodeOrSignal": number,
        "resources": {name: used.get(name, 0) for name in RUSAGE},
    }


def _printable(data: bytes) -> str | xmlrpc.Binary:
    """Text as text; what XML cannot carry as it is goes as base64."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return xmlrpc.Binary(data)
    return xmlrpc.Binary(data) if _NOT_XML.search(text) else text


def snapshot_name(name: str) -> str:
    """Any name that a client gives, as one that can be part of a file's name; different ones stay different."""
    if _SNAPSHOT.fullmatch(name) and name != SAVED:
        return name
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", name)[:40]
    return f"s-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def as_text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{what} must be a text, not {value!r}"[:200])
    return value


def as_seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 3600:
        raise ConfigError(f"timeout_secs must be from above 0 to 3600, not {value!r}"[:200])
    return float(value)


def as_literal(what: str, value: Any, kind: type | tuple[type, ...], default: Any) -> Any:
    """An argument that the original's clients send as it is, or as the text of a Python literal ('{}', 'None')."""
    if isinstance(value, str) and (kind is not str or value == "None"):
        try:
            value = ast.literal_eval(value) if value else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ConfigError(f"{what} is not a Python literal: {value[:80]!r}") from None
    if value is None or value == ():
        return default
    if not isinstance(value, kind):
        raise ConfigError(f"{what} cannot be {value!r}"[:200])
    return value
