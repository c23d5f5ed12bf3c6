"""Copies by Chirp with a real VM, whose closed network nobody else reaches: its server is let to through a door."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from host_agent.hypervisors.images import Image
from tests.system.agent_process import AgentProcess, agent_process

PORT = 9094
HOST = "10.0.2.2"  # as the guest sees us

pytestmark = pytest.mark.vm


def test_a_guest_with_a_chirp_server(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        agent.call("start_vm", vm="box", directory=str(tmp_path / "vms"))
        serve(agent, tmp_path)
        source, back = tmp_path / "data", tmp_path / "back"
        source.write_bytes(bytes(range(256)) * 4000)
        agent.call("put", vm="box", source=str(source), destination="there/data", chirp_port=PORT)
        agent.call("get", vm="box", source="there/data", destination=str(back))  # by HTTP: it is the same place
        assert back.read_bytes() == source.read_bytes()
        back.unlink()
        agent.call("get", vm="box", source="there/data", destination=str(back), chirp_port=PORT)
        assert back.read_bytes() == source.read_bytes()
        (vm,) = agent.call("vms")["vms"]
        listening = [each for each in psutil.Process(vm["pid"]).net_connections() if each.status == "LISTEN"]
        assert listening == []  # the doors are shut again


def serve(agent: AgentProcess, folder: Path) -> None:
    """Bring Debian's chirp_server with its libraries into the guest, and start it there."""
    place = folder / "chirp"
    place.mkdir()
    program = shutil.which("chirp_server")
    assert program is not None
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for name in (program, *re.findall(r"=> (/\S+)", needed)):
        if "/libc.so" not in name:  # the guest has it, and it must fit its loader
            shutil.copy2(name, place)
    (place / "acl").write_text(f"address:{HOST} rwlda\n")
    agent.call("put", vm="box", source=str(place), destination="chirp")
    server = f"exec ./chirp/chirp_server -r . -p {PORT} -u - -a address -A chirp/acl"
    agent.begin("box", "c-chirpserver00001", server, env={"LD_LIBRARY_PATH": "chirp"})
