"""The XML-RPC interface of the first VM controller, at /RPC2: a thin face on this host agent's operations.

Argument order, defaults and results are the original's, so that a client of 2010 goes on working; `docs/xmlrpc.md`
says where something must differ. There was no login then and there is none now: it is off unless it is asked for,
and only on the loopback, where everybody on this host can use it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
from twisted.internet import defer
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import server, xmlrpc
from twisted.web.resource import Resource

from common.errors import ConfigError, VMwrapperError
from common.files import runtime_dir

from .broker.settings import is_loopback
from .commands import new_id
from .hypervisors.images import list_images
from .operations import Operations
from .xmlrpc_values import RUSAGE, STATES, as_literal, as_results, as_seconds, as_text, snapshot_name

PORT = 8080  # the original's
FAULT = -1  # the original's code for every error
MOST_REQUEST = 1024 * 1024  # bytes
MOST_COMMANDS = 10_000  # whose details and results are kept
GRACE = 35.0  # seconds without a word after which a VM is not listed as registered
DEAD_AFTER = 1.5  # times the grace, as then


@attrs.define
class _Sent:
    """A command that came through here."""

    details: dict[str, Any]
    results: dict[str, Any] | None = None


class VMController(xmlrpc.XMLRPC):
    """The methods; each `xmlrpc_NAME` is one."""

    _log = Logger()

    def __init__(self, operations: Operations, grace: float = 0.0) -> None:
        super().__init__(allowNone=True)
        self._operations = operations
        self._grace = grace or GRACE
        self._images: dict[str, str] = {}  # of the VMs that createVM has made
        self._sent: dict[str, _Sent] = {}
        self._newest: dict[str, str] = {}  # by VM: its newest snapshot

    # -- how a call is answered

    def render_POST(self, request: Any) -> Any:
        """A page that somebody looks at in a browser must not reach us: it would send an Origin, or another Host."""
        host = urlsplit(f"//{request.getHeader('host') or 'localhost'}").hostname or ""
        if request.getHeader("origin") or not is_loopback(host):
            request.setResponseCode(403)
            return b"only programs of this host may use this interface\n"
        if int(request.getHeader("content-length") or 0) > MOST_REQUEST:
            request.setResponseCode(413)
            return b"a request has at most 1 MiB; files are copied by cpFileToVM\n"
        return super().render_POST(request)

    def lookupProcedure(self, procedurePath: str) -> Callable[..., Any]:
        function: Callable[..., Any] = super().lookupProcedure(procedurePath)
        signature = inspect.signature(function)

        def call(*args: Any) -> Deferred[Any]:
            try:
                signature.bind(*args)
            except TypeError as error:
                raise xmlrpc.Fault(FAULT, f"{procedurePath}: {error}") from None
            return maybeDeferred(function, *args).addErrback(self._fault, procedurePath)

        return call

    def _fault(self, failure: Failure, name: str) -> None:
        error = failure.value
        if isinstance(error, VMwrapperError):
            sentence = f"{error}\n{error.hint}" if error.hint else str(error)
        elif isinstance(error, defer.TimeoutError):
            sentence = "it took too long"
        else:
            self._log.failure("the XML-RPC method {name} failed", failure, name=name)
            sentence = f"{name} failed: {error!r}"
        raise xmlrpc.Fault(FAULT, sentence)

    def _call(self, call: str, **args: Any) -> Deferred[Any]:
        handler = self._operations.handler(call)
        assert handler is not None
        return maybeDeferred(handler, args, lambda _name, _data: None)

    def _vms(self) -> dict[str, dict[str, Any]]:
        return {vm["vm"]: vm for vm in self._operations.vms({}, lambda _name, _data: None)["vms"]}

    async def _steer(self, call: str, vm: str, **args: Any) -> bool:
        await self._call(call, vm=as_text("the VM", vm), **args)
        return True

    # -- machines

    def xmlrpc_listRegisteredVMs(self) -> list[str]:
        """The VMs whose agents have been heard lately."""
        dead = DEAD_AFTER * self._grace
        return [
            name
            for name, vm in self._vms().items()
            if vm["agent"] in ("present", "silent") and vm["last_seen_s"] is not None and vm["last_seen_s"] <= dead
        ]

    def xmlrpc_listAvailableVMs(self) -> list[str]:
        """Every VM that can be started: those that are there, those of createVM, and one for each image."""
        images = [image.name for image in list_images()]
        return list(dict.fromkeys([*self._vms(), *self._images, *images]))

    def xmlrpc_listRunningVMs(self) -> list[str]:
        return [name for name, vm in self._vms().items() if vm["state"] == "running"]

    def xmlrpc_getNamesToIdsMapping(self) -> dict[str, str]:
        return {name: vm["instance"] for name, vm in self._vms().items()}

    def xmlrpc_getIdsToNamesMapping(self) -> dict[str, str]:
        return {vm["instance"]: name for name, vm in self._vms().items()}

    def xmlrpc_createVM(self, name: str, hddImagePath: str) -> list[Any]:
        """Define a VM of an image, by the image's name or path; it does not start yet. Gives [True, name]."""
        if name in self._images or name in self._vms():
            raise ConfigError(f"there is a VM named {name} already")
        if len(self._images) >= MOST_COMMANDS:
            raise ConfigError(f"there are {MOST_COMMANDS} VMs already")
        image = as_text("the image", hddImagePath)
        # A path in the original's sense led to a file of the image; a directory is what we have.
        path = Path(image).absolute()
        if path.is_file():
            image = str(path.parent)
        elif path.is_dir():
            image = str(path)
        self._operations.check_image(as_text("the VM", name), image)
        self._images[name] = image
        return [True, name]

    async def xmlrpc_start(self, vm: str) -> bool:
        """Start a VM, or go on with one that is saved."""
        known = self._vms().get(as_text("the VM", vm))
        if known is not None and known["state"] == "running":
            return True
        if known is not None and known["state"] in ("stopped", "crashed"):
            await self._steer("stop_vm", vm)  # what is left of it
        elif known is not None:
            return await self._steer("resume_vm", vm)
        if vm not in self.xmlrpc_listAvailableVMs():
            raise ConfigError(f"No VM is named {vm}.", "createVM makes one")
        image = self._images.get(vm, "")
        return await self._steer("start_vm", vm, image=image, directory=str(runtime_dir() / "vms"))

    async def xmlrpc_powerOff(self, vm: str) -> bool:
        """End a VM. Its disk is removed: the next start begins with the image again."""
        await self._steer("stop_vm", vm)
        self._images.setdefault(vm, "")
        self._newest.pop(vm, None)
        return True

    async def xmlrpc_pause(self, vm: str) -> bool:
        return await self._steer("pause_vm", vm)

    async def xmlrpc_unpause(self, vm: str) -> bool:
        return await self._steer("resume_vm", vm)

    async def xmlrpc_saveState(self, vm: str) -> bool:
        """Memory to disk; nothing of the VM runs until the next start."""
        return await self._steer("save_vm", vm)

    def xmlrpc_getState(self, vm: str) -> str:
        """PoweredOff, Saved, Aborted, Running, Paused or Starting."""
        known = self._vms().get(as_text("the VM", vm))
        if known is not None:
            return STATES[known["state"]]
        if vm not in self.xmlrpc_listAvailableVMs():
            raise ConfigError(f"No VM is named {vm}.", "createVM makes one")
        return STATES["defined"]

    async def xmlrpc_saveSnapshot(self, vm: str, name: str = "", desc: str = "") -> bool:
        """Keep the VM as it is; it goes on."""
        snapshot = snapshot_name(as_text("the snapshot", name))
        await self._steer("snapshot_vm", vm, snapshot=snapshot)
        self._newest[vm] = snapshot
        return True

    async def xmlrpc_restoreSnapshot(self, vm: str, name: str = "") -> bool:
        """Back to the newest snapshot, or to one by name."""
        snapshot = snapshot_name(name) if name else self._newest.get(as_text("the VM", vm), "")
        if not snapshot:
            raise ConfigError(f"The VM {vm} has no snapshot of this interface.", "saveSnapshot makes one")
        return await self._steer("restore_vm", vm, snapshot=snapshot)

    def xmlrpc_getPerformanceData(self, vm: str) -> list[dict[str, Any]]:
        """What VirtualBox's collector gave: one structure for each measure."""
        known = self._vms().get(as_text("the VM", vm))
        if known is None:
            raise ConfigError(f"No VM is named {vm}.")
        measures = [("CPU/Time", "s", known["cpu_s"]), ("RAM/Usage/Total", "MB", known["memory_mb"])]
        return [
            {
                "name": name, "object": vm, "unit": unit, "scale": 1,
                "values": [value], "values_as_string": f"{value:g} {unit}",
            }
            for name, unit, value in measures
        ]  # fmt: skip

    async def xmlrpc_ping(self, toVmName: str, timeout_secs: float = 5.0) -> str:
        """`PONG from NAME`, or a fault when there is no answer in time."""
        seconds = as_seconds(timeout_secs)
        clock: Any = self._operations.clock
        try:
            await self._call("ping", vm=as_text("the VM", toVmName)).addTimeout(seconds, clock)
        except defer.TimeoutError:
            raise VMwrapperError(f"PING timeout (for {toVmName})") from None
        return f"PONG from {toVmName}"

    # -- commands

    def xmlrpc_runCmd(
        self, toVmName: str, cmd: str, args: Any = (), env: Any = None, path: Any = None, fileForStdin: Any = ""
    ) -> str:
        """Run a program in a VM; gives the command's id. What it prints comes with getCmdResults."""
        words, environment = as_literal("args", args, (list, tuple), []), as_literal("env", env, dict, {})
        directory = as_literal("path", path, str, "")
        command = new_id()
        request = {
            "vm": as_text("the VM", toVmName),
            "argv": [as_text("cmd", cmd), *(str(word) for word in words)],
            "env": {str(name): str(value) for name, value in environment.items()},
            "cwd": directory,
            "stdin": as_text("fileForStdin", fileForStdin or ""),
            "command": command,
        }
        details = {
            "timestamp": time.time(), "to": toVmName, "cmd": cmd, "args": list(words), "env": environment,
            "path": directory, "fileForStdin": fileForStdin or "",
        }  # fmt: skip
        output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        sent = _Sent(details)
        refused: list[Failure] = []

        def ended(result: Mapping[str, Any]) -> None:
            for name in output:
                output[name] += self._operations.output(command, name)
            sent.results = as_results(result, bytes(output["stdout"]), bytes(output["stderr"]))

        def failed(failure: Failure) -> None:
            refused.append(failure)
            sent.results = {
                "out": "", "err": str(failure.value), "finished": False, "exitCodeOrSignal": -1,
                "resources": dict.fromkeys(RUSAGE, 0),
            }  # fmt: skip

        self._call("run", **request).addCallbacks(ended, failed)
        if refused:  # at once: the caller shall know it, as then
            refused[0].raiseException()
        self._remember(command, sent)
        return command

    def _remember(self, command: str, sent: _Sent) -> None:
        while len(self._sent) >= MOST_COMMANDS:
            del self._sent[next(iter(self._sent))]
        self._sent[command] = sent

    def xmlrpc_listFinishedCmds(self) -> list[str]:
        """The ids of commands that have ended and whose results nobody has taken yet."""
        return [command for command, sent in self._sent.items() if sent.results]

    def xmlrpc_getCmdResults(self, cmdId: str) -> dict[str, Any] | str:
        """How a command ended: out, err, finished, exitCodeOrSignal, resources. Once; before, and again, it is ""."""
        sent = self._sent.get(as_text("the command", cmdId))
        if sent is None or not sent.results:
            return ""
        results, sent.results = sent.results, {}
        return results

    def xmlrpc_getCmdDetails(self, cmdId: str) -> str:
        """What was asked for, as the text of a Python dictionary."""
        sent = self._sent.get(as_text("the command", cmdId))
        return repr(sent.details if sent is not None else None)

    # -- copies

    async def xmlrpc_cpFileToVM(
        self, vmName: str, pathToLocalFileName: str, pathToRemoteFileName: str | None = None
    ) -> list[Any]:
        """Copy a file into a VM. Gives [out, err, status]; status 0 is success."""
        local = Path(as_text("the file", pathToLocalFileName))
        remote = as_text("the destination", pathToRemoteFileName or local.name)
        return await self._copy("put", vm=vmName, source=str(local.absolute()), destination=remote)

    async def xmlrpc_cpFileFromVM(
        self, vmName: str, pathToRemoteFileName: str, pathToLocalFileName: str | None = None
    ) -> list[Any]:
        """Copy a file out of a VM. Gives [out, err, status]."""
        remote = as_text("the file", pathToRemoteFileName)
        local = Path(as_text("the destination", pathToLocalFileName or remote))
        return await self._copy("get", vm=vmName, source=remote, destination=str(local.absolute()))

    async def _copy(self, call: str, **args: Any) -> list[Any]:
        if args["vm"] not in self._vms():
            raise ConfigError(f"No VM is named {args['vm']}.")
        try:
            done = await self._call(call, **args)
        except VMwrapperError as error:
            return ["", f"{error}\n", 1]
        return [f"{done['bytes']} bytes\n", "", 0]

    # -- help

    def xmlrpc_help(self, methodName: str | None = None) -> str:
        """The signature and a description of one method, or of all."""
        if methodName:
            function = getattr(self, f"xmlrpc_{methodName}", None)
            if function is None:
                raise ConfigError(f"No such method: {methodName}")
            names = [
                name if each.default is each.empty else f"{name}={each.default}"
                for name, each in inspect.signature(function).parameters.items()
            ]
            return f"{methodName}({', '.join(names)}):\n{inspect.getdoc(function) or '<No Docstring>'}"
        methods = sorted(name[len("xmlrpc_") :] for name in dir(self) if name.startswith("xmlrpc_"))
        return "\n\n".join(self.xmlrpc_help(name) for name in methods)


def serve_xmlrpc(reactor: Any, address: str, operations: Operations, grace: float = 0.0) -> IListeningPort:
    """Listen. ConfigError when the address is not on the loopback or cannot be had."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"{address!r} is not HOST:PORT", f"for example 127.0.0.1:{PORT}")
    if not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, and the XML-RPC interface has no login",
            "let it listen on 127.0.0.1",
        )
    root = Resource()
    root.putChild(b"RPC2", VMController(operations, grace))
    site = server.Site(root)
    site.displayTracebacks = False
    site.noisy = False
    try:
        listening: IListeningPort = reactor.listenTCP(
            int(port), site, interface="127.0.0.1" if host == "localhost" else host
        )
    except CannotListenError as error:
        raise ConfigError(f"XML-RPC cannot be served on {address}: {error}") from None
    return listening
