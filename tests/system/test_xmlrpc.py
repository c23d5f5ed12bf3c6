"""The first VM controller's XML-RPC interface, by a client that knows nothing but `xmlrpc.client`."""

from __future__ import annotations

import ast
import http.client
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xmlrpc.client import Binary, Fault, ServerProxy

import pytest

from .agent_process import AgentProcess, agent_process

DEADLINE = 60.0


def port_of(agent: AgentProcess) -> int:
    match = re.search(r"XML-RPC on port (\d+)", (agent.folder / "agent.log").read_text())
    assert match is not None
    return int(match[1])


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """A host agent with the settings file of 2009, and one guest."""
    folder = tmp_path_factory.mktemp("controller")
    config = folder / "HostConfig.cfg"
    config.write_text("[Host]\nxmlrpc_listen_on=127.0.0.1\nxmlrpc_port=0\nvm_gc_grace=30\n[Hypervisor]\nhypervisor=\n")
    with agent_process(folder, "--config", str(config)) as agent:
        agent.start_vm("lap")
        yield agent


@pytest.fixture
def controller(agent: AgentProcess) -> Iterator[Any]:
    with ServerProxy(f"http://127.0.0.1:{port_of(agent)}/RPC2") as proxy:
        yield proxy


def finished(controller: Any, command: str) -> dict[str, Any]:
    """As the original's client waited: it looked at the list again and again."""
    until = time.monotonic() + DEADLINE
    while command not in controller.listFinishedCmds():
        assert time.monotonic() < until
        time.sleep(0.05)
    results: dict[str, Any] = controller.getCmdResults(command)
    return results


def test_machines(controller: Any) -> None:
    assert controller.listRegisteredVMs() == ["lap"]
    assert controller.listRunningVMs() == ["lap"]
    assert "lap" in controller.listAvailableVMs()
    names = controller.getNamesToIdsMapping()
    assert {name: number for number, name in controller.getIdsToNamesMapping().items()} == names
    assert list(names) == ["lap"]
    assert controller.getState("lap") == "Running"
    assert controller.pause("lap") is True
    assert controller.getState("lap") == "Paused"
    assert controller.listRunningVMs() == []
    assert controller.unpause("lap") is True
    assert controller.ping("lap") == "PONG from lap"
    assert controller.ping("lap", 20) == "PONG from lap"
    data = {each["name"]: each for each in controller.getPerformanceData("lap")}
    assert data["CPU/Time"]["object"] == "lap"
    assert data["CPU/Time"]["values"][0] > 0


def test_a_machine_from_its_making_to_its_end(controller: Any) -> None:
    assert controller.createVM("second", "any.vdi") == [True, "second"]
    assert controller.getState("second") == "PoweredOff"
    assert "second" not in controller.listRunningVMs()
    assert controller.start("second") is True
    assert controller.start("second") is True
    assert sorted(controller.listRunningVMs()) == ["lap", "second"]
    assert controller.powerOff("second") is True
    assert controller.getState("second") == "PoweredOff"
    assert "second" in controller.listAvailableVMs()


def test_a_command(controller: Any) -> None:
    command = controller.runCmd("lap", "sh", ["-c", "echo $WORD; echo bad >&2; exit 3"], {"WORD": "a word"})
    assert ast.literal_eval(controller.getCmdDetails(command))["cmd"] == "sh"
    results = finished(controller, command)
    assert sorted(results) == ["err", "exitCodeOrSignal", "finished", "out", "resources"]
    assert (results["out"], results["err"]) == ("a word\n", "bad\n")
    assert (results["finished"], results["exitCodeOrSignal"]) == (True, 3)
    assert len(results["resources"]) == 16
    assert results["resources"]["ru_maxrss"] > 0
    assert results["resources"]["ru_utime"] + results["resources"]["ru_stime"] >= 0
    assert controller.getCmdResults(command) == ""
    assert command not in controller.listFinishedCmds()
    assert ast.literal_eval(controller.getCmdDetails(command))["args"] == ["-c", "echo $WORD; echo bad >&2; exit 3"]


def test_a_command_as_the_wrapper_of_2010_sent_it(controller: Any, agent: AgentProcess) -> None:
    """Its environment and directory were texts of Python, its input a file in the guest."""
    (agent.home("lap") / "input").write_text("from a file\n")
    command = controller.runCmd("lap", "cat", [], "{}", "None", "input")
    assert finished(controller, command)["out"] == "from a file\n"
    uptime = finished(controller, controller.runCmd("lap", "cat", ["/proc/uptime"]))["out"]
    assert len([float(word) for word in uptime.split()]) == 2


def test_ends_that_are_no_exits(controller: Any) -> None:
    results = finished(controller, controller.runCmd("lap", "sh", ["-c", "kill -9 $$"]))
    assert (results["finished"], results["exitCodeOrSignal"]) == (False, 9)
    results = finished(controller, controller.runCmd("lap", "no-such-program"))
    assert (results["finished"], results["exitCodeOrSignal"]) == (False, -1)
    assert "no-such-program" in results["err"]


def test_output_that_xml_cannot_carry(controller: Any) -> None:
    results = finished(controller, controller.runCmd("lap", "printf", [r"\0\377<&\r\n"]))
    assert results["out"] == Binary(b"\0\xff<&\r\n")
    results = finished(controller, controller.runCmd("lap", "printf", ["<&\u20ac>"]))
    assert results["out"] == "<&\u20ac>"


def test_copies(controller: Any, agent: AgentProcess, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.write_bytes(b"x" * 100_000)
    out, err, status = controller.cpFileToVM("lap", str(source))
    assert (status, err) == (0, "")
    assert out
    assert (agent.home("lap") / "data").read_bytes() == source.read_bytes()
    assert controller.cpFileToVM("lap", str(source), "./folder/there")[2] == 0
    assert controller.cpFileFromVM("lap", "folder/there", str(tmp_path / "back"))[2] == 0
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    _, err, status = controller.cpFileFromVM("lap", "nothing", str(tmp_path / "back"))
    assert status == 1
    assert "nothing" in err
    _, err, status = controller.cpFileToVM("lap", str(tmp_path / "nothing"))
    assert status == 1
    assert "there is no" in err


def test_errors_are_faults_with_a_sentence(controller: Any) -> None:
    for call, args in (
        (controller.ping, ("cellar",)),
        (controller.runCmd, ("cellar", "true")),
        (controller.cpFileToVM, ("cellar", "/etc/hostname")),
        (controller.getState, ("cellar",)),
        (controller.start, ("cellar",)),
        (controller.powerOff, ("cellar",)),
    ):
        with pytest.raises(Fault, match="No VM is named cellar") as caught:
            call(*args)
        assert caught.value.faultCode == -1
    with pytest.raises(Fault, match="too many positional arguments"):
        controller.getState("lap", "more")
    with pytest.raises(Fault, match="not a Python literal"):
        controller.runCmd("lap", "true", [], "__import__('os')")
    with pytest.raises(Fault, match="no snapshot"):
        controller.restoreSnapshot("lap")
    assert controller.getCmdResults("no such id") == ""
    assert controller.getCmdDetails("no such id") == "None"


def test_help_names_every_method(controller: Any) -> None:
    names = (
        "listRegisteredVMs runCmd ping listFinishedCmds getCmdResults getCmdDetails cpFileToVM cpFileFromVM start "
        "powerOff pause unpause saveState getState saveSnapshot restoreSnapshot listAvailableVMs listRunningVMs "
        "getNamesToIdsMapping getIdsToNamesMapping getPerformanceData createVM help"
    )
    text = controller.help()
    for name in names.split():
        assert f"{name}(" in text
        assert controller.help(name).startswith(f"{name}(")
    assert controller.help("ping").startswith("ping(toVmName, timeout_secs=5.0):\n")


def test_pages_of_a_browser_do_not_reach_it(agent: AgentProcess) -> None:
    body = b"<methodCall><methodName>listRunningVMs</methodName><params/></methodCall>"
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        connection = http.client.HTTPConnection("127.0.0.1", port_of(agent), timeout=DEADLINE)
        connection.request("POST", "/RPC2", body, {"Content-Type": "text/plain", **headers})
        assert connection.getresponse().status == 403
        connection.close()


@pytest.mark.parametrize(
    ("address", "sentence"), [("0.0.0.0:0", "has no login"), ("elsewhere", "not HOST:PORT"), ("1.2.3.4:5", "no login")]
)
def test_only_on_the_loopback(tmp_path: Path, address: str, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence), agent_process(tmp_path, "--xmlrpc", address):
        pass


def test_it_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    with agent_process(tmp_path) as agent:
        assert "XML-RPC" not in (agent.folder / "agent.log").read_text()
