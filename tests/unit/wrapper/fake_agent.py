"""A host agent that has no VMs: a directory is the guest. Speaks docs/control.md, and fails as it is told.

    python fake_agent.py GUEST_DIRECTORY [ACTION=CALL ...] --state DIRECTORY

`refuse=CALL` answers it with an error, `die=CALL` ends the process, `die-once=CALL` only the first time,
`lose-once=run` loses the VM at the program's end, `lose-vm-once=CALL` at that call; `exists-once=start_vm` says that
somebody else has started it, `early=1` ends it before it is ready, `keep=1` lets the VM and its commands outlive it, as
a real agent with a state directory does. The directory is that of the VM CernVM; others are beside it. Every call is
appended to GUEST_DIRECTORY/../calls.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

GUEST = Path(sys.argv[1])
PLAN = dict(word.split("=", 1)[::-1] for word in sys.argv[2:] if "=" in word)
KEEP = "keep=1" in sys.argv[2:]
STATE = GUEST.parent / "agent-state"  # of every command: ID.pid, and ID.status once it ended


class ExistsError(Exception):
    """A VM of that name is there."""


class Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.lock = threading.Lock()

    def send(self, **message: Any) -> None:
        with self.lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> None:
        for line in self.sock.makefile("rb"):
            request = json.loads(line)
            number, call, args = request["id"], request["call"], request["args"]
            with (GUEST.parent / "calls").open("a") as file:
                file.write(f"{call} {json.dumps(args)}\n")
            action = PLAN.get(call)
            if action == "die-once":
                with contextlib.suppress(FileExistsError):
                    (GUEST.parent / "died").touch(exist_ok=False)
                    action = "die"
            if action == "die":
                print(f"the fake agent dies at {call}", file=sys.stderr, flush=True)
                os._exit(9)
            if action == "refuse":
                self.send(
                    id=number,
                    error={
                        "code": REFUSALS.get(call, "vm_failed"),
                        "message": f"No {call} today.",
                        "hint": "try later",
                    },
                )
            elif call == "shutdown":
                end_all()
                self.send(id=number, done={})
                os._exit(0)
            elif action == "lose-vm-once" and not (GUEST.parent / "lost").exists():
                (GUEST.parent / "lost").touch()
                (STATE / f"vm-{args['vm']}").unlink()
                self.send(id=number, error={"code": "copy_failed", "message": "The VM is gone.", "hint": ""})
            elif action == "undone-once" and not (GUEST.parent / "undone").exists():
                (GUEST.parent / "undone").touch()
                self.send(id=number, error={"code": "undone", "message": "The VM went back.", "hint": ""})
            elif call == "stop_vm":
                self.send(id=number, done={"vm": args["vm"], "cpu_s": 3.0, "wall_s": 20.0, "paused_s": 5.0})
            elif call == "run":
                threading.Thread(target=self.run, args=(number, args), daemon=True).start()
            else:
                try:
                    self.send(id=number, done=getattr(self, f"do_{call}", self.nothing)(**args))
                except OSError as error:
                    self.send(id=number, error={"code": "copy_failed", "message": str(error), "hint": ""})
                except ExistsError:
                    self.send(id=number, error={"code": "vm_exists", "message": "it is there", "hint": ""})

    def nothing(self, **_args: Any) -> dict[str, Any]:
        return {}

    def do_vms(self) -> dict[str, Any]:
        return {"vms": [describe(file.name.removeprefix("vm-")) for file in STATE.glob("vm-*")]}

    def do_start_vm(self, vm: str, **_args: Any) -> dict[str, Any]:
        while (GUEST.parent / "slow-start").exists():
            time.sleep(0.02)
        if PLAN.get("start_vm") == "exists-once" and not (STATE / f"vm-{vm}").exists():
            home(vm).mkdir(exist_ok=True)
            (STATE / f"vm-{vm}").write_text(f"i-{os.getpid()}")
            raise ExistsError
        home(vm).mkdir(exist_ok=True)
        (STATE / f"vm-{vm}").write_text(f"i-{os.getpid()}")
        return describe(vm)

    def do_put(self, vm: str, source: str, destination: str, **_args: Any) -> dict[str, Any]:
        return {"copied": str(shutil.copy(source, home(vm) / destination))}

    def do_get(self, vm: str, source: str, destination: str, **_args: Any) -> dict[str, Any]:
        whole = shutil.copy(home(vm) / source, f"{destination}.part")  # as the real one: whole, or not at all
        copied = Path(whole).replace(destination)
        return {"copied": str(copied), "sha256": copied.read_bytes().hex()}

    def do_signal(self, command: str, signal: str) -> dict[str, Any]:
        signal_command(command, SIGNALS[signal])
        return {}

    def run(self, number: int, args: dict[str, Any]) -> None:
        command = args["command"]
        with BEGINNING:
            if not (STATE / f"{command}.pid").exists():
                try:
                    begin(command, args)
                except OSError as error:
                    self.send(id=number, done={"outcome": "not_started", "reason": str(error), "command": command})
                    return
        pid = int((STATE / f"{command}.pid").read_text())
        self.send(id=number, update="started", data={"command": command, "pid": pid})
        self.send(id=number, update="output", data={"stream": "stdout", "data": base64.b64encode(b"x").decode()})
        status = STATE / f"{command}.status"
        while not status.exists() and runs(pid):
            time.sleep(0.02)
        with contextlib.suppress(OSError):
            fraction = float((home(args["vm"]) / args["fraction_file"]).read_text())
            self.send(id=number, update="fraction", data={"fraction": fraction})
        self.send(id=number, update="usage", data={"cpu_s": 0.25, "rss_bytes": 1})
        if PLAN.get("run") == "lose-once" and not (GUEST.parent / "lost").exists():
            (GUEST.parent / "lost").touch()
            (STATE / f"vm-{args['vm']}").write_text("crashed")
            self.send(id=number, done={"outcome": "lost", "reason": "The VM is gone.", "command": command})
            return
        if PLAN.get("run") == "power-off":
            (STATE / f"vm-{args['vm']}").write_text("stopped")
            reason = f"The VM {args['vm']} was powered off by its guest"
            self.send(id=number, done={"outcome": "lost", "reason": reason, "command": command})
            return
        if status.exists():
            done: dict[str, Any] = {"outcome": "exited", "exit_code": int(status.read_text())}
        else:
            done = {"outcome": "signalled", "signal": "KILL", "reason": PLAN.get("run", "")}
        self.send(id=number, done={**done, "user_s": 1.5, "system_s": 0.5, "command": command})


def begin(command: str, args: dict[str, Any]) -> None:
    if "/" in args["argv"][0]:
        (home(args["vm"]) / args["argv"][0]).stat()
    stdin = home(args["vm"]) / args["stdin"] if args["stdin"] else Path(os.devnull)
    with stdin.open("rb") as in_, Path(args["stdout"]).open("ab") as out, Path(args["stderr"]).open("ab") as err:
        process = subprocess.Popen(
            ["sh", "-c", '"$@"; echo $? > "$0.new"; mv "$0.new" "$0"', f"{STATE}/{command}.status", *args["argv"]],
            cwd=home(args["vm"]) / args["cwd"],
            env={**os.environ, **args["env"]},
            stdin=in_,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    (STATE / f"{command}.pid").write_text(str(process.pid))
    threading.Thread(target=process.wait, daemon=True).start()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def signal_command(command: str, number: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.killpg(int((STATE / f"{command}.pid").read_text()), number)


def end_all() -> None:
    for file in STATE.glob("*.pid"):
        signal_command(file.stem, signal.SIGKILL)
    shutil.rmtree(STATE, ignore_errors=True)
    for guest in GUEST.parent.glob(f"{GUEST.name}*"):
        shutil.rmtree(guest, ignore_errors=True)


def home(vm: str) -> Path:
    return GUEST if vm == "CernVM" else GUEST.with_name(f"{GUEST.name}-{vm}")


def describe(vm: str) -> dict[str, Any]:
    instance = (STATE / f"vm-{vm}").read_text()
    return {
        "vm": vm,
        "instance": instance,
        "state": instance if instance in ("crashed", "stopped", "saved") else "running",
        "agent": "present",
        "pid": os.getpid(),
    }


BEGINNING = threading.Lock()  # a program is started and written down, or neither
REFUSALS = {"put": "copy_failed", "get": "copy_failed", "resume_vm": "refused"}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}


def owner_gone() -> None:
    sys.stdin.buffer.read()
    with BEGINNING:
        if not KEEP:
            end_all()
        os._exit(0)


def main() -> None:
    if PLAN.get("1") == "early":
        Path(sys.argv[-1]).mkdir(exist_ok=True)
        print("the fake agent cannot start", file=sys.stderr, flush=True)
        sys.exit(3)
    if not KEEP:
        end_all()
    STATE.mkdir(exist_ok=True)
    server = socket.socket(socket.AF_UNIX)
    path = f"{tempfile.mkdtemp(prefix='vmw-')}/s"
    server.bind(path)
    server.listen()
    threading.Thread(target=owner_gone, daemon=True).start()
    endpoint = {"agent": "h-fake", "pid": os.getpid(), "version": "0", "socket": path, "ready": True}
    print(json.dumps(endpoint), flush=True)
    while True:
        sock, _ = server.accept()
        threading.Thread(target=Connection(sock).serve, daemon=True).start()


if __name__ == "__main__":
    main()
