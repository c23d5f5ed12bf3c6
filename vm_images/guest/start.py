"""Starts the guest agent as the user of the tasks, with its own libraries.

Run as root by `python3 -I -S`: without site.py and without a program that only changes the user,
each of which would cost an emulated machine part of a second.

Where the hypervisor gives the machine a line to its host, a child that stays root listens to it (`listen` below), and
the agent hears of it through its standard input.
"""

import fcntl
import json
import os
import select
import socket
import struct
import sys
import time

USER = GROUP = 1000  # vmwrapper, as customize.sh makes it
PORTS = "/sys/class/virtio-ports"
LINE = "org.vmwrapper.host"
CONFIG = "/run/vmwrapper/config.json"
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
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
    """Do what the host says: the clock, random numbers, the settings. Tell the agent of it; end when it does."""
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
                stir(bytes.fromhex(told.pop("seed")))
                time.clock_settime(time.CLOCK_REALTIME, told["time"])
                if "config" in told:
                    settle(told["config"])
                    told["config"] = True
                agent.sendall(json.dumps(told).encode() + b"\n")
            except (ValueError, KeyError, TypeError, OSError) as error:
                print(f"start: a line from the host was of no use: {error!r}", file=sys.stderr, flush=True)


def stir(seed: bytes) -> None:
    """New random numbers: clones of a machine, and a machine restored twice, would all have the same ones."""
    with open("/dev/random", "wb", buffering=0) as pool:  # noqa: PTH123
        fcntl.ioctl(pool, RNDADDENTROPY, struct.pack(f"ii{len(seed)}s", 8 * len(seed), len(seed), seed))
        fcntl.ioctl(pool, RNDRESEEDCRNG)


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
