"""The outbox: a request is there before it is sent and until it is forgotten, whatever happens to the agent."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from host_agent import outbox as outbox_module
from host_agent.outbox import Outbox
from host_agent.state import AgentState, VmRecord


def request(name: str) -> dict[str, object]:
    return {"is": "asked", "id": name, "guest": "g-1", "run": {}, "stdout": "", "stderr": "", "starts": [0, 0]}


def test_every_state_of_a_request_is_known_again(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o")
    for name in ("asked", "delivered", "ended", "forgotten", "reopened"):
        box.asked(request(name))
    for name in ("delivered", "ended", "forgotten", "reopened"):
        box.delivered(box.records[name])
    for name in ("ended", "forgotten", "reopened"):
        box.ended(box.records[name], {"outcome": "exited"})
    box.forgotten(box.records["forgotten"])
    box.reopened(box.records["reopened"], delivered=False)

    records = Outbox(tmp_path / "o").records
    assert list(records) == ["asked", "delivered", "ended", "reopened"]
    assert [record.delivered for record in records.values()] == [False, True, True, False]
    assert [record.result for record in records.values()] == [None, None, {"outcome": "exited"}, None]


@given(cut=st.integers(0, 400))
def test_a_power_cut_loses_at_most_the_line_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("outbox") / "o"
    box = Outbox(path)
    box.asked(request("c-1"))
    sure = len(path.read_bytes().rstrip(b"\0"))
    box.asked(request("c-2"))
    box.close()
    with path.open("r+b") as file:
        file.truncate(min(path.stat().st_size, sure + cut))
    with closing(Outbox(path)) as again:
        assert "c-1" in again.records
        again.asked(request("c-3"))
    with closing(Outbox(path)) as third:
        assert {"c-1", "c-3"} <= set(third.records)


def test_forgotten_requests_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "COMPACT_AFTER", 50)
    box = Outbox(tmp_path / "o")
    kept = box.asked(request("kept"))
    box.delivered(kept)
    for number in range(300):
        record = box.asked(request(f"c-{number}"))
        box.ended(record, {"outcome": "exited"})
        box.forgotten(record)
    assert (tmp_path / "o").stat().st_size < 30_000
    (found,) = Outbox(tmp_path / "o").records.values()
    assert (found.id, found.delivered) == ("kept", True)


def test_a_state_directory_remembers_its_agent_and_its_vms(tmp_path: Path) -> None:
    first = AgentState(tmp_path / "state")
    record = VmRecord("g-1", "box", "/image", "/vm", 128, 1, "g-1", "passcode", "secret", 3, "boot")
    first.keep(record)
    first.close()
    again = AgentState(tmp_path / "state")
    assert again.agent_id == first.agent_id
    assert again.vms == {"g-1": record}
    assert (tmp_path / "state" / "agent.json").stat().st_mode & 0o077 == 0
    assert "secret" not in repr(record) and "passcode" not in repr(record).replace("passcode=", "")


def test_a_state_that_is_not_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a host agent's state"):
        AgentState(tmp_path)
