"""Ways to copy files into the guest of the benchmark `copy` and out of it, each with SHA-256 at both ends."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Protocol

import attrs

from benchmarks.agent import VM, Agent
from benchmarks.peers.image import SHARED
from benchmarks.peers.qga import GuestAgent
from benchmarks.peers.ssh import Ssh

CHIRP_PORT = 9094
CHIRP_DEADLINE = 60.0  # seconds; its tools try again and again when they get no answer
HOME = "/home/vmwrapper"
# Of a file, or of each file in a directory.
_HASH = 'if [ -d "$1" ]; then cd "$1" && find . -type f -exec sha256sum {} +; else sha256sum "$1"; fi >/dev/null'


class Copier(Protocol):
    """Copies a file or a directory; names in the guest are relative to its user's home."""

    def put(self, source: Path, there: str) -> None: ...
    def get(self, there: str, here: Path) -> None: ...


@attrs.frozen
class Ours:
    """The host agent's own copies, which hash while they stream."""

    agent: Agent

    def put(self, source: Path, there: str) -> None:
        self.agent.call("put", vm=VM, source=str(source), destination=there)

    def get(self, there: str, here: Path) -> None:
        self.agent.call("get", vm=VM, source=there, destination=str(here))


@attrs.frozen
class Hashing:
    """A peer that does not hash: sha256sum in the guest, and here, after its copy."""

    plain: Copier
    agent: Agent

    def put(self, source: Path, there: str) -> None:
        self.plain.put(source, there)
        self._hash(there, source)

    def get(self, there: str, here: Path) -> None:
        self.plain.get(there, here)
        self._hash(there, here)

    def _hash(self, there: str, here: Path) -> None:
        self.agent.run("sh", "-c", _HASH, "sh", there)
        for path in [here] if here.is_file() else [each for each in here.iterdir() if each.is_file()]:
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")


@attrs.frozen
class Scp:
    """scp over a connection that stays; of a directory, one file after the other."""

    ssh: Ssh

    def put(self, source: Path, there: str) -> None:
        self.ssh.copy("-r", str(source), self.ssh.there(there))

    def get(self, there: str, here: Path) -> None:
        self.ssh.copy("-r", self.ssh.there(there), str(here))


@attrs.frozen
class ScpEach:
    """One scp for each file, over a connection that stays."""

    ssh: Ssh
    agent: Agent

    def put(self, source: Path, there: str) -> None:
        self.agent.run("mkdir", there)
        for file in source.iterdir():
            self.ssh.copy(str(file), self.ssh.there(f"{there}/{file.name}"))

    def get(self, there: str, here: Path) -> None:
        here.mkdir()
        for name in self.agent.run("ls", there).split():
            self.ssh.copy(self.ssh.there(f"{there}/{name}"), str(here / name))


@attrs.frozen
class Qga:
    """qemu-guest-agent's guest-file-write and -read; of a directory, one file after the other."""

    guest: GuestAgent
    agent: Agent

    def put(self, source: Path, there: str) -> None:
        if source.is_file():
            self.guest.put(source, f"{HOME}/{there}")
            return
        self.agent.run("mkdir", there)
        for file in source.iterdir():
            self.guest.put(file, f"{HOME}/{there}/{file.name}")

    def get(self, there: str, here: Path) -> None:
        names = self.agent.run("ls", "-p", there).split()
        if names == [there]:
            self.guest.get(f"{HOME}/{there}", here)
            return
        here.mkdir()
        for name in names:
            self.guest.get(f"{HOME}/{there}/{name}", here / name)


@attrs.frozen
class VirtioFs:
    """A copy between a directory that both see and the guest's own disk; the host's end is not copied again."""

    shared: Path
    agent: Agent

    def put(self, source: Path, there: str) -> None:
        if not (self.shared / source.name).exists():
            raise RuntimeError(f"{source} is to be in the shared directory before the clock starts")
        self.agent.run("cp", "-r", f"{SHARED}/{source.name}", there)

    def get(self, there: str, here: Path) -> None:
        self.agent.run("cp", "-r", there, f"{SHARED}/{here.name}")
        (self.shared / here.name).rename(here)

    def share(self, source: Path) -> None:
        """What is to be copied into the guest."""
        target = self.shared / source.name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


@attrs.frozen
class Chirp:
    """Debian's chirp_put and chirp_get with a chirp_server in the guest; they check no digest of their own."""

    server: str  # HOST:PORT

    def put(self, source: Path, there: str) -> None:
        self._run("chirp_put", str(source), self.server, there)

    def get(self, there: str, here: Path) -> None:
        self._run("chirp_get", self.server, there, str(here))

    def _run(self, tool: str, *words: str) -> None:
        done = subprocess.run(
            [tool, "-t", f"{CHIRP_DEADLINE:.0f}", *words],
            capture_output=True,
            text=True,
            timeout=CHIRP_DEADLINE,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{tool}: {done.stdout} {done.stderr}")


def serve_chirp(agent: Agent, door: int) -> Chirp:
    """Start the guest's chirp_server, which lets the host in by its address."""
    script = "mkdir -p .chirp && echo 'address:10.0.2.2 rwlda' > .chirp/acl && exec chirp_server -r . -u - "
    script += f"-p {CHIRP_PORT} -a address -A .chirp/acl"
    agent.client.start("run", {"vm": VM, "argv": ["sh", "-c", script]})
    chirp = f"127.0.0.1:{door}"
    agent.run(
        "sh", "-c", f"for i in $(seq 100); do grep -q :{CHIRP_PORT:04X} /proc/net/tcp && exit; sleep 0.1; done; exit 1"
    )
    return Chirp(chirp)
