"""What all benchmarks share: turns, tables, what they read and what they start. The guard runs short forms of them."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import attrs
import psutil
import pytest

from benchmarks import agent, cpu, open_host, report, site_model
from benchmarks.__main__ import NAMES
from benchmarks.broker_load import LARGE, _Frames
from benchmarks.peers import packages
from host_agent.control_client import ControlClient
from host_agent.hypervisors.qemu_options import HOST_LINE, QEMU


def test_every_name_is_a_module_that_runs() -> None:
    for name in NAMES:
        assert callable(importlib.import_module(f"benchmarks.{name}").run), name


def test_a_table_has_ratios_and_names_what_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    values = {report.OURS: [1.0, 2.0, 3.0], "theirs": [4.0, 4.0, 4.0]}
    report.show("work", values, "ms", scale=10.0, missing={"other": "it is not installed"})
    title, _, ours, theirs, other = capsys.readouterr().out.splitlines()
    assert title == "work, ms"
    assert ours.split() == ["ours", "20.000", "29.800", "3"]
    assert theirs.split() == ["theirs", "40.000", "40.000", "3", "0.50"]
    assert other.split(maxsplit=1) == ["other", "not measured: it is not installed"]


def test_a_thread_that_ends_while_it_is_looked_at_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "schedstat").write_text("3000000000 1 2\n")
    assert cpu._ran_ns(tmp_path / "schedstat") == 3_000_000_000
    assert cpu._ran_ns(tmp_path / "gone") == 0


def test_they_take_turns() -> None:
    order: list[str] = []
    times = report.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert [len(each) for each in times.values()] == [2, 2]


def test_rounds_that_take_long_are_fewer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "MOST_SECONDS", -1.0)
    assert list(report.rounds_of(3)) == [0]
    assert "only 1 of 3 rounds" in capsys.readouterr().out


@pytest.mark.parametrize("size", [7, 4096, 100_000, 3 * 2**20])
def test_large_frames_are_counted_however_they_arrive(size: int) -> None:
    frame = b"\nMESSAGE\nack:%d\ncontent-length:%d\n\n" + LARGE[: -len(b"a\n\nb")] + b"a\n\nb\0\n"
    stream = memoryview(b"".join(frame % (number, len(LARGE)) for number in range(3 if size > 7 else 1)))
    frames = _Frames()
    headers = b"".join(frames.take(stream[at : at + size]) for at in range(0, len(stream), size))
    expected = [b"0", b"1", b"2"][: 3 if size > 7 else 1]
    assert frames.ended == len(expected)
    assert [line[4:] for line in headers.split(b"\n") if line.startswith(b"ack:")] == expected


def test_the_model_takes_what_benchmarks_wrote(tmp_path: Path) -> None:
    file = tmp_path / "broker.json"
    file.write_text(
        json.dumps({"metrics": {"activemq_inflight64_per_s": 5000, "embedded_1000_join_ms_per_guest": 20, "other": 1}})
    )
    assert site_model.measured(file) == {"activemq_requests_per_s": 5000, "joins_per_s": 50}


def test_a_model_counts_as_the_guest_agent_does() -> None:
    assert site_model.usages(3, 0) == 6  # each half second, at first
    assert site_model.usages(100, 200) == 200  # never more often than it looks
    assert 40 < site_model.usages(100, 0) < 70
    long = site_model.usages(7200, 0)
    assert long - site_model.usages(200, 0) == 7000 / 5  # once in five seconds, in the end
    assert long < site_model.usages(7200, 100) < long + 101


def test_the_model_of_a_site_takes_the_inputs_that_its_help_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(site_model, "SAMPLE", 10)
    monkeypatch.setattr("sys.argv", ["site_model", "--set", "hours_per_day=24", "--set", "tasks_per_hour=4"])
    assert site_model.main() == 0
    assert "memory: memory first" in capsys.readouterr().out
    messages, _, most = site_model.days(attrs.evolve(site_model.Inputs(), hours_per_day=24))
    assert messages == most == site_model.day_of(24, site_model.Inputs())[0]  # each day is like the other
    for wrong in ("hours_per_day=0", "hours_per_day=x", "hours=3"):
        monkeypatch.setattr("sys.argv", ["site_model", "--set", wrong])
        with pytest.raises(SystemExit):
            site_model.main()
        assert wrong.partition("=")[0] in capsys.readouterr().err


def test_an_interrupt_leaves_no_host_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(endpoint: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ControlClient, "connect", interrupted)
    monkeypatch.setattr(agent, "DEADLINE", 30.0)
    with pytest.raises(KeyboardInterrupt), agent.host_agent(tmp_path / "agent", "process"):
        pass
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(each.info["cmdline"])]


def test_devices_are_for_vms_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real" / QEMU
    real.parent.mkdir()
    real.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    real.chmod(0o755)
    monkeypatch.setenv("PATH", f"{real.parent}:/usr/bin:/bin")
    path = open_host.qemu_with(tmp_path, "-device", "one,with=$HOME")["PATH"]

    def run(*words: str) -> list[str]:
        program = f"{path.partition(':')[0]}/{QEMU}"
        return subprocess.run([program, *words], capture_output=True, text=True, check=True).stdout.splitlines()

    assert run("--version") == ["--version"]
    assert run("-x", HOST_LINE) == ["-x", HOST_LINE, "-device", "one,with=$HOME"]


def test_a_package_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "install-packages"
    tool.write_text("#!/bin/sh\necho only an administrator can install $* >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(packages, "INSTALL", tool)
    with pytest.raises(packages.Unavailable, match="only an administrator can install sshd"):
        packages.need("sshd")
