"""Logs: one event one line, in both formats; files are rotated, bounded, and get the words of a crash."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from twisted.logger import Logger, LogLevel, globalLogPublisher

from common.logs import LogFormat, LogLines
from host_agent.events import Happened
from host_agent.vmctl.trace import of_log, parse

ROOT = Path(__file__).resolve().parents[3]
_WRITER = """
import sys
from pathlib import Path
from twisted.logger import Logger
from common import logs
logs.MOST_BYTES = 20_000
lines = logs.start_logging("writer", form=logs.LogFormat(sys.argv[2]), file=None)
lines._out = logs.RotatingFile(Path(sys.argv[1]), 20_000)
log = Logger()
for number in range(2000):
    log.info("{command}: number {number}", command=f"c-{number}", number=number)
raise SystemExit(1 / 0)
"""


def written(form: LogFormat) -> list[str]:
    out = io.StringIO()
    lines = LogLines("test", form, out, debug=False)
    lines.about["instance"] = "g-1"
    globalLogPublisher.addObserver(lines)
    log = Logger()
    try:
        log.info(
            "{vm} {command}: ends\nwith two lines", vm="box", command="c-1", event=Happened.COMMAND_ENDED, thing=out
        )
        try:
            raise ValueError("of no use")
        except ValueError:
            log.failure("it failed", level=LogLevel.critical)
    finally:
        globalLogPublisher.removeObserver(lines)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("form", list(LogFormat))
def test_one_event_is_one_line(form: LogFormat) -> None:
    first, second = written(form)
    assert "of no use" in second and "Traceback" in second
    line = parse(first)
    assert line is not None and line.who == "host" and line.text.startswith("box c-1: ends")


def test_json_has_the_fields() -> None:
    value = json.loads(written(LogFormat.JSON)[0])
    assert (value["program"], value["level"], value["vm"], value["command"], value["instance"], value["event"]) == (
        "test", "info", "box", "c-1", "g-1", "command_ended",
    )  # fmt: skip
    assert "thing" not in value


@pytest.mark.parametrize("form", list(LogFormat))
def test_files_are_rotated_and_bounded_and_get_the_crash(tmp_path: Path, form: LogFormat) -> None:
    file = tmp_path / "log"
    argv = [sys.executable, "-c", _WRITER, str(file), form.value]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 20_000 for path in (tmp_path / "log.1", tmp_path / "log.2"))
    assert file.stat().st_mode & 0o077 == 0
    assert "ZeroDivisionError" in file.read_text()
    # A command is found in the rotated files, too.
    last = json.loads((tmp_path / "log.2").read_text().splitlines()[-1])["command"] if form is LogFormat.JSON else ""
    if last:
        (line,) = of_log(file, f"{last}:")
        assert line.text.startswith(last)


@pytest.mark.parametrize("text", ["", "{", '{"time": "x"}', "[1]", "2026-13-99 nonsense", "kernel: hello", "{" * 5000])
def test_what_is_no_line_of_ours(text: str) -> None:
    assert parse(text) is None
