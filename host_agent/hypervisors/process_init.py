"""Process 1 of a guest that is no VM: starts the guest agent, and again whenever it ends, until it is told to end.

Run by path with `python -I -S`: arguments are the agent's own command line.
"""

import os
import signal
import subprocess
import sys
import time

PATIENCE = 10.0  # seconds that the agent may take to end
MOST_WAIT = 5.0  # seconds between an agent that ends at once and the next


def main() -> int:
    ending = False
    agent = None

    def end(number: int, frame: object) -> None:
        nonlocal ending
        ending = True
        if agent is not None:
            agent.terminate()

    signal.signal(signal.SIGTERM, end)
    wait = 0.0
    while not ending:
        began = time.monotonic()
        agent = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stderr=sys.stdout)  # its log is the console
        if ending:
            agent.terminate()
        while agent.poll() is None:
            try:
                agent.wait(PATIENCE if ending else None)
            except subprocess.TimeoutExpired:
                agent.kill()
        wait = 0.0 if time.monotonic() - began > 1 else min(wait + 0.1, MOST_WAIT)
        time.sleep(wait)
    return 0


if __name__ == "__main__":
    os.chdir(os.environ["HOME"])
    sys.exit(main())
