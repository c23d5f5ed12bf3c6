"""Starts the guest agent as the user of the tasks, with its own libraries.

Run as root by `python3 -I -S`: without site.py and without a program that only changes the user,
each of which would cost an emulated machine part of a second.

Where the hypervisor gives the machine a line to its host, a child that stays root listens to it (`listen` below), and
the agent hears of it through its standard input.
"""

import json
import os
import select
import socket
import sys
import time

USER = GROUP = 1000  # vmwrapper, as customize.sh makes it
PORTS = "/sys/class/virtio-ports"
LINE = "org.vmwrapper.host"
CONFIG = "/run/vmwrapper/config.json"
LONGEST = 128 * 1024  # bytes of a line: settings are in one


def port() -> str | None:
    """The device of the line to the host, or None."""
    try:
        for name in os.listdir(PORTS):  # noqa: PTH208
            with open(f"{PORTS}/{name}/name") as file:  # noqa: PTH123  (pathlib costs part of a second here)
                if file.read().strip() == LINE:
                    return f"/dev/{name}"
    except OSError:
        pass
    return None


def open_line(device: str) -> int:
    """Only one process can have it: the child of an agent that has just ended may take a moment to let it go."""
    for _ in range(50):
        try:
            return os.open(device, os.O_RDWR)
        except OSError:
            time.sleep(0.1)
    os._exit(1)


def listen(device: str, agent: socket.socket) -> None:
    """Set the clock and write the settings as the host says, tell the agent of it, and end when the agent does."""
    line = open_line(device)
    waiting = select.poll()
    waiting.register(line, select.POLLIN)
    waiting.register(agent, select.POLLIN)
    words = b""
    while True:
        ready = dict(waiting.poll())
        if agent.fileno() in ready:
            said = agent.recv(4096)
            if not said:
                os._exit(0)
            os.write(line, said)
        if line not in ready:
            continue
        heard = os.read(line, 65536)
        if not heard:
            time.sleep(0.1)  # no host agent is connected, which the port tells by being readable all the time
            continue
        *lines, words = (words + heard).split(b"\n")
        words = words[:LONGEST]
        for each in lines:
            try:
                told = json.loads(each)
                time.clock_settime(time.CLOCK_REALTIME, told["time"])
                if "config" in told:
                    settle(told["config"])
                    told["config"] = True
                agent.sendall(json.dumps(told).encode() + b"\n")
            except (ValueError, KeyError, TypeError, OSError) as error:
                print(f"start: a line from the host was of no use: {error!r}", file=sys.stderr, flush=True)


def settle(config: str) -> None:
    """The settings of this machine, for the agent alone."""
    with open(os.open(f"{CONFIG}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400), "w") as file:  # noqa: PTH123
        file.write(config)
        os.fchown(file.fileno(), USER, GROUP)
    os.replace(f"{CONFIG}.new", CONFIG)  # noqa: PTH105


if os.getuid() == 0:
    device = port()
    if device is not None:
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            listen(device, theirs)
        theirs.close()
        os.dup2(ours.fileno(), 0)
        ours.close()
        sys.argv.insert(1, "--host-line")
    os.setgroups([])
    os.setgid(GROUP)
    os.setuid(USER)
sys.path.insert(0, "/usr/lib/vmwrapper-guest-agent")

from guest_agent.main import main  # noqa: E402

sys.exit(main())
