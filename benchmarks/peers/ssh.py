"""OpenSSH: its client, over a connection that stays or a new one each time, and a server on this host's loopback."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import psutil

from tests.brokers import free_port

from .packages import Unavailable, need

SSHD = "/usr/sbin/sshd"
DEADLINE = 300.0  # seconds
SERVER = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host-key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
UseDNS no
StrictModes no
PasswordAuthentication no
MaxSessions 64
MaxStartups 100
SetEnv SHLVL=1
Subsystem sftp internal-sftp
"""  # with SHLVL bash does not take itself for the first shell, and leaves the user's own start-up file out


@attrs.frozen
class Ssh:
    """The client; `control` is the socket of a connection that stays, or `none`."""

    port: int
    key: Path
    user: str
    control: str = "none"

    def options(self, port: str = "-p") -> list[str]:
        words = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        words += [f"ControlPath={self.control}", "ConnectTimeout=60"]
        flags = [word for option in words for word in ("-o", option)]
        return ["-F", "none", "-i", str(self.key), port, str(self.port), *flags]

    @property
    def target(self) -> str:
        return f"{self.user}@127.0.0.1"

    def run(self, *argv: str, count: int = 1) -> None:
        """Run a program there, `count` times at once."""
        words = ["ssh", *self.options(), self.target, *argv]
        running = [subprocess.Popen(words, stdin=subprocess.DEVNULL) for _ in range(count)]
        for each in running:
            if each.wait(DEADLINE):
                raise RuntimeError(f"ssh ended with {each.returncode}")

    def output(self, *argv: str) -> str:
        words = ["ssh", *self.options(), self.target, *argv]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=DEADLINE, check=True)
        return done.stdout.decode()

    def there(self, path: str) -> str:
        """How scp names a path of the other side."""
        return f"{self.target}:{path}"

    def copy(self, *words: str) -> None:
        """scp."""
        argv = ["scp", "-q", *self.options("-P"), *words]
        subprocess.run(argv, stdin=subprocess.DEVNULL, timeout=DEADLINE, check=True)

    @contextmanager
    def master(self) -> Iterator[None]:
        """The connection that stays."""
        argv = ["ssh", "-M", "-N", *self.options(), self.target]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        try:
            _wait_for(Path(self.control).exists, process)
            yield
        finally:
            process.terminate()
            process.wait(DEADLINE)


def make_key(file: Path) -> Path:
    """A new key pair; FILE and FILE.pub."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


@contextmanager
def local_ssh(folder: Path) -> Iterator[Ssh]:
    """A server of its own on the loopback, for this user, and a connection to it that stays."""
    need("openssh-client", "openssh-server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it asks for it before it serves as root
    port = free_port()
    make_key(folder / "host-key")
    (folder / "sshd_config").write_text(SERVER.format(port=port, folder=folder))
    log = folder / "sshd.log"
    server = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)])
    ssh = Ssh(port, make_key(folder / "key"), psutil.Process().username(), str(folder / "ssh.sock"))
    try:
        try:
            _wait_for(lambda: log.exists() and "Server listening" in log.read_text(), server)
        except RuntimeError:
            raise Unavailable(f"sshd does not serve here: {log.read_text()[-300:]}") from None
        with ssh.master():
            yield ssh
    finally:
        server.terminate()
        server.wait(DEADLINE)


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Neither of them says that it is ready to who started it."""
    until = time.monotonic() + DEADLINE
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{process.args!r} does not do its work")
        time.sleep(0.05)
