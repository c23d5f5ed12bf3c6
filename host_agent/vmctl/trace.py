"""`vmctl trace COMMAND-ID`: one command's or copy's whole story, from both agents, with times."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError
from common.logs import KEPT, MOST_BYTES
from host_agent.control_client import ControlClient, ControlError, endpoints

_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z (\S+) \w+: (.*)")
MOST_LINES = 10_000


@attrs.frozen
class Line:
    """One thing that happened. The clock is that of `who`'s machine."""

    time: float
    who: str
    text: str


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "trace",
        help="tell the whole story of one command or copy",
        description="Everything that is known of one command or copy, in order: what its host agent did, and what the "
        "agent in its guest wrote of it on the console. A host agent remembers its last 10,000 events; with --log, log "
        "files (also of agents that have ended) are searched instead.",
    )
    parser.add_argument("command", metavar="COMMAND-ID", help="as vmctl monitor and vmctl top show it")
    parser.add_argument("--log", type=Path, action="append", default=[], metavar="FILE", help="with its rotated ones")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: time, who, text")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    about: dict[str, Any] = {}
    lines: list[Line] = []
    if options.log:
        for file in options.log:
            lines += of_log(file, options.command)
    else:
        about, lines = _ask_agents(options.command)
    if not lines and not about:
        raise ConfigError(
            f"nothing is known of {options.command}",
            "is its id right? The log of an agent that has ended can be searched: --log host-agent.log",
        )
    lines = sorted(set(lines), key=lambda line: line.time)[:MOST_LINES]
    if options.json:
        for line in lines:
            print(json.dumps(attrs.asdict(line)))
        return 0
    _print(options.command, about, lines)
    return 0


def _ask_agents(command: str) -> tuple[dict[str, Any], list[Line]]:
    for endpoint in endpoints():
        try:
            client = ControlClient.connect(endpoint)
            answer = client.call("trace", {"command": command})
        except ControlError as error:
            if error.code != "no_command":
                print(f"vmctl: {error}", file=sys.stderr)
            continue
        lines = [Line(float(event["time"]), "host", _words(event)) for event in answer["events"]]
        lines += [line for text in answer["console"] if (line := parse(text, "guest")) is not None]
        return answer["about"], lines
    return {}, []


def _words(event: dict[str, Any]) -> str:
    """The sentence, and what was measured."""
    latency, wall = event.get("latency_s"), event.get("wall_s")
    if latency is not None:
        return f"{event['text']} ({1000 * latency:.1f} ms after it was asked for)"
    if wall is not None:
        return f"{event['text']} (ran {wall:.2f} s, CPU {event.get('cpu_s') or 0:.2f} s)"
    return str(event["text"])


def parse(text: str, who: str = "") -> Line | None:
    """A line of a log, in either format; None: it is no line of ours."""
    if text.startswith("{"):
        try:
            value = json.loads(text)
            return Line(float(value["time"]), who or _side(value["program"]), str(value["text"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    found = _STAMP.search(text)
    if found is None:
        return None
    when = datetime.fromisoformat(f"{found[1]}+00:00").timestamp()
    return Line(when, who or _side(found[2]), found[3])


def _side(program: str) -> str:
    return "guest" if program == "guest-agent" else "host"


def of_log(file: Path, command: str) -> Iterator[Line]:
    """Lines of a log file, and of those that it was rotated to, that are about a command."""
    older = [file.with_name(f"{file.name}.{number}") for number in range(KEPT, 0, -1)]
    found = False
    for path in (*older, file):
        try:
            with path.open("rb") as opened:
                text = opened.read(2 * MOST_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        found = True
        for each in text.splitlines():
            if command in each and (line := parse(each)) is not None:
                yield line
    if not found:
        raise ConfigError(f"there is no {file}")


def _print(command: str, about: dict[str, Any], lines: list[Line]) -> None:
    what = about.get("argv") or about.get("guest_path") or ""
    print(f"{command}  {about.get('vm', '')}  {what}".rstrip())
    begin = lines[0].time if lines else 0.0
    for line in lines:
        clock = time.strftime("%H:%M:%S", time.localtime(line.time))
        shown = "".join(char if char.isprintable() else "?" for char in line.text)
        print(f"{clock}.{int(line.time % 1 * 1000):03}  {line.time - begin:+10.3f} s  {line.who:5}  {shown}")
    if about.get("state") not in (None, "ended"):
        print(f"it is {about['state']}")
