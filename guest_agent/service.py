"""`--install` and `--uninstall`: the agent as a service of this machine, started at boot and again when it dies.

The files go to /usr/lib/vmwrapper-guest-agent, byte-compiled by this machine's own Python. Which kind of service is
made depends on the init that is here: systemd, OpenRC, or /etc/inittab (System V's init and busybox's); where there is
none of them, the command that this machine's own init is to keep running is printed. Doing it again changes nothing.
"""

from __future__ import annotations

import argparse
import enum
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import attrs

from common.errors import ConfigError, VMwrapperError

from .privileged import USER

NAME = "vmwrapper-guest-agent"
PLACE = Path("usr/lib") / NAME
UNIT = Path("etc/systemd/system") / f"{NAME}.service"
WANTED = Path("etc/systemd/system/multi-user.target.wants") / f"{NAME}.service"
OPENRC = Path("etc/init.d") / NAME
RUNLEVEL = Path("etc/runlevels/default") / NAME
INITTAB = Path("etc/inittab")
MARK = f"# {NAME}"
LAUNCHER = "launch"  # in an agent with a Python of its own
TIMEOUT = 60.0  # seconds for one command of the init

_UNIT = """\
[Unit]
Description=VMwrapper guest agent
After=local-fs.target systemd-udevd.service network.target
StartLimitIntervalSec=0

[Service]
ExecStart={command}
Restart=always
RestartSec=1
# The keeper and the tasks that it holds outlive an agent that dies.
KillMode=process

[Install]
WantedBy=multi-user.target
"""

_OPENRC = """\
#!/sbin/openrc-run
description="VMwrapper guest agent"
supervisor=supervise-daemon
command="{program}"
command_args="{arguments}"
respawn_delay=1
respawn_max=0

depend() {{
    after localmount net
}}
"""


class Init(enum.Enum):
    SYSTEMD = "systemd"
    OPENRC = "openrc"
    SYSV = "sysv"
    BUSYBOX = "busybox"
    OTHER = "other"


@attrs.frozen
class Machine:
    """What is installed on: `root` is / but in tests and when an image is made; there nothing is started."""

    root: Path
    init: Init

    @property
    def live(self) -> bool:
        """Whether this is a running machine, and not the root of one that is being made."""
        return self.root == Path("/") and Path("/proc/1/stat").exists()


def find_init(root: Path) -> Init:
    """The init of the machine whose root file system is `root`."""
    target = os.path.realpath(root / "sbin/init")
    if (root / "run/systemd/system").is_dir() or target.endswith("/systemd"):
        return Init.SYSTEMD
    if (root / "sbin/openrc-run").exists():
        return Init.OPENRC
    if (root / INITTAB).exists():
        return Init.BUSYBOX if "busybox" in Path(target).name else Init.SYSV
    return Init.BUSYBOX if "busybox" in Path(target).name else Init.OTHER


def main(root: str) -> int:
    """`root` is what is installed: the directory of our packages, or the archive that holds them."""
    parser = argparse.ArgumentParser(prog=NAME, description="Make the guest agent a service of this machine.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--install", action="store_true", help="install, enable and start it; again changes nothing")
    action.add_argument("--uninstall", action="store_true", help="stop and remove it; its user and home stay")
    parser.add_argument("--root", type=Path, default=Path("/"), help="another root file system; starts nothing there")
    parser.add_argument("--keep-files", action="store_true", help="the files are in place; make the service only")
    parser.add_argument("--init", choices=[each.value for each in Init], help="default: the one that is found")
    options = parser.parse_args()
    machine = Machine(options.root, Init(options.init) if options.init else find_init(options.root))
    try:
        if machine.root == Path("/") and os.geteuid() != 0:
            raise ConfigError("only root can make the guest agent a service", "run this with sudo, or as root")
        if options.uninstall:
            uninstall(machine)
        else:
            install(machine, None if options.keep_files else Path(root))
    except OSError as error:
        print(f"{NAME}: {error.filename or 'installing'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except VMwrapperError as error:
        print(f"{NAME}: {error.explain()}", file=sys.stderr)
        return 1
    return 0


def install(machine: Machine, source: Path | None) -> None:
    """`source` is None when the files are where they belong."""
    changed = _install_files(machine, source) if source is not None else False
    changed = _make_user(machine) or changed
    changed = _make_service(machine) or changed
    if machine.live and machine.init is not Init.OTHER:
        _start(machine.init, changed)
    how = "" if machine.live and machine.init is not Init.OTHER else "; it starts at the next boot"
    if machine.init is Init.OTHER:
        how = f"; let this machine's init keep this running, as root: {' '.join(command(machine))}"
    print(f"{NAME}: {'installed' if changed else 'was installed already'} ({machine.init.value}){how}")


def command(machine: Machine) -> list[str]:
    """What the init is to run."""
    if (machine.root / PLACE / LAUNCHER).exists():
        return [f"/{PLACE / LAUNCHER}"]
    return [_python(), "-I", "-S", f"/{PLACE}/start.py"]


def _python() -> str:
    """This Python by the name that updates keep."""
    usual = "/usr/bin/python3"
    return usual if os.path.realpath(usual) == os.path.realpath(sys.executable) else sys.executable


# -- the files


def _install_files(machine: Machine, source: Path) -> bool:
    place = machine.root / PLACE
    new, old = place.with_name(f".{NAME}.new"), place.with_name(f".{NAME}.old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        _unpack(source, new)
        if _same(new, place):
            return False
        if not (new / LAUNCHER).exists():
            _compile(source, new)
        if place.exists():
            place.rename(old)
        new.rename(place)
        return True
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _unpack(source: Path, place: Path) -> None:
    if source.is_dir():
        # Byte code of a Python that comes with it fits; other byte code may be that of another Python.
        left_out = [] if (source / LAUNCHER).exists() else ["__pycache__"]
        shutil.copytree(source, place, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
        return
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            part, _, rest = name.partition("/")
            if part == "lib" and rest and not name.endswith("/"):
                target = place / rest
                target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    for directory, _, files in os.walk(place):
        Path(directory).chmod(0o755)
        for each in files:
            Path(directory, each).chmod(0o644)


def _compile(source: Path, place: Path) -> None:
    """Byte code that is used without a look at its source: the archive's own where it fits this Python."""
    if not source.is_dir():
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}/"
        with zipfile.ZipFile(source) as archive:
            for name in archive.namelist():
                content = archive.read(name) if name.startswith(tag) and name.endswith(".pyc") else b""
                if content.startswith(importlib.util.MAGIC_NUMBER):
                    target = Path(importlib.util.cache_from_source(str(place / name[len(tag) : -1])))
                    target.parent.mkdir(mode=0o755, exist_ok=True)
                    target.write_bytes(content)
    for path in place.rglob("*.py"):
        if not Path(importlib.util.cache_from_source(str(path))).exists():
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            inside = f"/{PLACE / path.relative_to(place)}"
            py_compile.compile(str(path), dfile=inside, quiet=2, invalidation_mode=mode)


def _same(one: Path, other: Path) -> bool:
    def listing(place: Path) -> list[tuple[str, bytes]]:
        # Byte code says nothing that its source does not.
        files = sorted(path for path in place.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return [(str(path.relative_to(place)), path.read_bytes()) for path in files]

    return other.is_dir() and listing(one) == listing(other)


# -- the user


def _make_user(machine: Machine) -> bool:
    """The user of the agent and its tasks: no password fits it."""
    users = machine.root / "etc/passwd"
    if users.exists() and any(line.startswith(f"{USER}:") for line in users.read_text("utf-8").splitlines()):
        return False
    root = [] if machine.root == Path("/") else ["--root", str(machine.root)]
    if shutil.which("useradd"):
        _run(["useradd", *root, "--system", "--user-group", "--create-home", "--home-dir", f"/home/{USER}",
              "--shell", "/bin/sh", USER])  # fmt: skip
    elif machine.live and shutil.which("adduser"):
        _run(["adduser", "-D", "-h", f"/home/{USER}", "-s", "/bin/sh", USER])
    else:
        raise ConfigError(f"the user {USER} cannot be made: there is neither useradd nor adduser", "make it yourself")
    return True


# -- the service


def _make_service(machine: Machine) -> bool:
    root, words = machine.root, command(machine)
    if machine.init is Init.SYSTEMD:
        changed = _write(root / UNIT, _UNIT.format(command=" ".join(words)), 0o644)
        return _link(root / WANTED, f"/{UNIT}") or changed
    if machine.init is Init.OPENRC:
        script = _OPENRC.format(program=words[0], arguments=" ".join(words[1:]))
        changed = _write(root / OPENRC, script, 0o755)
        return _link(root / RUNLEVEL, f"/{OPENRC}") or changed
    if machine.init in (Init.SYSV, Init.BUSYBOX):
        table = root / INITTAB
        before = table.read_text("utf-8") if table.exists() else _BUSYBOX_DEFAULT
        identity = "vmw:2345" if machine.init is Init.SYSV else ":"
        line = f"{identity}:respawn:{' '.join(words)}"
        kept = _without_ours(before)
        return _write(table, f"{kept}{MARK}\n{line}\n", 0o644)
    return False


# What busybox's init does where there is no inittab, for its own console.
_BUSYBOX_DEFAULT = "::sysinit:/etc/init.d/rcS\n::ctrlaltdel:/sbin/reboot\n::shutdown:/bin/umount -a -r\n"


def _without_ours(table: str) -> str:
    lines = table.splitlines()
    kept = [line for number, line in enumerate(lines) if line != MARK and lines[max(0, number - 1)] != MARK]
    return "".join(f"{line}\n" for line in kept)


def _write(path: Path, text: str, mode: int) -> bool:
    """Whole or not at all; False when it was so already."""
    if path.exists() and path.read_text("utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, "utf-8")
    new.chmod(mode)
    new.replace(path)
    return True


def _link(path: Path, target: str) -> bool:
    if path.is_symlink() and str(path.readlink()) == target:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return True


def _start(init: Init, changed: bool) -> None:
    if init is Init.SYSTEMD:
        _run(["systemctl", "daemon-reload"])
        # Not waited for: at the first boot this may itself run inside of what the service comes after.
        _run(["systemctl", "--no-block", "restart" if changed else "start", f"{NAME}.service"])
    elif init is Init.OPENRC:
        _run(["rc-service", NAME, "restart" if changed else "start"])
    else:
        _end_agents()  # init starts it again, from the new files
        _run(["kill", "-HUP", "1"])


def uninstall(machine: Machine) -> None:
    root = machine.root
    there = (root / PLACE).exists()
    if machine.init is Init.SYSTEMD:
        if machine.live and (root / UNIT).exists():
            _run(["systemctl", "stop", f"{NAME}.service"])
        for path in (root / WANTED, root / UNIT):
            path.unlink(missing_ok=True)
        if machine.live:
            _run(["systemctl", "daemon-reload"])
    elif machine.init is Init.OPENRC:
        if machine.live and (root / OPENRC).exists():
            _run(["rc-service", NAME, "stop"])
        for path in (root / RUNLEVEL, root / OPENRC):
            path.unlink(missing_ok=True)
    elif (root / INITTAB).exists():
        _write(root / INITTAB, _without_ours((root / INITTAB).read_text("utf-8")), 0o644)
        if machine.live:
            _run(["kill", "-HUP", "1"])
            _end_agents()
    shutil.rmtree(root / PLACE, ignore_errors=True)
    if machine.live:
        shutil.rmtree("/run/vmwrapper", ignore_errors=True)
    print(f"{NAME}: {f'removed; the user {USER} and its home stay' if there else 'was not installed'}")


def _end_agents() -> None:
    """Tell every agent that runs from our place to end."""
    import signal

    start = f"/{PLACE}/".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if any(word.startswith(start) for word in (entry / "cmdline").read_bytes().split(b"\0")):
                os.kill(int(entry.name), signal.SIGTERM)
        except OSError:
            continue  # it has ended


def _run(words: list[str]) -> None:
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{words[0]} could not be run: {error}") from None
    if done.returncode:
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ConfigError(f"{' '.join(words)} ended with status {done.returncode}: {(told or ['no reason given'])[-1]}")
