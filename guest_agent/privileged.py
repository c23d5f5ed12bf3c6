"""Finds the settings as root, then becomes the guest agent as the user of the tasks.

Run as root by `start.py`, with `python3 -I -S`: without site.py and without a program that only changes the user,
each of which would cost an emulated machine part of a second.

A child that stays root keeps looking for what only root may see: the line to the host, where the hypervisor gives the
machine one, and settings that have changed because the machine was restored elsewhere (`discovery.py`). The agent
hears of both through its standard input.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import sys
import time
from typing import Any

from . import exchange
from .discovery import discover, usable

USER = "vmwrapper"
NUMBER = 1000  # of the user, where no list of users names it
TASKS = "/usr/lib/vmwrapper/tasks.json"  # user, home and environment of tasks, in images made from containers
PORTS = "/sys/class/virtio-ports"
LINE = "org.vmwrapper.host"
CONFIG = "/run/vmwrapper/config.json"
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
LONGEST = 128 * 1024  # bytes of a line: settings are in one
LOOK_AGAIN = 1.0  # seconds, while there are no settings
WATCH = 15.0  # seconds between looks at settings that may change


def main(root: str) -> int:
    """Never returns but with the agent's exit status. `root` is the directory of our packages."""
    if os.getuid() == 0:
        user, group, home, environment = who()
        os.umask(0o022)
        os.makedirs(os.path.dirname(CONFIG), mode=0o755, exist_ok=True)  # noqa: PTH103, PTH120
        device = port()
        if disk := exchange.find():
            os.chown(disk, user, group)
        found = discover(gateway=device is None)
        if found is not None:
            settle(found[1], user, group)
        elif device is None:
            say("no settings yet on a config drive, in fw_cfg, guest properties, the command line or at the gateway")
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            keep_watch(device, theirs, found[0] if found else "", (user, group))
        theirs.close()
        os.dup2(ours.fileno(), 0)
        ours.close()
        sys.argv.insert(1, "--host-line")
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        os.environ.update(environment)
        os.environ.update({"HOME": home, "USER": USER, "LOGNAME": USER})
        os.chdir(home)
    from .main import main as agent

    return agent()


def who() -> tuple[int, int, str, dict[str, str]]:
    """User, group, home and environment that tasks have."""
    user = group = NUMBER
    home = f"/home/{USER}"
    environment: dict[str, str] = {}
    try:
        import pwd

        entry = pwd.getpwnam(USER)
        user, group, home = entry.pw_uid, entry.pw_gid, entry.pw_dir
    except (ImportError, KeyError):
        pass  # an image without a list of users
    try:
        with open(TASKS, encoding="utf-8") as file:  # noqa: PTH123
            tasks: dict[str, Any] = json.load(file)
        user, group, home = tasks["user"], tasks["group"], tasks["home"]
        environment = tasks["environment"]
    except FileNotFoundError:
        pass
    return user, group, home if os.path.isdir(home) else "/", environment  # noqa: PTH112


def say(words: str) -> None:
    print(f"start: {words}", file=sys.stderr, flush=True)


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


def keep_watch(device: str | None, agent: socket.socket, source: str, owner: tuple[int, int]) -> None:
    """Tell the agent what the host says and what has changed; end when it does. `source` is where settings came from.

    What came through the line is told again through the line, and nowhere else.
    """
    watcher = Watcher(agent, source, owner)
    line = open_line(device) if device is not None else -1
    waiting = select.poll()
    waiting.register(agent, select.POLLIN)
    if line >= 0:
        waiting.register(line, select.POLLIN)
    words = b""
    while True:
        ready = dict(waiting.poll(watcher.patience(line >= 0)))
        if agent.fileno() in ready:
            said = agent.recv(4096)
            if not said:
                os._exit(0)
            if line >= 0:
                os.write(line, said)
        if not ready:
            watcher.look(gateway=line < 0)
        if line not in ready:
            continue
        heard = os.read(line, 65536)
        if not heard:
            time.sleep(0.1)  # no host agent is connected, which the port tells by being readable all the time
            continue
        *lines, words = (words + heard).split(b"\n")
        words = words[:LONGEST]
        for each in lines:
            watcher.told(each)


class Watcher:
    """What the child of root knows of the settings."""

    def __init__(self, agent: socket.socket, source: str, owner: tuple[int, int]) -> None:
        self._agent = agent
        self._source = source
        self._owner = owner

    def patience(self, has_line: bool) -> float | None:
        """Milliseconds until the next look; None when nothing but the line can bring something new."""
        if self._source:
            return None if self._source == "line" else WATCH * 1000
        return None if has_line else LOOK_AGAIN * 1000

    def look(self, *, gateway: bool) -> None:
        """Take settings that are new, or not those that the agent has."""
        found = discover(gateway=gateway)
        if found is None:
            return
        before, self._source = self._source, found[0]
        if found[1].strip(b" \t\r\n\0") != current():
            settle(found[1], *self._owner)
            self._tell({"restored": bool(before), "changed": bool(before), "config": True})

    def told(self, line: bytes) -> None:
        """Do what the host says: the clock, random numbers, the settings; then the agent may hear of it."""
        try:
            told = json.loads(line)
            stir(bytes.fromhex(told.pop("seed")))
            time.clock_settime(time.CLOCK_REALTIME, told["time"])
            if "config" in told:
                settle(told["config"].encode("utf-8"), *self._owner)
                told["config"] = True
                self._source = "line"
            self._tell(told)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            say(f"a line from the host was of no use: {error!r}")

    def _tell(self, what: dict[str, Any]) -> None:
        try:
            self._agent.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            os._exit(0)  # the agent has ended


def stir(seed: bytes) -> None:
    """New random numbers: clones of a machine, and a machine restored twice, would all have the same ones."""
    with open("/dev/random", "wb", buffering=0) as pool:  # noqa: PTH123
        fcntl.ioctl(pool, RNDADDENTROPY, struct.pack(f"ii{len(seed)}s", 8 * len(seed), len(seed), seed))
        fcntl.ioctl(pool, RNDRESEEDCRNG)


def current() -> bytes | None:
    """The settings that the agent has."""
    try:
        with open(CONFIG, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return None


def settle(config: bytes, user: int, group: int) -> None:
    """The settings of this machine, for the agent alone."""
    config = config.strip(b" \t\r\n\0")
    if not usable(config):
        raise ValueError("these are no settings")
    new = f"{CONFIG}.new"
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400), "wb") as file:  # noqa: PTH123
        file.write(config)
        os.fchown(file.fileno(), user, group)
    os.replace(new, CONFIG)  # noqa: PTH105
