"""Debian's own BOINC client in a directory of the test's, without root, and what it says of its tasks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from tests.brokers import free_port

from .project import ACCOUNT

PASSWORD = "loopback"

CONFIG = """<cc_config>
  <log_flags><task_debug>1</task_debug><checkpoint_debug>1</checkpoint_debug><app_msg_receive>{messages}</app_msg_receive>
    <trickle_debug>1</trickle_debug></log_flags>
  <options>
    <ncpus>{ncpus}</ncpus><skip_cpu_benchmarks>1</skip_cpu_benchmarks><no_gpus>1</no_gpus><no_info_fetch>1</no_info_fetch>
    <dont_contact_ref_site>1</dont_contact_ref_site><dont_use_vbox>1</dont_use_vbox><start_delay>0</start_delay>
    <report_results_immediately>1</report_results_immediately><no_priority_change>1</no_priority_change>
    <fetch_on_update>1</fetch_on_update><max_file_xfers_per_project>16</max_file_xfers_per_project>
    <max_file_xfers>16</max_file_xfers>
  </options>
</cc_config>
"""

PREFERENCES = """<global_preferences>
  <run_if_user_active>1</run_if_user_active><run_on_batteries>1</run_on_batteries><suspend_cpu_usage>0</suspend_cpu_usage>
  <leave_apps_in_memory>{leave}</leave_apps_in_memory><max_ncpus_pct>100</max_ncpus_pct><cpu_usage_limit>100</cpu_usage_limit>
  <work_buf_min_days>0.001</work_buf_min_days><work_buf_additional_days>0.001</work_buf_additional_days>
  <disk_interval>1</disk_interval><disk_max_used_gb>0</disk_max_used_gb><disk_max_used_pct>100</disk_max_used_pct>
  <disk_min_free_gb>0.01</disk_min_free_gb><ram_max_used_busy_pct>100</ram_max_used_busy_pct>
  <ram_max_used_idle_pct>100</ram_max_used_idle_pct><network_wifi_only>0</network_wifi_only>
</global_preferences>
"""


@attrs.frozen
class TaskState:
    """A task as `boinccmd --get_tasks` tells it."""

    name: str
    state: str  # such as "downloading", "uploading", "aborted by user"
    active_state: str  # such as EXECUTING, SUSPENDED, UNINITIALIZED
    scheduler_state: str
    exit_status: int
    signal: int
    suspended_via_gui: bool
    fraction: float
    current_cpu_s: float
    checkpoint_cpu_s: float
    slot: int


class RealClient:
    """One `boinc` with its data directory. `stop()` ends it and what it runs."""

    def __init__(self, directory: Path, *, ncpus: int = 4, leave_in_memory: bool = True) -> None:
        self.directory = directory
        directory.mkdir()
        self.port = free_port()
        (directory / "gui_rpc_auth.cfg").write_text(PASSWORD)
        (directory / "cc_config.xml").write_text(CONFIG.format(ncpus=ncpus, messages=0))
        self._process: subprocess.Popen[bytes] | None = None
        self.write_preferences(leave_in_memory=leave_in_memory)

    def write_preferences(self, *, leave_in_memory: bool) -> None:
        text = PREFERENCES.format(leave=int(leave_in_memory))
        (self.directory / "global_prefs_override.xml").write_text(text)
        if self._process is not None:
            self.command("--read_global_prefs_override")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start it and wait until it answers."""
        program = shutil.which("boinc") or "boinc"  # by our PATH; the environment may have another
        with (self.directory / "client.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--dir", str(self.directory), "--gui_rpc_port", str(self.port), "--allow_multiple_clients"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.wait(lambda: self._answers(), "the client answers")

    def kill(self) -> None:
        """kill -9: as a crash or a power cut ends it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def quit(self) -> None:
        """As the volunteer ends it; it ends its tasks first."""
        assert self._process is not None
        self.command("--quit")
        self._process.wait(60)
        self._process = None

    def stop(self) -> None:
        """Whatever happened before: nothing of it runs afterwards."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def command(self, *words: str) -> str:
        """`boinccmd` with these words; what it printed."""
        done = subprocess.run(
            ["boinccmd", "--host", f"127.0.0.1:{self.port}", "--passwd", PASSWORD, *words],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode or "Operation failed" in done.stderr + done.stdout:
            raise RuntimeError(f"boinccmd {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def attach(self, url: str) -> None:
        self.command("--project_attach", url, ACCOUNT)

    def update(self, url: str) -> None:
        """Make it ask the scheduler now."""
        with contextlib.suppress(RuntimeError):  # an operation of its own is under way
            self.command("--project", url, "update")

    def tasks(self) -> dict[str, TaskState]:
        """By name."""
        found = {}
        for block in re.split(r"^\d+\) -+$", self.command("--get_tasks"), flags=re.MULTILINE)[1:]:
            values = {
                key.strip(): value.strip() for key, _, value in (line.partition(": ") for line in block.splitlines())
            }
            task = TaskState(
                name=values["name"],
                state=values.get("state", ""),
                active_state=values.get("active_task_state", ""),
                scheduler_state=values.get("scheduler state", ""),
                exit_status=int(values.get("exit_status", 0)),
                signal=int(values.get("signal", 0)),
                suspended_via_gui=values.get("suspended via GUI", "no") == "yes",
                fraction=float(values.get("fraction done", 0)),
                current_cpu_s=float(values.get("current CPU time", 0)),
                checkpoint_cpu_s=float(values.get("CPU time at last checkpoint", 0)),
                slot=int(values.get("slot", -1)),
            )
            found[task.name] = task
        return found

    def slot_of(self, result: str) -> Path:
        """The slot directory in which a result runs."""
        for slot in (self.directory / "slots").iterdir():
            with contextlib.suppress(OSError):
                if f"<result_name>{result}</result_name>" in (slot / "init_data.xml").read_text():
                    return slot
        raise LookupError(result)

    def log(self) -> str:
        return (self.directory / "client.log").read_text("utf-8", "replace")

    def wait(self, what: Callable[[], object], meaning: str, deadline_s: float = 60.0) -> None:
        """Until it is true; else the end of the client's log says what happened instead."""
        until = time.monotonic() + deadline_s
        while not what():
            if time.monotonic() > until:
                raise AssertionError(f"not within {deadline_s:.0f} s: {meaning}\n{self.log()[-6000:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            self.command("--get_cc_status")
        except RuntimeError:
            return False
        return True
