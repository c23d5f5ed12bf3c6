"""What a host agent can be asked for: one method for each call of `docs/control.md`.

The wrapper, `vmctl` and every other face of the agent come through here, so whatever one can do, the others can.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import attrs
from twisted.internet import defer
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from common.errors import ConfigError, VMwrapperError
from common.messages import Copied, Result, Run, fields_of

from .chirp import Chirp
from .commands import Command, Commands, Update, new_id
from .copies import UNDONE, Copies, Copy
from .events import Happened
from .guests import Guests
from .virtual_machine import VirtualMachine
from .vms import Fate, VirtualMachines

PING_DEADLINE = 10.0  # seconds
OOM_LINES = 60  # of the console, in which the guest's kernel may have said why it ended a program

Done = TypeVar("Done")

_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Refused(VMwrapperError):
    """A call that cannot be done as it was asked; `code` as in `docs/control.md`."""

    def __init__(self, code: str, sentence: str, hint: str = "") -> None:
        super().__init__(sentence, hint)
        self.code = code


class Operations:
    """The calls. Each takes the arguments of the request and a function for updates, and returns what is done."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        vms: VirtualMachines,
        guests: Guests,
        commands: Commands,
        copies: Copies,
        shut_down: Callable[[Fate], Deferred[None]],
        chirp: Chirp,
        more: Mapping[str, Callable[[dict[str, Any], Update], Any]] | None = None,
    ) -> None:
        """`more`: calls that other parts of the agent answer."""
        self.clock = clock
        self._vms = vms
        self._guests = guests
        self._commands = commands
        self._copies = copies
        self._shut_down = shut_down
        self._chirp = chirp
        self._calls: Mapping[str, Callable[[dict[str, Any], Update], Any]] = {
            "vms": self.vms,
            "start_vm": self.start_vm,
            "stop_vm": self.stop_vm,
            "pause_vm": self.pause_vm,
            "resume_vm": self.resume_vm,
            "limit_vm": self.limit_vm,
            "save_vm": self.save_vm,
            "checkpoint_vm": self.checkpoint_vm,
            "snapshot_vm": self.snapshot_vm,
            "restore_vm": self.restore_vm,
            "delete_snapshot": self.delete_snapshot,
            "ping": self.ping,
            "run": self.run,
            "run_many": self.run_many,
            "attach": self.attach,
            "signal": self.signal,
            "put": self.put,
            "get": self.get,
            "shutdown": self.shutdown,
            **(more or {}),
        }

    def handler(self, call: str) -> Callable[[dict[str, Any], Update], Any] | None:
        return self._calls.get(call)

    # -- for faces of the agent within its process

    def check_image(self, vm: str, wanted: str) -> None:
        """Whether a VM of this name could be made of an image; ConfigError says which there are."""
        self._vms.image_for(vm, wanted)

    def output(self, command_id: str, stream: str) -> bytes:
        """The last MiB, at most, of a command's output."""
        command = self._commands.get(command_id)
        return b"" if command is None else b"".join(data for _, data in command.streams[stream].replay(0))

    # -- machines

    def vms(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        return {"vms": [self._vms.describe(vm) for vm in self._vms]}

    async def start_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        directory = _absolute(args, "directory")
        image = self._vms.image_for(_text(args, "vm"), _text(args, "image"))
        vm = await self._vms.start(
            _text(args, "vm"),
            image,
            directory,
            memory_mb=_whole(args, "memory_mb"),
            cpus=_whole(args, "cpus"),
            deadline=_number(args, "deadline_s"),
            network=bool(args.get("network")),
            watch=lambda state, reason: update("state", {"state": state, "reason": reason}),
        )
        return self._vms.describe(vm)

    async def stop_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        vm = self._vm(args)
        described = self._vms.describe(vm)  # while it can still be asked what it has used
        if _text(args, "instance") in ("", vm.guest.id):
            await self._vms.stop(vm)
        return described

    async def pause_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        vm = self._vm(args)
        await self._vms.pause(vm)
        return self._vms.describe(vm)

    async def resume_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        vm = self._vm(args)
        await self._vms.resume(vm)
        return self._vms.describe(vm)

    def limit_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        vm = self._vm(args)
        if "cpu_percent" in args:
            self._vms.limit(vm, min(100.0, _number(args, "cpu_percent")))
        if "disk_mb" in args:
            vm.disk_mb = _whole(args, "disk_mb")
        if "network" in args and vm.outward is not None:
            vm.outward.switch(bool(args["network"]))
        if vm.outward is not None:
            up, down = (_number(args, key) if key in args else None for key in ("up_bytes_s", "down_bytes_s"))
            vm.outward.limit(up, down)
        return self._vms.describe(vm)

    async def save_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        vm = self._vm(args)
        await self._checkpoint("save", vm, "", self._vms.checkpoints.save(vm))
        return self._vms.describe(vm)

    async def checkpoint_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        note = args.get("note") or {}
        if not isinstance(note, dict):
            raise ConfigError("note must be an object")
        vm = _check_epoch(args, self._vm(args))
        return await self._checkpoint("checkpoint", vm, "", self._vms.checkpoints.make(vm, note))

    async def snapshot_vm(self, args: dict[str, Any], update: Update) -> None:
        vm, name = self._vm(args), _name(args, "snapshot")
        await self._checkpoint("snapshot", vm, name, self._vms.checkpoints.snapshot(vm, name))

    async def restore_vm(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        vm = self._vm(args)
        name = _name(args, "snapshot")
        await self._checkpoint("restore", vm, name, self._vms.checkpoints.restore(vm, name))
        return self._vms.describe(vm)

    async def _checkpoint(self, action: str, vm: VirtualMachine, snapshot: str, doing: Awaitable[Done]) -> Done:
        """Do it, and say in the log how it went and how long it took."""
        began = self.clock.seconds()
        reason = ""
        try:
            return await doing
        except Exception as error:
            reason = str(error)
            raise
        finally:
            self._log.info(
                "{vm}: {action} {snapshot} {outcome} after {seconds:.2f} s",
                event=Happened.CHECKPOINT,
                vm=vm.name,
                instance=vm.guest.id,
                action=action,
                snapshot=snapshot,
                outcome=f"failed ({reason})" if reason else "done",
                failed=bool(reason),
                reason=reason,
                seconds=self.clock.seconds() - began,
            )

    async def delete_snapshot(self, args: dict[str, Any], update: Update) -> None:
        await self._vms.checkpoints.delete(self._vm(args), _name(args, "snapshot"))

    async def ping(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        vm = self._vm(args)
        try:
            seconds = await self._guests.ping(vm.guest).addTimeout(PING_DEADLINE, self.clock)
        except defer.TimeoutError:
            raise Refused("agent_silent", f"{vm.name} did not answer within {PING_DEADLINE:.0f} s.") from None
        return {"round_trip_s": seconds}

    # -- commands

    def run(self, args: dict[str, Any], update: Update) -> Deferred[dict[str, Any]]:
        command_id = _text(args, "command") or new_id()
        command = self._commands.get(command_id)
        if command is None:
            if self._copies.get(command_id) is not None:
                raise ConfigError(f"{command_id} is the id of a copy", "give each command and copy an id of its own")
            vm = self._vm(args)
            if vm.reason:
                raise Refused("no_vm", vm.reason)
            _check_epoch(args, vm)
            run = _run_message(command_id, args)
            command = self._commands.run(vm.guest, run, _host_file(args, "stdout"), _host_file(args, "stderr"))
            update("asked", {"command": command.id})
        return self._watch(command, args, update)

    async def run_many(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        """Run a program in every VM whose name matches; each answers when it has ended."""
        pattern = _text(args, "pattern")
        matching = [vm for vm in self._vms if fnmatchcase(vm.name, pattern) and not vm.reason]
        stream = bool(args.get("stream"))
        waiting = []
        for vm in matching:

            def tell(name: str, data: dict[str, Any], vm: VirtualMachine = vm) -> None:
                if stream or name != "output":
                    update(name, {"vm": vm.name, **data})

            def answer(result: Result, vm: VirtualMachine = vm) -> None:
                update("answer", {"vm": vm.name, **_describe_result(result)})

            command = self._commands.run(vm.guest, _run_message(new_id(), args))
            command.watchers.append(tell)
            waiting.append(command.wait().addCallback(answer))
        await gatherResults(waiting)
        return {"matched": len(matching)}

    def attach(self, args: dict[str, Any], update: Update) -> Deferred[dict[str, Any]]:
        return self._watch(self._command(args), args, update)

    def _watch(self, command: Command, args: dict[str, Any], update: Update) -> Deferred[dict[str, Any]]:
        """Tell of a command from now on, and of its earlier output if it is asked for."""
        stream = bool(args.get("stream"))
        if command.pid:
            update("started", {"command": command.id, "pid": command.pid})
        for name, output in command.streams.items():
            if stream and args.get(f"{name}_from") is not None:
                for offset, data in output.replay(_whole(args, f"{name}_from")):
                    update("output", {"stream": name, "offset": offset, "bytes": data})

        def tell(name: str, data: dict[str, Any]) -> None:
            if name == "usage":
                data = {**data, **self._used_by(command.about["vm"])}
            if stream or name != "output":
                update(name, data)

        if not command.ended:
            command.watchers.append(tell)

        def describe(result: Result) -> dict[str, Any]:
            if result.outcome != "signalled":
                return _describe_result(result)
            vm = self._vms.get(command.about["vm"])
            console = vm.machine.console_tail(OOM_LINES) if vm is not None and vm.machine is not None else ""
            return _describe_result(explained(result, console))

        return command.wait().addCallback(describe)

    def _used_by(self, name: str) -> dict[str, Any]:
        """What its VM has to do with this host now; its process is another one after a restore."""
        vm = self._vms.get(name)
        if vm is None:
            return {}
        return {"vm_pid": vm.machine.pid if vm.machine is not None else None, **vm.traffic()}

    def signal(self, args: dict[str, Any], update: Update) -> None:
        self._commands.signal(self._command(args), _text(args, "signal"))

    def put(self, args: dict[str, Any], update: Update) -> Any:
        if args.get("chirp_port"):
            source, destination = _absolute(args, "source"), _text(args, "destination")
            return self._by_chirp(args, lambda server: self._chirp.put(server, source, destination))
        copy_id = _text(args, "copy") or new_id()
        copy = self._copies.get(copy_id)
        if copy is None:
            self._no_command(copy_id)
            source, destination = _absolute(args, "source"), _text(args, "destination")
            vm = _check_epoch(args, self._vm(args))
            copy = self._copies.put(vm.guest, copy_id, source, destination)
        return self._watch_copy(copy, update)

    def get(self, args: dict[str, Any], update: Update) -> Any:
        if args.get("chirp_port"):
            source, destination = _text(args, "source"), _absolute(args, "destination")
            return self._by_chirp(args, lambda server: self._chirp.get(server, source, destination))
        copy_id = _text(args, "copy") or new_id()
        copy = self._copies.get(copy_id)
        if copy is None:
            self._no_command(copy_id)
            source, destination = _text(args, "source"), _absolute(args, "destination")
            vm = _check_epoch(args, self._vm(args))
            copy = self._copies.fetch(vm.guest, copy_id, source, destination)
        return self._watch_copy(copy, update)

    async def _by_chirp(self, args: dict[str, Any], copy: Callable[[str], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """A copy by cctools' programs, with a guest that runs a chirp_server."""
        vm, began = self._vm(args), self.clock.seconds()
        door = await self._vms.reach(vm, _whole(args, "chirp_port"))
        try:
            done = await copy(f"{door.address}:{door.port}")
        finally:
            await door.close()
        return {**done, "seconds": self.clock.seconds() - began}

    def _no_command(self, copy_id: str) -> None:
        if self._commands.get(copy_id) is not None:
            raise ConfigError(f"{copy_id} is the id of a command", "give each command and copy an id of its own")

    def _watch_copy(self, copy: Copy, update: Update) -> Deferred[dict[str, Any]]:
        began = self.clock.seconds()

        def describe(copied: Copied) -> dict[str, Any]:
            seconds = self.clock.seconds() - began
            return {"files": copied.files, "bytes": copied.bytes, "sha256": copied.sha256, "seconds": seconds}

        copy.watchers.append(update)
        return copy.wait().addCallback(describe)

    def shutdown(self, args: dict[str, Any], update: Update) -> Deferred[None]:
        return self._shut_down(Fate.KEEP if args.get("keep") else Fate.END)

    # -- arguments

    def _vm(self, args: dict[str, Any]) -> VirtualMachine:
        name = _text(args, "vm")
        vm = self._vms.get(name)
        if vm is None:
            raise Refused("no_vm", f"No VM is named {name}.", "vmctl vms lists them")
        return vm

    def _command(self, args: dict[str, Any]) -> Command:
        command = self._commands.get(_text(args, "command"))
        if command is None:
            raise Refused("no_command", f"No command has the id {_text(args, 'command')}.")
        return command


def _check_epoch(args: dict[str, Any], vm: VirtualMachine) -> VirtualMachine:
    """The requester may count on what was done in the VM before, which a restore has undone."""
    if _whole(args, "epoch") not in (0, vm.guest.epoch):
        raise Refused(UNDONE, f"The VM {vm.name} went back to an earlier state.", "look what is in it, and ask again")
    return vm


def explained(result: Result, console: str) -> Result:
    """A program that the guest's kernel ended because its memory was full: only its console says so."""
    killed = result.outcome == "signalled" and result.signal == "KILL" and not result.reason
    if killed and any(words in console for words in ("Out of memory: Killed", "Memory cgroup out of memory")):
        return attrs.evolve(result, reason="the virtual machine ran out of memory; <memory_mb> gives it more")
    return result


def _run_message(command_id: str, args: dict[str, Any]) -> Run:
    return Run(
        command=command_id,
        argv=args.get("argv", ()),
        env=args.get("env", {}),
        cwd=_text(args, "cwd"),
        stdin=_text(args, "stdin"),
        fraction_file=_text(args, "fraction_file"),
        deadline_s=_number(args, "deadline_s"),
    )


def _describe_result(result: Result) -> dict[str, Any]:
    return fields_of(result)


def _text(args: dict[str, Any], key: str) -> str:
    value = args.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"{key} must be a text")
    return value


def _name(args: dict[str, Any], key: str) -> str:
    value = _text(args, key)
    if not _SNAPSHOT.fullmatch(value):
        raise ConfigError(f"{key} must be a name of 1 to 64 letters, digits, '-' and '_', not {value[:80]!r}")
    return value


def _whole(args: dict[str, Any], key: str) -> int:
    value = args.get(key) or 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ConfigError(f"{key} must be a whole number from 0")
    return value


def _number(args: dict[str, Any], key: str) -> float:
    value = args.get(key) or 0.0
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ConfigError(f"{key} must be a number from 0")
    return float(value)


def _absolute(args: dict[str, Any], key: str) -> Path:
    path = Path(_text(args, key))
    if not path.is_absolute():
        raise ConfigError(f"{key} must be an absolute path of this host, not {str(path)!r}")
    return path


def _host_file(args: dict[str, Any], key: str) -> str:
    return str(_absolute(args, key)) if args.get(key) else ""
