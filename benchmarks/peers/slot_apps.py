"""What the wrapper is compared with, in a slot of the client: programs that run `sh task.sh`, the wrapper's own task.

python -m benchmarks.peers.slot_apps polls       # a bare Python that looks once a second
python -m benchmarks.peers.slot_apps runtime     # BOINC's runtime and a wait for the end, and nothing else
"""

from __future__ import annotations

import sys

TASK = ("sh", "task.sh")


def polls() -> int:
    """No client, no messages: only whether the task has ended."""
    import subprocess
    import time
    from pathlib import Path

    child = subprocess.Popen(TASK)
    while child.poll() is None:
        time.sleep(1.0)
    Path("boinc_finish_called").write_text(f"{child.returncode}\n")
    return child.returncode


def runtime() -> int:
    """As an application that does nothing itself would be."""
    import os
    import select

    from host_agent.wrapper.boinc.application import Application, run
    from host_agent.wrapper.boinc.runtime import SERVICE_S

    def main(app: Application) -> int:
        pid = os.posix_spawnp(TASK[0], TASK, os.environ)
        ended = os.pidfd_open(pid)
        while not select.select([ended], [], [], SERVICE_S)[0]:
            app.step()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run(main)


if __name__ == "__main__":
    sys.exit({"polls": polls, "runtime": runtime}[sys.argv[1]]())
