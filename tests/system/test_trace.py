"""`vmctl trace` tells one command's story from both agents; and from the log when the agent is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .agent_process import DEADLINE, agent_process

ROOT = Path(__file__).resolve().parents[2]


def vmctl(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMWRAPPER_RUNTIME": str(folder / "run")}
    argv = [sys.executable, "-m", "host_agent.vmctl.main", *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT)


def test_a_commands_story_from_both_agents(tmp_path: Path) -> None:
    log = tmp_path / "host.log"
    with agent_process(tmp_path, "--log", str(log), "--log-format", "json") as agent:
        agent.start_vm("box")
        agent.call("run", vm="box", argv=["sh", "-c", "sleep 1; exit 3"], command="c-told")
        agent.call("run", vm="box", argv=["true"], command="c-other")
        done = vmctl(tmp_path, "trace", "c-told")
        assert done.returncode == 0, done.stderr
        first, *story = done.stdout.splitlines()
        assert first == "c-told  box  sh -c sleep 1; exit 3"
        assert "host   box c-told: asked for sh" in story[0]
        for piece in (
            "guest  c-told: runs as process",
            "guest  c-told: exited 3",
            "ms after it was asked for",
            "host   box c-told: exited 3 (ran ",
        ):
            assert sum(piece in line for line in story) == 1, piece
        assert "c-other" not in done.stdout
        values = [json.loads(line) for line in vmctl(tmp_path, "trace", "--json", "c-told").stdout.splitlines()]
        assert [value["time"] for value in values] == sorted(value["time"] for value in values)
        assert {value["who"] for value in values} == {"host", "guest"}
        lost = vmctl(tmp_path, "trace", "c-nothing")
        assert lost.returncode == 1 and "nothing is known of c-nothing" in lost.stderr
    # Its end has not taken the story along.
    after = vmctl(tmp_path, "trace", "--log", str(log), "c-told")
    assert after.returncode == 0 and "box c-told: exited 3" in after.stdout
    assert all(json.loads(line)["program"] == "host-agent" for line in log.read_text().splitlines())
