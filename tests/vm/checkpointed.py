"""A job with one long task in a VM whose every loss would show, run while processes of it are killed.

Its program prints numbers, appends them to a file of its own, and changes its state in memory alone: after a rollback
all three have to fit together, or the result is not what an undisturbed run gives.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import psutil

from host_agent.ledger import ledger_dir
from host_agent.process_identity import is_alive

ROOT = Path(__file__).resolve().parents[2]
WRAPPER = [sys.executable, "-P", "-m", "host_agent.wrapper.main"]
DEADLINE = 300.0
SLOWEST_LINE = 2.0  # seconds: the program prints four a second, and stands still while it is kept

JOB = """\
<job_desc>
  <checkpoint_period>{period}</checkpoint_period>
  <task>
    <virtualmachine>box</virtualmachine>
    <application>./count.sh</application>
    <copy_app_to_VM>1</copy_app_to_VM>
    <command_line>{count}</command_line>
    <stdout_filename>stdout</stdout_filename>
    <copy_file_from_VM>diary</copy_file_from_VM>
  </task>
</job_desc>
"""
COUNT = """\
#!/bin/sh
echo begun >> diary
i=0 sum=0
while [ $i -lt $1 ]; do
  i=$((i+1)) sum=$(((sum * 31 + i) % 1000003))
  echo "$i $sum"
  echo "$i $sum" >> diary
  sleep 0.25
done
"""
KINDS = ("qemu", "agent", "wrapper", "leash", "everything")


def expected(count: int) -> str:
    """What an undisturbed run prints."""
    total, lines = 0, []
    for number in range(1, count + 1):
        total = (total * 31 + number) % 1000003
        lines.append(f"{number} {total}\n")
    return "".join(lines)


@attrs.define(eq=False)
class CheckpointedJob:
    """The job in a slot, restarted whenever it was killed. `VMWRAPPER_RUNTIME` has to be a place of its own."""

    slot: Path
    count: int
    period: float = 3.0
    process: subprocess.Popen[bytes] | None = None
    killed: list[str] = attrs.field(factory=list)
    safe: int = 0  # bytes of output that the newest whole checkpoint had at the last kill
    lowest: int = 0  # to which the output has gone back since then

    def prepare(self) -> None:
        self.slot.mkdir(parents=True)
        (self.slot / "job.xml").write_text(JOB.format(period=self.period, count=self.count))
        (self.slot / "count.sh").write_text(COUNT)
        (self.slot / "count.sh").chmod(0o755)

    def start(self) -> None:
        self.process = subprocess.Popen(WRAPPER, cwd=self.slot, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    @property
    def is_over(self) -> bool:
        return (self.slot / "boinc_finish_called").exists()

    @property
    def log(self) -> str:
        file = self.slot / "stderr.txt"
        return file.read_text() if file.exists() else ""

    @property
    def lines(self) -> int:
        file = self.slot / "stdout"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    @property
    def checkpoints(self) -> int:
        """How many were made."""
        file = self.slot / "host-agent.log"
        return file.read_text().count(": checkpoint  done") if file.exists() else 0

    def until(self, true: Callable[[], bool], deadline: float = DEADLINE) -> None:
        """Wait, and start the wrapper again as the client would."""
        until = time.monotonic() + deadline
        while not true():
            assert time.monotonic() < until, self.log[-3000:] + self._agent_log()
            if self.is_over:
                return
            assert self.process is not None
            if self.process.poll() is not None and not self.is_over:
                self.start()
            with contextlib.suppress(FileNotFoundError):
                self.lowest = min(self.lowest, (self.slot / "stdout").stat().st_size)
            time.sleep(0.05)

    def kept(self) -> int:
        """Bytes of output in the newest checkpoint that is whole."""
        found = [0]
        with contextlib.suppress(OSError, ValueError):
            (states,) = self.slot.glob("vm-*/states.json")
            for state in json.loads(states.read_bytes())["states"]:
                (mark,) = (self.slot / "host-agent" / "marks").glob(f"*.{state['name']}")
                found += [entry["have"][0] for entry in json.loads(mark.read_bytes())["commands"]]
        return max(found)

    def _agent_log(self) -> str:
        file = self.slot / "host-agent.log"
        return file.read_text()[-3000:] if file.exists() else ""

    # -- killing

    def processes(self) -> dict[str, psutil.Process]:
        """What works for the job now, by kind."""
        found = {}
        for entry in ledger_dir().glob("*/entry.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
                value = json.loads(entry.read_bytes())
                for kind, key in (("qemu", "process"), ("agent", "owner"), ("leash", "leash")):
                    if value.get(key) and is_alive(value[key]):
                        found[kind] = psutil.Process(value[key][0])
        if self.process is not None and self.process.poll() is None:
            found["wrapper"] = psutil.Process(self.process.pid)
        return found

    def kill(self, kind: str) -> bool:
        """SIGKILL; False when there is nothing of that kind now. `everything` is a power cut."""
        found = self.processes()
        chosen = list(found.values()) if kind == "everything" else [found[kind]] if kind in found else []
        self.safe = self.kept()
        for process in chosen:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP if kind == "everything" else signal.SIGKILL)
        if kind == "everything":  # none of them is to notice the end of another
            for process in chosen:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        if chosen:
            self.killed.append(kind)
            psutil.wait_procs(chosen, timeout=10)
            self.lowest = (self.slot / "stdout").stat().st_size if (self.slot / "stdout").exists() else 0
        if self.process is not None and "wrapper" in found and kind in ("wrapper", "everything"):
            self.process.wait(10)
        return bool(chosen)

    # -- the end

    def finish(self) -> None:
        self.until(lambda: self.is_over, DEADLINE + SLOWEST_LINE * (self.count - self.lines))
        assert self.process is not None
        self.process.wait(60)

    def problems(self) -> list[str]:
        """What is not as if nothing had happened."""
        found = []
        wanted = expected(self.count)
        if (text := (self.slot / "stdout").read_text()) != wanted:
            found.append(f"stdout has {len(text.splitlines())} lines, not the {self.count} of an undisturbed run")
        diary = self.slot / "diary"
        if not diary.exists() or diary.read_text() != f"begun\n{wanted}":
            found.append("the file from the VM is not that of an undisturbed run")
        if (status := (self.slot / "boinc_finish_called").read_text().split()[0]) != "0":
            found.append(f"the job finished with {status}")
        until = time.monotonic() + 60
        while (left := self.left_behind()) and time.monotonic() < until:
            time.sleep(0.2)
        return found + [f"left behind: {each}" for each in left]

    def left_behind(self) -> list[str]:
        """Processes, and what a VM has on the host."""
        processes = [
            " ".join(each.info["cmdline"] or [])[:200]
            for each in psutil.process_iter(["cmdline"])
            if str(self.slot) in " ".join(each.info["cmdline"] or []) and each.pid != os.getpid()
        ]
        return processes + [str(path) for path in (*self.slot.glob("vm-*"), *ledger_dir().iterdir())]

    def end(self) -> None:
        """Whatever still runs."""
        for process in self.processes().values():
            with contextlib.suppress(psutil.Error):
                process.kill()


def kill_at_random(job: CheckpointedJob, kills: int, seed: int, say: Callable[[str], None] = print) -> list[str]:
    """Run the job to its end, with so many kills on the way; returns what went wrong."""
    chance = random.Random(seed)
    job.start()
    problems: list[str] = []

    def see_what_was_lost() -> None:
        if job.killed and job.lowest < job.safe:
            problems.append(
                f"kill {len(job.killed)} ({job.killed[-1]}) lost {job.safe - job.lowest} bytes that were kept"
            )

    for _ in range(2 * kills):  # not each one meets a process of the kind that it is for
        if len(job.killed) == kills:
            break
        before = job.checkpoints
        # A kill before the last one was recovered from is part of it; but the job has to get on now and then.
        if chance.random() < 0.7:
            job.until(lambda before=before: job.checkpoints > before or job.is_over)  # type: ignore[misc]
        pause = time.monotonic() + chance.uniform(0.0, 2.0 * job.period)
        job.until(lambda pause=pause: time.monotonic() >= pause)  # type: ignore[misc]
        if job.is_over:
            say(f"the job was over after {len(job.killed)} kills")
            break
        see_what_was_lost()
        most, kind = job.lines, chance.choice(KINDS)
        if job.kill(kind):
            say(f"{time.strftime('%H:%M:%S')} kill {len(job.killed)}: {kind} at line {most} of {job.count}")
    job.finish()
    see_what_was_lost()
    return problems + job.problems()
