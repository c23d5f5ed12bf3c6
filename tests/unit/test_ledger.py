"""The sweep removes what is ours and provably dead, and nothing else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.files import endpoints_dir
from host_agent import ledger
from host_agent.control_client import endpoints, remove_dead_endpoints
from host_agent.file_lock import ledger_lock
from host_agent.ledger import ENTRY, STATES, LedgerEntry, ledger_dir, sweep
from host_agent.state import open_state


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))


def forge(entry: LedgerEntry, **changes: Any) -> None:
    file = entry.path / ENTRY
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_a_living_agent_owns_stays(tmp_path: Path) -> None:
    (tmp_path / "vm-a").mkdir()
    entry = LedgerEntry("a", tmp_path / "vm-a")
    assert sweep() == []
    assert entry.path.is_dir()
    entry.close()
    assert list(ledger_dir().iterdir()) == []


def test_what_a_dead_agent_owned_goes_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "vm-a").mkdir()
    (tmp_path / "vm-a" / "disk.qcow2").touch()
    entry = LedgerEntry("a", tmp_path / "vm-a")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as vm:
        entry.has_process(vm.pid)
        forge(entry, owner=[2**22 - 1, 1.0])
        assert len(sweep()) == 3
        vm.wait(60)
    assert not (tmp_path / "vm-a").exists()
    assert not entry.path.exists()


def test_a_pid_that_somebody_else_has_now_is_left_alone(tmp_path: Path) -> None:
    entry = LedgerEntry("a", tmp_path / "vm-a")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        forge(entry, owner=[2**22 - 1, 1.0], process=[other.pid, 1.0])
        sweep()
        assert other.poll() is None
        other.kill()


def test_only_directories_of_vms_are_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    entry = LedgerEntry("a", tmp_path / "precious")
    forge(entry, owner=[2**22 - 1, 1.0])
    sweep()
    assert (tmp_path / "precious").is_dir()


def test_a_vm_without_a_leash_waits_for_the_next_agent_of_its_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []

    def unregister(hypervisor: str, machine: str, directory: Path) -> str:
        removed.append(machine)
        return ""

    monkeypatch.setattr(ledger, "_unregister", unregister)
    directory = tmp_path / "vm-a"
    directory.mkdir()
    entry = LedgerEntry("a", directory)
    entry.has_machine("virtualbox", "UUID")
    forge(entry, owner=[2**22 - 1, 1.0])
    assert not ledger.some_wait()
    assert sweep() == ["left the VM a to the next host agent of its slot, for 60 s"]
    assert ledger.some_wait()
    assert sweep() == [], "not yet, and it was said"
    LedgerEntry("a", directory).has_machine("virtualbox", "UUID")  # which takes it over
    assert sweep() == []
    assert not ledger.some_wait()
    forge(entry, owner=[2**22 - 1, 1.0])  # and is killed, too
    assert sweep() != []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + ledger.GRACE + 1)
    assert not removed
    assert not ledger.some_wait(), "the next sweep removes it, and there is nothing to wait for"
    assert "removed the VM a from virtualbox" in sweep()
    assert removed == ["UUID"]
    assert not directory.exists()
    assert not ledger.some_wait()


@pytest.mark.parametrize("value", ["soon", "1e"])
def test_a_grace_time_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_GRACE", value)
    with pytest.raises(ConfigError, match="VMWRAPPER_GRACE"):
        ledger.grace_time()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"owner":1}'])
def test_an_entry_that_cannot_be_read_is_left(content: bytes) -> None:
    place = ledger_dir() / "x"
    place.mkdir()
    (place / ENTRY).write_bytes(content)
    assert sweep() == []
    assert place.is_dir()


def test_where_a_killed_agent_listened(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    for name, pid in (("dead", dead.pid), ("alive", os.getpid())):
        words = {"agent": name, "pid": pid, "socket": f"{endpoints_dir()}/{name}.sock"}
        (endpoints_dir() / f"{name}.json").write_text(json.dumps(words))
        (endpoints_dir() / f"{name}.sock").touch()
    (endpoints_dir() / "made-now.json").touch()
    assert [each.agent for each in endpoints()] == ["alive"]
    assert sweep() == [f"removed {endpoints_dir()}/dead.json: its host agent was killed"]
    assert sorted(file.name for file in endpoints_dir().iterdir()) == ["alive.json", "alive.sock", "made-now.json"]


def test_an_agent_that_is_started_again_keeps_where_it_listens(tmp_path: Path) -> None:
    """It has the files of the one that was killed, and makes them while another agent's sweep goes on."""
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    file = endpoints_dir() / "same.json"
    file.write_text(json.dumps({"agent": "same", "pid": dead.pid, "socket": f"{endpoints_dir()}/same.sock"}))
    removed: list[list[Path]] = []
    sweeping = threading.Thread(target=lambda: removed.append(remove_dead_endpoints()))
    with ledger_lock():  # as `ControlServer.listen` does
        sweeping.start()
        sweeping.join(0.2)
        file.write_text(json.dumps({"agent": "same", "pid": os.getpid(), "socket": f"{endpoints_dir()}/same.sock"}))
    sweeping.join(30)
    assert removed == [[]]
    assert [each.agent for each in endpoints()] == ["same"]


def test_an_agent_that_takes_a_vm_over_while_it_is_swept_keeps_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep has seen a dead owner; what a living one makes from then on is not the sweep's."""
    directory = tmp_path / "vm-a"
    directory.mkdir()
    (directory / STATES).touch()
    forge(LedgerEntry("a", directory), owner=[2**22 - 1, 1.0])
    real, taken = ledger._remove, []

    def meanwhile(instance: str, value: dict[str, Any]) -> tuple[list[str], bool]:
        assert sweep() == [], "another sweep leaves it to this one"
        taken.append(LedgerEntry("a", directory))
        return real(instance, value)

    monkeypatch.setattr(ledger, "_remove", meanwhile)
    assert f"kept {directory}: its VM can be restored" in sweep()
    assert [path.name for path in ledger_dir().iterdir()] == ["a"]
    assert (taken[0].path / ENTRY).exists()
    assert sweep() == []


def test_what_a_killed_sweep_has_begun_the_next_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vm-a").mkdir()
    forge(LedgerEntry("a", tmp_path / "vm-a"), owner=[2**22 - 1, 1.0])

    def killed(instance: str, value: dict[str, Any]) -> tuple[list[str], bool]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_remove", killed)
        patched.setattr(ledger, "identity_of", lambda pid: [2**22 - 1, 1.0])
        with pytest.raises(KeyboardInterrupt):
            sweep()
    assert f"removed {tmp_path / 'vm-a'}" in sweep()
    assert list(ledger_dir().iterdir()) == []


def test_the_state_of_a_killed_agent(tmp_path: Path) -> None:
    alive = open_state(None)
    dead = alive.directory.with_name("s-dead")
    (dead / "output").mkdir(parents=True)
    assert sweep() == [f"removed {dead}: its host agent was killed"]
    assert alive.directory.is_dir()
    assert sweep() == []
    alive.close(remove=True)


def test_the_socket_of_a_killed_keeper(tmp_path: Path) -> None:
    place = ledger_dir().parent
    listening = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for number, each in enumerate(listening):
        each.bind(str(place / f"keeper-{number}.sock"))
        each.listen(1)
    for number in (0, 1):
        listening[number].close()
    for number in (0, 2):
        os.utime(place / f"keeper-{number}.sock", (0, 0))
    assert sweep() == [f"removed {place}/keeper-0.sock: its keeper was killed"]
    assert sorted(path.name for path in place.glob("keeper-*")) == ["keeper-1.sock", "keeper-2.sock"]
    listening[2].close()
