"""Fuzzing for a fixed time, the whole corpus, and hypothesis; `make fuzz` does the first for longer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import messages
from tests.fuzz.targets import CORPUS, TARGETS

ROOT = Path(__file__).parents[2]
SECONDS = 8
LEAST_RUNS = 500  # on the slowest machine


@pytest.mark.parametrize("target", TARGETS)
def test_coverage_guided(target: str, tmp_path: Path) -> None:
    # Seeded: the same inputs each time, so that a change is judged by what it changed. `make fuzz` looks for new ones.
    command = [
        sys.executable, "-m", "tests.fuzz", target, "--seconds", str(SECONDS), "--seed", "1", "--found", str(tmp_path)
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True,
        timeout=SECONDS + 120, check=False,
    )  # fmt: skip
    found = sorted(tmp_path.glob("*-*"))
    assert done.returncode == 0 and not found, (
        f"{[each.read_bytes() for each in found]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    assert runs is not None and int(runs[1]) >= LEAST_RUNS


CORPUS_FILES = sorted(path for target in TARGETS for path in (CORPUS / target).iterdir())


@pytest.mark.parametrize("path", CORPUS_FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_corpus(target: str) -> None:
    assert len([path for path in CORPUS_FILES if path.parent.name == target]) >= 5


quickly = settings(max_examples=300)

lines = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=12)
pieces = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [b"SEND\n", b"\n\n", b"\0", b"content-length:5\n", b"\r\n", b"CONNECT\n", b"a:b\n", b"\\c", b"\\x"]
    ),
)


@quickly
@given(st.lists(pieces, max_size=20).map(b"".join))
@example(b"SEND\ncontent-length:99999999999999999999\n\n")
@example(b"A\n" + b"x:y\n" * 300)
def test_frames(data: bytes) -> None:
    TARGETS["frames"](data)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def near_messages(draw: st.DrawFn) -> bytes:
    """Almost a message: right names, any values."""
    name = draw(st.sampled_from(sorted(messages.MESSAGES)))
    head: dict[str, Any] = {"t": name, "v": messages.VERSION, "from": "a", "to": "b", "seq": draw(st.integers(0, 2))}
    for field in messages.MESSAGES[name].__annotations__:
        if draw(st.booleans()):
            head[field] = draw(json_values)
    return json.dumps(head).encode() + draw(st.sampled_from([b"", b"\n", b"\npayload"]))


@quickly
@given(st.one_of(near_messages(), st.binary(max_size=100)))
@example(b"[" * 100_000)
@example(b'{"t":"PONG","v":2,"seq":' + b"9" * 5000 + b"}")
def test_messages(data: bytes) -> None:
    TARGETS["messages"](data)


rows = st.lists(
    st.tuples(
        st.text("abc./\\\0é", max_size=8), st.sampled_from(["file", "dir", "link", "device"]), json_values, json_values,
        st.text("abc./", max_size=12),
    ),
    max_size=6,
)  # fmt: skip


@quickly
@given(st.builds(lambda directory, entries: {"directory": directory, "entries": entries}, json_values, rows))
def test_manifest(value: Any) -> None:
    TARGETS["manifest"](json.dumps(value).encode())


tags = st.sampled_from(
    ["job_desc", "task", "application", "virtualmachine", "command_line", "weight", "unzip_task", "zip_output",
     "filename", "setenv", "time_limit", "unknown"]
)  # fmt: skip


@st.composite
def documents(draw: st.DrawFn, depth: int = 3) -> str:
    name = draw(tags)
    if depth and draw(st.booleans()):
        inside = "".join(draw(st.lists(documents(depth - 1), max_size=4)))
    else:
        inside = draw(st.text("ab1.-$(){}\"' &lt;é", max_size=12)).replace("&", "&amp;")
    return f"<{name}>{inside}</{name}>"


@quickly
@given(documents().map(lambda inside: f"<job_desc>{inside}</job_desc>".encode()))
@example(b'<!DOCTYPE a [<!ENTITY b "c">]><job_desc>&b;</job_desc>')
def test_job(data: bytes) -> None:
    TARGETS["job"](data)
