"""What the driver asks of VirtualBox, over pyvbox. Takes and returns plain values: no object of pyvbox leaves here.

Runs in the worker's process. Operations that take time are generators (`pending.py`). Machines are named by their
UUIDs, which the driver chooses before they exist.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import differences
from .pending import Operation, Progress, Until
from .pyvbox import DEAD, BoxError, Pyvbox, ServiceLost, status, words

GROUP = "/vmwrapper"
MARK = "vmwrapper/instance"  # extra data of the machines that are ours
SYSTEM = "Linux26_64"
CONTROLLER = "IDE"  # with the PIIX4 chip: what every kernel can boot from
VRAM_MB = 16
UNLOCKED = "Unlocked"
NOT_READY = 0x80070005  # the status of an object that VirtualBox has let go of

SHORT = 60.0  # seconds for what only writes settings
STATE = 600.0  # seconds for what writes or reads a guest's memory or merges disks
END = 30.0  # seconds for a machine's process to end


class Box:
    """One connection to VirtualBox's service."""

    def __init__(self, pyvbox: Pyvbox) -> None:
        self._pyvbox = pyvbox
        self._vbox = pyvbox.vbox
        self._enum = pyvbox.library
        self._member = pyvbox.member

    # -- looking

    def hello(self) -> dict[str, Any]:
        """Versions and places."""
        return {
            "version": str(self._vbox.version),
            "api": str(self._vbox.api_version),
            "home": str(self._vbox.home_folder),
            "vboxapi": self._pyvbox.vboxapi,
        }

    def machines(self) -> list[dict[str, Any]]:
        """Every machine that VirtualBox has for this user, ours or not."""
        return [self._describe(machine) for machine in self._vbox.machines]

    def _describe(self, machine: Any) -> dict[str, Any]:
        if not machine.accessible:
            nothing = {"name": "", "instance": "", "memory_mb": 0, "cpus": 0, "pid": None}
            return {"id": str(machine.id_p), "state": "Inaccessible", **nothing}
        return {
            "id": str(machine.id_p),
            "name": str(machine.name),
            "state": str(machine.state),
            "instance": str(machine.get_extra_data(MARK)),
            "memory_mb": int(machine.memory_size),
            "cpus": int(machine.cpu_count),
            "pid": _pid(machine),
        }

    def look(self, machine: str) -> dict[str, Any]:
        """State, process and snapshots of one machine, the oldest first."""
        found = self._machine(machine)
        return {
            "state": str(found.state),
            "pid": _pid(found),
            "locked": str(found.session_state) != UNLOCKED,
            "logs": str(found.log_folder),
            "snapshots": [{"id": str(s.id_p), "name": str(s.name)} for s in _snapshots(found)],
        }

    def hostonly_address(self, interface: str) -> str:
        """This host's address on a host-only network."""
        try:
            found = self._vbox.host.find_host_network_interface_by_name(interface)
        except Exception as error:
            self.check(error)
            hint = "VBoxManage list hostonlyifs names those that are there; hostonlyif create makes one"
            raise BoxError(f"VirtualBox has no host-only interface {interface} ({words(error)})", hint) from None
        return str(found.ip_address)

    def state(self, machine: str) -> tuple[str, int | None]:
        """State and process of one machine: what is looked at all the time."""
        found = self._vbox.find_machine(machine)
        return str(found.state), _pid(found)

    def _machine(self, machine: str) -> Any:
        try:
            return self._vbox.find_machine(machine)
        except Exception as error:
            self.check(error)
            raise BoxError(f"VirtualBox does not know the machine {machine} ({words(error)})") from None

    def _find(self, machine: str) -> Any | None:
        """The machine, also one whose files are gone, or None."""
        for each in self._vbox.machines:
            if str(each.id_p) == machine:
                return each
        return None

    @contextmanager
    def _session(self, machine: Any) -> Iterator[Any]:
        """A shared lock: of the running machine's own session, or the only one when it does not run."""
        session = self._pyvbox.session()
        machine.lock_machine(session, self._member("LockType", "Shared"))
        try:
            yield session
        finally:
            self._unlock(session)

    def _unlock(self, session: Any) -> None:
        """Give a lock back; the machine's process may have ended, and the lock with it, at any moment."""
        try:
            if str(session.state) == "Locked":
                session.unlock_machine()
        except Exception as error:
            self.check(error)

    def check(self, error: Exception) -> None:
        """ServiceLost if this failure means that VirtualBox's service is gone."""
        if isinstance(error, ServiceLost):
            raise error
        if status(error) not in DEAD:
            return
        # A machine's own process says the same when it ends during a call: only the service can tell which it was.
        try:
            str(self._vbox.api_version)
        except Exception:
            why = words(error)
            raise ServiceLost(f"VirtualBox's service has ended ({why})", "it is started again when needed") from None

    def _unlocked(self, machine: Any, what: str) -> Until:
        return Until(lambda: str(machine.session_state) == UNLOCKED, what, END)

    # -- making

    def create(
        self,
        *,
        machine: str,
        name: str,
        instance: str,
        settings: str,
        base: str,
        disk: str,
        iso: str,
        console: str,
        memory_mb: int,
        cpus: int,
        cpu_cap: int,
        network: str,
    ) -> Operation:
        """Make and register a machine: `disk` is a difference over `base`, which is never written.

        `console` is the path of a socket that VirtualBox listens on; `network` is "nat", "none" or "hostonly:NAME".
        """
        new = self._new_machine(machine, name, settings)
        new.memory_size = memory_mb
        new.cpu_count = cpus
        new.cpu_execution_cap = cpu_cap
        new.graphics_adapter.vram_size = VRAM_MB
        new.set_extra_data(MARK, instance)
        differences.set_io_apic(new._i)
        differences.switch_off_audio(new._i)
        differences.clock_in_utc(new._i)
        self._network(new.get_network_adapter(0), network)
        port = new.get_serial_port(0)
        port.enabled = True
        port.path = console
        port.server = True
        port.host_mode = self._member("PortMode", "HostPipe")
        controller = new.add_storage_controller(CONTROLLER, self._member("StorageBus", "IDE"))
        controller.controller_type = self._member("StorageControllerType", "PIIX4")
        self._vbox.register_machine(new)
        medium = yield from self._difference(base, disk)
        with self._session(new) as session:
            session.machine.attach_device(CONTROLLER, 0, 0, self._member("DeviceType", "HardDisk"), medium)
            session.machine.attach_device(CONTROLLER, 1, 0, self._member("DeviceType", "DVD"), self._dvd(iso))
            session.machine.save_settings()

    def _new_machine(self, machine: str, name: str, settings: str) -> Any:
        constants = self._pyvbox.manager.constants
        x86 = getattr(constants, "PlatformArchitecture_x86", None)
        raw = differences.create_machine(self._vbox._i, x86, settings, name, [GROUP], SYSTEM, f"UUID={machine}")
        return self._enum.IMachine(raw)

    def _network(self, adapter: Any, network: str) -> None:
        kind, _, name = network.partition(":")
        adapter.enabled = kind != "none"
        if kind == "none":
            return
        adapter.adapter_type = self._member("NetworkAdapterType", "Virtio")
        if kind == "hostonly":
            adapter.attachment_type = self._member("NetworkAttachmentType", "HostOnly")
            adapter.host_only_interface = name
            return
        adapter.attachment_type = self._member("NetworkAttachmentType", "NAT")
        engine = adapter.nat_engine
        # The guest's connections leave from the loopback interface: they reach this host's services and no network.
        engine.host_ip = "127.0.0.1"
        engine.dns_proxy = engine.dns_pass_domain = False
        differences.reach_loopback(engine._i)

    def _difference(self, base: str, disk: str) -> Operation:
        read_only = self._member("AccessMode", "ReadOnly")
        kind = self._member("DeviceType", "HardDisk")
        parent = self._vbox.open_medium(base, kind, read_only, False)
        medium = self._vbox.create_medium("VDI", disk, self._member("AccessMode", "ReadWrite"), kind)
        made = parent.create_diff_storage(medium, [self._member("MediumVariant", "Diff")])
        yield Progress(made, f"making the disk {disk} over {base}", SHORT)
        return medium

    def _dvd(self, iso: str) -> Any:
        return self._vbox.open_medium(
            iso, self._member("DeviceType", "DVD"), self._member("AccessMode", "ReadOnly"), False
        )

    def convert(self, *, source: str, target: str) -> Operation:
        """Write a disk of any format that VirtualBox reads as a VDI."""
        kind = self._member("DeviceType", "HardDisk")
        origin = self._vbox.open_medium(source, kind, self._member("AccessMode", "ReadOnly"), False)
        try:
            medium = self._vbox.create_medium("VDI", target, self._member("AccessMode", "ReadWrite"), kind)
            copied = origin.clone_to_base(medium, [self._member("MediumVariant", "Standard")])
            yield Progress(copied, f"converting {source}", STATE)
            medium.close()
        finally:
            origin.close()

    # -- running

    def start(self, machine: str) -> Operation:
        """Start without a window, also from a saved state; its process as a number."""
        found = self._machine(machine)
        session = self._pyvbox.session()
        try:
            launched = found.launch_vm_process(session, "headless", [])
            yield Progress(launched, "starting the machine", STATE)
        finally:
            self._unlock(session)
        return {"pid": _pid(found)}

    def pause(self, machine: str) -> None:
        with self._session(self._machine(machine)) as session:
            if str(session.machine.state) != "Paused":
                session.console.pause()

    def resume(self, machine: str) -> None:
        with self._session(self._machine(machine)) as session:
            if str(session.machine.state) == "Paused":
                session.console.resume()

    def save_state(self, machine: str) -> Operation:
        """Write the guest's memory to disk and end its process."""
        found = self._machine(machine)
        try:
            with self._session(found) as session:
                yield Progress(session.machine.save_state(), "saving the machine's state", STATE)
        except Exception as error:
            self.check(error)
            if status(error) not in DEAD:
                raise
            # Its process ended before it could say that it is done; the state says whether it was.
        yield self._unlocked(found, "ending the saved machine's process")
        if str(found.state) != "Saved":
            raise BoxError(f"the machine's process ended while its state was being saved: it is {found.state}")
        _flush(str(found.state_file_path), str(found.settings_file_path))

    def discard_state(self, machine: str) -> None:
        with self._session(self._machine(machine)) as session:
            if str(session.machine.state) in ("Saved", "AbortedSaved"):
                session.machine.discard_saved_state(True)

    def snapshot(self, machine: str, name: str) -> Operation:
        """Take a snapshot, of a running machine while it runs; its UUID. It is on the disk when this returns."""
        found = self._machine(machine)
        with self._session(found) as session:
            stands_still = str(session.machine.state) != "Running"
            progress, identity = session.machine.take_snapshot(name, "", stands_still)
            yield Progress(progress, f"taking the snapshot {name}", STATE)
        _flush(str(found.find_snapshot(str(identity)).machine.state_file_path), str(found.settings_file_path))
        return str(identity)

    def restore(self, machine: str, snapshot: str) -> Operation:
        """Set a machine that does not run back to a snapshot."""
        found = self._machine(machine)
        with self._session(found) as session:
            progress = session.machine.restore_snapshot(found.find_snapshot(snapshot))
            yield Progress(progress, f"restoring the snapshot {snapshot}", STATE)

    def delete_snapshot(self, machine: str, snapshot: str) -> Operation:
        """Remove a snapshot, its disk merged into the next; one that is not there is removed already."""
        found = self._machine(machine)
        for each in _snapshots(found):
            if snapshot in (str(each.id_p), str(each.name)):
                with self._session(found) as session:
                    progress = session.machine.delete_snapshot(str(each.id_p))
                    yield Progress(progress, f"deleting the snapshot {snapshot}", STATE)

    def power_off(self, machine: str) -> Operation:
        """End the machine as if its power were cut."""
        yield from self._power_off(self._machine(machine))

    def _power_off(self, machine: Any) -> Operation:
        if str(machine.session_state) == UNLOCKED:
            return
        pid = _pid(machine)
        try:
            with self._session(machine) as session:
                yield Progress(session.console.power_down(), "powering the machine off", END)
            yield self._unlocked(machine, "ending the machine's process")
        except Exception as error:
            self.check(error)
            if pid is None or str(machine.session_state) == UNLOCKED:
                return  # it ended by itself meanwhile
            if status(error) not in DEAD:  # its process is there, and does not obey
                with suppress(ProcessLookupError):
                    os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            yield self._unlocked(machine, "ending the machine's process by force")

    # -- removing

    def remove(self, machine: str, directory: str) -> Operation:
        """Unregister a machine and delete its disks below `directory`; nothing outside of it is deleted.

        Works for a machine that runs, that a crash left half made or without files, and that is not there.
        """
        found = self._find(machine)
        if found is not None:
            if found.accessible:
                yield from self._power_off(found)
            media = found.unregister(self._member("CleanupMode", "Full"))
            yield from self._forget(media, directory)
        yield from self._forget(self._known_below(directory), directory)

    def _known_below(self, directory: str) -> list[Any]:
        """Media below a directory that no machine has: what a crash during the making of a machine leaves."""
        known = [*self._vbox.hard_disks, *self._vbox.dvd_images]
        return [medium for medium in known if _below(str(medium.location), directory)]

    def _forget(self, media: list[Any], directory: str) -> Operation:
        """Delete hard disks that are ours, children first, and close the rest.

        VirtualBox returns the base image together with the differences over it, and would delete it as gladly.
        """
        disk = self._member("DeviceType", "HardDisk")
        for medium in sorted(media, key=_depth, reverse=True):
            try:
                location = str(medium.location)
                ours = _below(location, directory)
                if ours and medium.device_type == disk and Path(location).exists():
                    yield Progress(medium.delete_storage(), f"deleting {location}", SHORT)
                elif ours or not (medium.children or medium.machine_ids):
                    medium.close()
            except Exception as error:
                self.check(error)
                if status(error) != NOT_READY:
                    raise
                # A medium without a machine goes by itself, together with the last of its children.


def _pid(machine: Any) -> int | None:
    """The process of a machine, or None: VirtualBox keeps the number of the last one for ever."""
    if str(machine.session_state) == UNLOCKED:
        return None
    pid = int(machine.session_pid)
    return pid if 0 < pid < 0xFFFFFFFF else None


def _snapshots(machine: Any) -> list[Any]:
    """A machine's snapshots, the oldest first. They are a tree: after a restore the next one is another branch."""
    found: list[Any] = []
    waiting = [machine.find_snapshot("")] if machine.snapshot_count else []
    while waiting:
        snapshot = waiting.pop()
        found.append(snapshot)
        waiting.extend(snapshot.children)
    return sorted(found, key=lambda snapshot: int(snapshot.time_stamp))


def _flush(*paths: str) -> None:
    """Have files on the disk, which VirtualBox itself does not see to: a power cut must not take the only snapshot."""
    for path in paths:
        if path:
            handle = os.open(path, os.O_RDWR)  # Windows flushes nothing else
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _depth(medium: Any) -> int:
    depth, parent = 0, medium.parent
    while parent:
        depth, parent = depth + 1, parent.parent
    return depth


def _below(path: str, directory: str) -> bool:
    return Path(directory).resolve() in Path(path).resolve().parents
