"""The process in which pyvbox lives: `python -m host_agent.hypervisors.virtualbox.worker`.

A line of JSON on standard input is a call, a line on standard output its answer, or news of a watched machine:

    → {"id": 1, "call": "pause", "arguments": {"machine": "UUID"}}
    ← {"id": 1, "result": null}   or   {"id": 1, "error": "a sentence", "hint": "the next step"}
        with "lost": true when this process can be asked no more
    → {"id": 2, "call": "watch", "arguments": {"machine": "UUID"}}
    ← {"machine": "UUID", "state": "Running", "pid": 4711}         whenever either changes

Calls do not wait for each other. The process ends when its input does, and with status 3 when VirtualBox's service
is gone: nothing that it holds is worth anything then, and a new process connects anew.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from typing import Any

import attrs

from .box import Box
from .causes import explain
from .pending import Operation, Pending
from .pyvbox import BoxError, ServiceLost, load, words

SERVICE_LOST = 3
OPERATION_TICK = 0.02  # seconds between two looks at operations that are under way
WATCH_TICK = 1.0  # seconds between two looks at machines, each a call of a tenth of a millisecond
CALLS = (
    *(
        "hello",
        "machines",
        "look",
        "hostonly_address",
        "create",
        "convert",
        "remove",
        "start",
        "power_off",
        "pause",
        "resume",
    ),
    *("save_state", "discard_state", "snapshot", "restore", "delete_snapshot"),
)


@attrs.define
class Running:
    """An operation that waits for something."""

    number: int
    call: str
    operation: Operation
    pending: Pending


class Worker:
    """Calls in, answers out; never waits for a single one of them."""

    def __init__(self, output: Any) -> None:
        self._output = output
        self._box: Box | None = None
        self._running: list[Running] = []
        self._watched: dict[str, tuple[str, int | None]] = {}
        self._next_look = 0.0

    def timeout(self) -> float | None:
        """How long the next call may be waited for; None is for ever."""
        if self._running:
            return OPERATION_TICK
        return max(0.0, self._next_look - time.monotonic()) if self._watched else None

    def _connected(self) -> Box:
        if self._box is None:
            self._box = Box(load())
        return self._box

    def call(self, number: int, call: str, arguments: dict[str, Any]) -> None:
        try:
            if call == "watch":
                self._watched[arguments["machine"]] = ("", None)
                self._next_look = 0.0
                self._answer(number, None)
                return
            if call == "forget":
                self._watched.pop(arguments["machine"], None)
                self._answer(number, None)
                return
            if call not in CALLS:
                raise BoxError(f"the worker knows no call {call!r}")
            result = getattr(self._connected(), call)(**arguments)
        except Exception as error:
            self._failed(number, call, error)
            return
        if hasattr(result, "throw"):
            self._step(number, call, result, None)
        else:
            self._answer(number, result)

    def tick(self) -> None:
        """Look at what is under way, and at the watched machines when it is time."""
        running, self._running = self._running, []
        for each in running:
            error: Exception | None = None
            try:
                if not each.pending.done():
                    self._running.append(each)
                    continue
            except Exception as raised:
                error = raised
            self._step(each.number, each.call, each.operation, error)
        if self._watched and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + WATCH_TICK
            self._look()

    def _step(self, number: int, call: str, operation: Operation, error: Exception | None) -> None:
        """On to the operation's next wait, or to its end."""
        try:
            pending = next(operation) if error is None else operation.throw(error)
        except StopIteration as end:
            self._answer(number, end.value)
        except Exception as raised:
            self._failed(number, call, raised)
        else:
            self._running.append(Running(number, call, operation, pending))

    def _look(self) -> None:
        for machine, before in list(self._watched.items()):
            try:
                state, pid = self._connected().state(machine)
            except Exception as error:
                if self._box is None:
                    raise ServiceLost(str(error)) from None
                self._box.check(error)
                state, pid = "Gone", None
            if (state, pid) != before:
                self._watched[machine] = (state, pid)
                self._say({"machine": machine, "state": state, "pid": pid})

    def _answer(self, number: int, result: Any) -> None:
        self._say({"id": number, "result": result})

    def _failed(self, number: int, call: str, error: Exception) -> None:
        lost: ServiceLost | None = None
        try:
            if self._box is not None:
                self._box.check(error)
            elif isinstance(error, ServiceLost):
                lost = error
        except ServiceLost as found:
            lost = found
        if isinstance(lost or error, BoxError):
            told: Any = lost or error
            sentence, hint = str(told), told.hint
        else:
            sentence, hint = explain(call.replace("_", " "), words(error))
        self._say({"id": number, "error": sentence, "hint": hint, "lost": lost is not None})
        if lost is not None:
            raise lost

    def _say(self, value: dict[str, Any]) -> None:
        self._output.write(json.dumps(value).encode() + b"\n")
        self._output.flush()


def main() -> int:
    # VirtualBox's bindings print to standard output when they fail: that must not reach the answers.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(calls,), daemon=True).start()
    worker = Worker(output)
    try:
        while True:
            try:
                line = calls.get(timeout=worker.timeout())
            except queue.Empty:
                line = None
            if line == b"":
                return 0
            if line is not None:
                request = json.loads(line)
                worker.call(request["id"], request["call"], request["arguments"])
            worker.tick()
    except ServiceLost as lost:
        print(f"the worker ends: {lost}", file=sys.stderr)
        return SERVICE_LOST
    except BrokenPipeError:
        return 0  # the host agent is gone


def _read(calls: queue.Queue[bytes]) -> None:
    """Lines of standard input; an empty one is its end. In a thread, because Windows has no select() for pipes."""
    for line in sys.stdin.buffer:
        calls.put(line)
    calls.put(b"")


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # the bindings' own way to end has crashed; VirtualBox's service lets go of whoever ends
