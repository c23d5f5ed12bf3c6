"""The codec of the protocol: everything that can be said survives the wire, and nothing else gets in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages
from common.errors import ProtocolError
from common.messages import MESSAGES, Envelope, Output, Result, Run, decode, encode

ids = st.text("abcXYZ019-_", min_size=1, max_size=64)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50)
counts = st.integers(0, 2**63 - 1)
numbers = st.floats(0, 1e14, allow_nan=False)

runs = st.builds(
    Run,
    command=ids,
    argv=st.lists(texts.filter(bool), min_size=1, max_size=5).map(tuple),
    env=st.dictionaries(texts, texts, max_size=3),
    cwd=texts,
    deadline_s=numbers,
    have_stdout=counts,
)
outputs = st.builds(
    Output, command=ids, stream=st.sampled_from(["stdout", "stderr"]), offset=counts, payload=st.binary()
)
results = st.builds(
    Result,
    command=ids,
    outcome=st.sampled_from(["exited", "signalled", "not_started", "deadline", "lost"]),
    exit_code=st.none() | st.integers(0, 255),
    reason=texts,
    user_s=numbers,
    stdout_bytes=counts,
)


@given(st.one_of(runs, outputs, results), ids, ids, st.integers(1, 2**40), counts)
def test_every_message_survives_the_wire(message: Any, sender: str, receiver: str, seq: int, ack: int) -> None:
    envelope = Envelope(message, sender, receiver, seq, ack)
    assert decode(encode(envelope)) == envelope


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_in_one_way(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.sampled_from(sorted(MESSAGES)),
    st.dictionaries(st.sampled_from(["command", "argv", "offset", "seq"]), json_values),
)
def test_fields_of_any_type_are_accepted_or_refused_in_one_way(name: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"t": name, "v": 2, "from": "a", "to": "b", "seq": int(MESSAGES[name].NUMBERED), **fields})
    try:
        assert isinstance(decode(body.encode()).message, MESSAGES[name])
    except ProtocolError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"t":"RUN","v":3}', "version"),
        (b'{"t":"FORMAT","v":2}', "unknown message"),
        (b'{"t":"PING","v":2,"nonce":"x","seq":3}', "not be numbered"),
        (b'{"t":"RUN","v":2,"seq":0,"command":"c","argv":["x"]}', "must be numbered"),
        (b'{"t":"RUN","v":2,"seq":1,"command":"c","argv":[]}', "argv"),
        (b'{"t":"RUN","v":2,"seq":1,"command":"../c","argv":["x"]}', "command"),
        (b'{"t":"PING","v":2,"nonce":"x"}\nmore', "no payload"),
        (b"[" * 100_000, "not JSON"),
        (b"x" * (messages.MAX_HEAD + 5), "longer than"),
    ],
)
def test_a_bad_message_is_refused_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode(body)


def test_unknown_fields_are_ignored_so_that_peers_can_differ() -> None:
    assert decode(b'{"t":"PING","v":2,"nonce":"x","colour":"red"}').message == messages.Ping("x")


def test_tokens_and_payloads_do_not_show_in_logs() -> None:
    assert "sesame" not in repr(messages.CopyIn("c", "sesame", "file"))
    assert "sesame" not in repr(messages.Hello("g", "e", "sesame", "1"))


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_every_message_is_documented(name: str) -> None:
    """In its own docstring, and as a row of the protocol's page that names each of its fields."""
    assert MESSAGES[name].__doc__
    page = (Path(messages.__file__).parents[1] / "docs" / "protocol.md").read_text("utf-8")
    row = re.search(rf"^\| `{name}` \|(.*)$", page, re.MULTILINE)
    assert row is not None, f"docs/protocol.md does not describe {name}"
    for field in MESSAGES[name].__annotations__:
        assert f"`{field}`" in row.group(1), f"docs/protocol.md does not describe {field} of {name}"
