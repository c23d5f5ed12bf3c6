"""The QEMU driver: one process for each VM, steered over QMP.

QEMU connects to our socket, not we to its, so nothing is polled at the start. Its console comes through its standard
output into a bounded buffer. The guest's network is closed but for the service ports (`guest_ports.py`).
"""

from __future__ import annotations

import platform
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IListeningPort, IProcessTransport
from twisted.internet.protocol import Factory, ProcessProtocol
from twisted.internet.utils import getProcessOutputAndValue
from twisted.logger import Logger
from twisted.python.failure import Failure

from common.files import write_private
from host_agent.ledger import LedgerEntry

from .base import Capabilities, HypervisorError, Machine, MachineSpec, MachineState, Requirement
from .cpu_time import CpuTime
from .guest_ports import GuestPorts
from .kvm import KvmProbe
from .qmp import QMP

QEMU = f"qemu-system-{platform.machine()}"
QEMU_IMG = "qemu-img"
REMEDY = "apt install qemu-system-x86 qemu-utils"
GATEWAY = "10.0.2.100"  # not the network's own gateway, 10.0.2.2, which would be the host's loopback
FREE_MEMORY_MB = 512  # under which a VM will not do well

CREATE_DEADLINE = 60.0  # seconds for qemu-img
START_DEADLINE = 30.0  # from the start of QEMU to its first words on QMP
QUIT_DEADLINE = 5.0  # until SIGTERM, and then until SIGKILL
CONSOLE_BYTES = 64 * 1024
CONFIG = "guest-config.json"

# What a guest here never uses costs half a second of an emulated boot.
MACHINE = "q35,i8042=off,hpet=off,smbus=off,sata=off"
TCG = ("-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max")
KVM = ("-accel", "kvm", "-cpu", "host")


class QemuHypervisor:
    """QEMU as it is installed on this host."""

    name = "qemu"
    capabilities = Capabilities()
    guest_gateway = GATEWAY

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._kvm: KvmProbe | None = None

    def requirements(self) -> Deferred[list[Requirement]]:
        return Deferred.fromCoroutine(self._requirements())

    async def _requirements(self) -> list[Requirement]:
        found = []
        for program in (QEMU, QEMU_IMG):
            path = shutil.which(program)
            words = ""
            if path is not None:
                output, _, status = await getProcessOutputAndValue(path, ["--version"], env=None)
                words = output.decode("utf-8", "replace").partition("\n")[0] if status == 0 else ""
            met = bool(words)
            found.append(Requirement(program, met, words or ("does not run" if path else "not found"), REMEDY))
        if found[0].met:
            why_not = await self._accelerator()
            words = "works" if not why_not else f"cannot be used: {why_not}; VMs run emulated, about ten times slower"
            remedy = "switch on virtualisation in the firmware, and be a member of the group kvm"
            found.append(Requirement("KVM", not why_not, words, remedy, fatal=False))
        free = psutil.virtual_memory().available // 2**20
        remedy = "close other programs, or give VMs less memory"
        found.append(Requirement("free memory", free >= FREE_MEMORY_MB, f"{free} MB", remedy, fatal=False))
        return found

    def _accelerator(self) -> Deferred[str]:
        if self._kvm is None:
            self._kvm = KvmProbe(self._reactor, _program(QEMU))
        return self._kvm.why_not()

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        return Deferred.fromCoroutine(self._create(spec))

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        LedgerEntry(spec.instance, spec.directory).close()
        return succeed(None)

    async def _create(self, spec: MachineSpec) -> Machine:
        if spec.image.architecture != platform.machine():
            raise HypervisorError(
                f"the image {spec.image.name} is for {spec.image.architecture}, this host is {platform.machine()}"
            )
        image_tool = _program(QEMU_IMG)
        machine = QemuMachine(self._reactor, spec, LedgerEntry(spec.instance, spec.directory))
        try:
            arguments = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(spec.image.disk), str(machine.overlay)]
            made = getProcessOutputAndValue(image_tool, arguments, env=None, reactor=self._reactor)
            output, errors, status = await made.addTimeout(CREATE_DEADLINE, self._reactor)
            if status:
                words = (errors or output).decode("utf-8", "replace").strip()
                raise HypervisorError(f"the disk of {spec.name} cannot be made: {words}")
            machine.accelerator = KVM if not await self._accelerator() else TCG
        except BaseException:
            await machine.destroy()
            raise
        return machine


class QemuMachine(ProcessProtocol):
    """One VM and its QEMU process."""

    _log = Logger()

    def __init__(self, reactor: Any, spec: MachineSpec, ledger: LedgerEntry) -> None:
        self.spec = spec
        self.state = MachineState.DEFINED
        self.accelerator: tuple[str, ...] = TCG
        self.overlay = spec.directory / "disk.qcow2"
        self._reactor = reactor
        self._ledger = ledger
        self._ports = GuestPorts(reactor, ledger.path, spec.services)
        self._monitor: IListeningPort | None = None
        self._qmp: QMP | None = None
        self._process: IProcessTransport | None = None
        self._started: Deferred[None] | None = None
        self._gone: list[Deferred[None]] = []
        self._asked_to_end = False
        self._guest_ended = ""  # QEMU's reason in its SHUTDOWN event
        self._console = bytearray()
        self._errors = b""
        self._cpu_time = CpuTime()

    @property
    def pid(self) -> int | None:
        pid: int | None = getattr(self._process, "pid", None)
        return pid

    def _change(self, state: MachineState, reason: str = "") -> None:
        if state is not self.state:
            self.state = state
            self.spec.on_state(state, reason)

    # -- start

    def start(self) -> Deferred[None]:
        if self._started is not None:
            raise HypervisorError(f"{self.spec.name} was started already")
        self._ports.open()
        monitor = self._ledger.path / "qmp.sock"
        factory = _MonitorFactory(self)
        self._monitor = self._reactor.listenUNIX(str(monitor), factory, mode=stat.S_IRUSR | stat.S_IWUSR)
        config = self.spec.directory / CONFIG
        write_private(config, self.spec.guest_config)
        argv = self.argv(monitor, config)
        self._change(MachineState.STARTING, "emulated" if self.accelerator is TCG else "with KVM")
        self._process = self._reactor.spawnProcess(self, argv[0], argv, env=None, path=str(self.spec.directory))
        if self.pid is not None:
            self._ledger.has_process(self.pid)
        self._started = Deferred()
        return self._started.addTimeout(START_DEADLINE, self._reactor)

    def argv(self, monitor: Path, config: Path) -> list[str]:
        """The whole command line of QEMU."""
        spec, image = self.spec, self.spec.image
        argv = [*_gentle(), _program(QEMU), "-name", _value(spec.name), *self.accelerator]
        argv += ["-M", MACHINE, "-smp", str(spec.cpus), "-m", str(spec.memory_mb)]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        # elevateprivileges=deny or =children would forbid the setsid() with which QEMU starts the helper of a port.
        argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny"]
        argv += ["-chardev", f"socket,id=monitor,path={_value(monitor)},server=off,reconnect=1"]
        argv += ["-mon", "chardev=monitor,mode=control"]
        argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        if image.kernel is not None:
            argv += ["-kernel", str(image.kernel), "-append", image.cmdline]
            argv += ["-initrd", str(image.initrd)] if image.initrd is not None else []
        argv += ["-drive", f"if=none,id=disk,format=qcow2,discard=unmap,cache=writeback,file={_value(self.overlay)}"]
        argv += ["-device", "virtio-blk-pci,drive=disk"]
        forwards = self._ports.forwards(GATEWAY)
        argv += ["-netdev", ",".join(["user,id=net,restrict=on,ipv6=off", *([forwards] if forwards else [])])]
        argv += ["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]
        argv += ["-fw_cfg", f"name=opt/vmwrapper/config,file={_value(config)}"]
        return argv

    def monitor_connected(self, qmp: QMP) -> None:
        self._qmp = qmp

        def ready(_: object) -> None:
            # QEMU has read the settings; nobody else on this host needs to find the secret in them.
            (self.spec.directory / CONFIG).unlink(missing_ok=True)
            self._change(MachineState.RUNNING)
            if self._started is not None and not self._started.called:
                self._started.callback(None)

        qmp.ready.addCallbacks(ready, lambda _: None)

    # -- what QEMU says

    def monitor_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._cpu_time.look(self.pid)  # while its process can still be asked
            self._guest_ended = str(data.get("reason", "")) if data.get("guest") else ""
        elif name == "STOP" and self.state is MachineState.RUNNING:
            self._change(MachineState.PAUSED)
        elif name == "RESUME" and self.state is MachineState.PAUSED:
            self._change(MachineState.RUNNING)

    def outReceived(self, data: bytes) -> None:
        self._console += data
        del self._console[:-CONSOLE_BYTES]

    def errReceived(self, data: bytes) -> None:
        self._errors = (self._errors + data)[-4000:]

    def processEnded(self, reason: Failure) -> None:
        self._process = self._qmp = None
        state, words = self._how_it_ended(reason)
        if self._started is not None and not self._started.called:
            self._started.errback(HypervisorError(f"the VM {self.spec.name} did not start: {words}"))
        self._change(state, words)
        gone, self._gone = self._gone, []
        for waiter in gone:
            waiter.callback(None)

    def _how_it_ended(self, reason: Failure) -> tuple[MachineState, str]:
        if self._asked_to_end:
            return MachineState.STOPPED, ""
        if self._guest_ended == "guest-shutdown":
            return MachineState.STOPPED, "the guest powered itself off"
        if self._guest_ended:
            return MachineState.CRASHED, "the guest's kernel failed or restarted"
        lines = self._errors.decode("utf-8", "replace").strip().splitlines()
        signal, status = getattr(reason.value, "signal", None), getattr(reason.value, "exitCode", None)
        how = f"QEMU was killed by signal {signal}" if signal else f"QEMU ended with status {status}"
        return MachineState.CRASHED, f"{how}: {lines[-1]}" if lines else how

    # -- steering

    def _ask(self, command: str) -> Deferred[Any]:
        if self._qmp is None:
            raise HypervisorError(f"the VM {self.spec.name} does not run")
        return self._qmp.execute(command)

    def pause(self) -> Deferred[None]:
        if self.state is MachineState.PAUSED:
            return succeed(None)
        return self._ask("stop").addCallback(lambda _: self._change(MachineState.PAUSED))

    def resume(self) -> Deferred[None]:
        if self.state is MachineState.RUNNING:
            return succeed(None)
        return self._ask("cont").addCallback(lambda _: self._change(MachineState.RUNNING))

    def power_off(self) -> Deferred[None]:
        if self._process is None:
            return succeed(None)
        self._cpu_time.look(self.pid)
        self._asked_to_end = True
        waiter: Deferred[None] = Deferred()
        self._gone.append(waiter)
        if self._qmp is not None:
            self._qmp.execute("quit").addErrback(lambda _: None)
        else:
            self._signal("TERM")
        later = [
            self._reactor.callLater(QUIT_DEADLINE, self._signal, "TERM"),
            self._reactor.callLater(2 * QUIT_DEADLINE, self._signal, "KILL"),
        ]

        def cancel(_: None) -> None:
            for call in later:
                if call.active():
                    call.cancel()

        return waiter.addCallback(cancel)

    def _signal(self, name: str) -> None:
        if self._process is not None:
            try:
                self._process.signalProcess(name)
            except ProcessExitedAlready:
                pass

    def destroy(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._destroy())

    async def _destroy(self) -> None:
        await self.power_off()
        await self._ports.close()
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await (monitor.stopListening() or succeed(None))
        shutil.rmtree(self.spec.directory, ignore_errors=True)
        self._ledger.close()
        self._change(MachineState.DESTROYED)

    def leave(self) -> Deferred[None]:
        return self._cannot("outlive its host agent")

    def save_state(self) -> Deferred[None]:
        return self._cannot("be saved")

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        return self._cannot("make snapshots")

    def restore(self, name: str) -> Deferred[None]:
        return self._cannot("make snapshots")

    def snapshots(self) -> Deferred[list[str]]:
        return succeed([])

    def delete_snapshot(self, name: str) -> Deferred[None]:
        return self._cannot("make snapshots")

    def _cannot(self, what: str) -> Deferred[None]:
        return fail(HypervisorError(f"the VM {self.spec.name} cannot {what} with this driver"))

    def cpu_seconds(self) -> float:
        return self._cpu_time.look(self.pid)

    def console_tail(self, lines: int = 20) -> str:
        text = _ESCAPES.sub("", self._console.decode("utf-8", "replace"))
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x09\x0b-\x1f\x7f]")


class _MonitorFactory(Factory):
    noisy = False

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine

    def buildProtocol(self, addr: object) -> QMP:
        qmp = QMP(self._machine._reactor, self._machine.monitor_event)
        self._machine.monitor_connected(qmp)
        return qmp


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise HypervisorError(f"this host has no {name}", REMEDY)
    return path


def _value(text: object) -> str:
    """A value inside one of QEMU's comma-separated options."""
    return str(text).replace(",", ",,")


def _gentle() -> list[str]:
    """What to start QEMU with, where there is such a thing: lowest priority, and an end together with ours."""
    if sys.platform != "linux":
        return []
    words = []
    if setpriv := shutil.which("setpriv"):
        words += [setpriv, "--pdeathsig", "KILL", "--"]
    if nice := shutil.which("nice"):
        words += [nice, "-n", "19"]
    return words
