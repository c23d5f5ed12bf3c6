"""A host agent that has no VMs: a directory is the guest. Speaks docs/control.md, and fails as it is told.

    python fake_agent.py GUEST_DIRECTORY [ACTION=CALL ...]

`refuse=CALL` answers it with an error, `die=CALL` ends the process, `early=1` ends it before it is ready.
Every call is appended to GUEST_DIRECTORY/../calls.
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
from pathlib import Path
from typing import Any

GUEST = Path(sys.argv[1])
PLAN = dict(word.split("=", 1)[::-1] for word in sys.argv[2:])
RUNNING: dict[str, subprocess.Popen[bytes]] = {}


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
            if action == "die":
                print(f"the fake agent dies at {call}", file=sys.stderr, flush=True)
                os._exit(9)
            if action == "refuse":
                self.send(id=number, error={"code": "vm_failed", "message": f"No {call} today.", "hint": "try later"})
            elif call == "shutdown":
                shutil.rmtree(GUEST)
                self.send(id=number, done={})
                os._exit(0)
            elif call == "run":
                threading.Thread(target=self.run, args=(number, args), daemon=True).start()
            else:
                self.send(id=number, done=getattr(self, f"do_{call}", self.nothing)(**args))

    def nothing(self, **_args: Any) -> dict[str, Any]:
        return {}

    def do_vms(self) -> dict[str, Any]:
        return {"vms": []}

    def do_put(self, vm: str, source: str, destination: str) -> dict[str, Any]:
        return {"copied": str(shutil.copy(source, GUEST / destination))}

    def do_get(self, vm: str, source: str, destination: str) -> dict[str, Any]:
        return {"copied": str(shutil.copy(GUEST / source, destination))}

    def do_signal(self, command: str, signal: str) -> dict[str, Any]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(RUNNING[command].pid, SIGNALS[signal])
        return {}

    def run(self, number: int, args: dict[str, Any]) -> None:
        stdin = GUEST / args["stdin"] if args["stdin"] else Path(os.devnull)
        try:
            with (
                stdin.open("rb") as in_,
                Path(args["stdout"]).open("ab") as out,
                Path(args["stderr"]).open("ab") as err,
            ):
                process = subprocess.Popen(
                    args["argv"],
                    cwd=GUEST / args["cwd"],
                    env={**os.environ, **args["env"]},
                    stdin=in_,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
        except OSError as error:
            self.send(id=number, done={"outcome": "not_started", "reason": str(error), "command": "c-1"})
            return
        RUNNING["c-1"] = process
        self.send(id=number, update="started", data={"command": "c-1", "pid": process.pid})
        self.send(id=number, update="output", data={"stream": "stdout", "data": base64.b64encode(b"x").decode()})
        status = process.wait()
        with contextlib.suppress(OSError):
            fraction = float((GUEST / args["fraction_file"]).read_text())
            self.send(id=number, update="fraction", data={"fraction": fraction})
        self.send(id=number, update="usage", data={"cpu_s": 0.25, "rss_bytes": 1})
        if status < 0:
            done: dict[str, Any] = {"outcome": "signalled", "signal": signal.Signals(-status).name[3:]}
        else:
            done = {"outcome": "exited", "exit_code": status}
        self.send(id=number, done={**done, "user_s": 1.5, "system_s": 0.5, "command": "c-1"})


SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}


def owner_gone() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    if "1" in PLAN:
        print("the fake agent cannot start", file=sys.stderr, flush=True)
        sys.exit(3)
    GUEST.mkdir()
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
