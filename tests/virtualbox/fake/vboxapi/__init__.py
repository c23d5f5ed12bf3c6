"""A `vboxapi` without VirtualBox: objects of the shape that VirtualBox 6.1 has, or 7.x, under the real pyvbox.

`FAKE_VIRTUALBOX` is "6.1", "7.0" or "7.2"; `FAKE_VIRTUALBOX_HANGS` names a method that never comes back;
`FAKE_VIRTUALBOX_FAILS` is METHOD=TEXT, a progress that fails. A machine's process is one that waits for our end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

VERSION = os.environ["FAKE_VIRTUALBOX"]
if VERSION == "broken":
    raise ImportError("VBoxPython3.so: wrong ELF class")
SHAPE = tuple(int(part) for part in VERSION.split("."))
HANGS = os.environ.get("FAKE_VIRTUALBOX_HANGS", "")
FAILS = dict([os.environ["FAKE_VIRTUALBOX_FAILS"].split("=", 1)]) if "FAKE_VIRTUALBOX_FAILS" in os.environ else {}

# As 7.2 has them; 6.1's are in pyvbox, which was generated from it.
STATES_7 = (
    *("Null", "PoweredOff", "Saved", "Teleported", "Aborted", "AbortedSaved", "Running", "Paused", "Stuck"),
    *("Teleporting", "LiveSnapshotting", "Starting", "Stopping", "Saving", "Restoring", "TeleportingPausedVM"),
    *("TeleportingIn", "DeletingSnapshotOnline", "DeletingSnapshotPaused", "OnlineSnapshotting", "RestoringSnapshot"),
    *("DeletingSnapshot", "SettingUp", "Snapshotting"),
)


class FakeError(Exception):
    def __init__(self, text: str, errno: int = 0x80BB0001) -> None:
        super().__init__(text)
        self.msg, self.errno = text, errno


class Constants:
    """Enum values: the 7.x ones are not those of 6.1, so that a number written down anywhere fails."""

    def all_values(self, name: str) -> dict[str, int]:
        if SHAPE >= (7, 0) and name == "MachineState":
            return {label: value for value, label in enumerate(STATES_7)} | {"FirstOnline": 6, "LastOnline": 19}
        from virtualbox import library

        values = {label: value for label, value, _ in ORIGINAL.setdefault(name, getattr(library, name)._enums)}
        return {label: value * 2 + 1 for label, value in values.items()} if SHAPE >= (7, 0) else values


ORIGINAL: dict[str, Any] = {}
constants = Constants()
if SHAPE >= (7, 1):
    Constants.PlatformArchitecture_x86 = 77  # type: ignore[attr-defined]


def value(enum: str, name: str) -> int:
    return constants.all_values(enum)[name]


def hang(method: str) -> None:
    if method == HANGS:
        time.sleep(3600)


class Thing:
    """An object whose attributes are made when it is; setting any other is an error, as over COM."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__ and not name.startswith("_"):
            raise AttributeError(f"the fake {VERSION} {type(self).__name__} has no {name}")
        self.__dict__[name] = value


class ErrorInfo(Thing):
    pass


class Progress(Thing):
    """Complete at the second look."""

    def __init__(self, method: str, done: Any = None) -> None:
        super().__init__(cancelable=False, resultCode=0, errorInfo=None)
        self._method, self._done, self._looks = method, done, 0

    @property
    def completed(self) -> bool:
        hang(self._method)
        self._looks += 1
        if self._looks == 2:
            if self._method in FAILS:
                self.resultCode = -2147467259
                self.errorInfo = ErrorInfo(text=FAILS[self._method], next=None)
            elif self._done is not None:
                self._done()
        return self._looks >= 2


class Medium(Thing):
    def __init__(self, box: VirtualBox, location: str, kind: int) -> None:
        super().__init__(location=location, deviceType=kind, parent=None, id=str(uuid.uuid4()))
        self._box = box
        self._children: list[Medium] = []
        self._machines: list[str] = []

    def getChildren(self) -> list[Medium]:
        return list(self._children)

    def getMachineIds(self) -> list[str]:
        return list(self._machines)

    def createDiffStorage(self, target: Medium, variant: list[int]) -> Progress:
        assert variant == [value("MediumVariant", "Diff")]

        def made() -> None:
            Path(target.location).write_bytes(b"difference")
            target.parent = self
            self._children.append(target)

        return Progress("createDiffStorage", made)

    def cloneToBase(self, target: Medium, variant: list[int]) -> Progress:
        return Progress("cloneToBase", lambda: Path(target.location).write_bytes(Path(self.location).read_bytes()))

    def deleteStorage(self) -> Progress:
        def gone() -> None:
            Path(self.location).unlink()
            self.close()

        return Progress("deleteStorage", gone)

    def close(self) -> None:
        if self._children or self._machines:
            raise FakeError(f"Medium '{self.location}' cannot be closed: it has children or machines", 0x80BB000C)
        if self.parent is not None:
            self.parent._children.remove(self)
        if self in self._box._media:
            self._box._media.remove(self)


class Adapter(Thing):
    def __init__(self) -> None:
        engine: dict[str, Any] = {"hostIP": "", "DNSProxy": False, "DNSPassDomain": True}
        if SHAPE >= (7, 0):
            engine["localhostReachable"] = False
        super().__init__(
            enabled=False, adapterType=0, attachmentType=0, hostOnlyInterface="", NATEngine=Thing(**engine)
        )


class Snapshot(Thing):
    def __init__(self, name: str, machine: Machine) -> None:
        kept = Thing(stateFilePath=machine.settingsFilePath)
        super().__init__(id=str(uuid.uuid4()), name=name, machine=kept, timeStamp=time.time_ns())
        self._children: list[Snapshot] = []

    def getChildren(self) -> list[Snapshot]:
        return list(self._children)


class Machine(Thing):
    def __init__(self, box: VirtualBox, file: str, name: str, identity: str) -> None:
        parts: dict[str, Any] = {}
        if SHAPE >= (7, 1):
            parts |= {"platform": Thing(RTCUseUTC=False), "firmwareSettings": Thing(IOAPICEnabled=False)}
        else:
            parts |= {"RTCUseUTC": False, "BIOSSettings": Thing(IOAPICEnabled=False)}
        if SHAPE >= (7, 0):
            parts["audioSettings"] = Thing(adapter=Thing(enabled=True))
        else:
            parts["audioAdapter"] = Thing(enabled=True)
        super().__init__(
            id=identity,
            name=name,
            accessible=True,
            state=value("MachineState", "PoweredOff"),
            sessionState=value("SessionState", "Unlocked"),
            sessionPID=0,
            settingsFilePath=file,
            stateFilePath="",
            logFolder=str(Path(file).parent / "Logs"),
            memorySize=128,
            CPUCount=1,
            CPUExecutionCap=100,
            graphicsAdapter=Thing(VRAMSize=8),
            snapshotCount=0,
            **parts,
        )
        self._box = box
        self._extra: dict[str, str] = {}
        self._attached: list[Medium] = []
        self._adapter, self._serial = Adapter(), Thing(enabled=False, path="", server=False, hostMode=0)
        self._process: subprocess.Popen[bytes] | None = None
        self._snapshots: list[Snapshot] = []
        Path(file).parent.mkdir(parents=True)
        self.saveSettings()

    def _is(self, *names: str) -> bool:
        return self.state in [value("MachineState", name) for name in names]

    def _become(self, name: str) -> None:
        self.state = value("MachineState", name)

    def saveSettings(self) -> None:
        Path(self.settingsFilePath).write_text("settings")

    def setExtraData(self, key: str, text: str) -> None:
        self._extra[key] = text

    def getExtraData(self, key: str) -> str:
        return str(self._extra.get(key, ""))

    def getNetworkAdapter(self, slot: int) -> Adapter:
        return self._adapter

    def getSerialPort(self, slot: int) -> Thing:
        return self._serial

    def addStorageController(self, name: str, bus: int) -> Thing:
        assert bus == value("StorageBus", "IDE")
        return Thing(name=name, controllerType=0)

    def attachDevice(self, name: str, port: int, device: int, kind: int, medium: Medium) -> None:
        self._attached.append(medium)
        medium._machines.append(self.id)

    def lockMachine(self, session: Session, kind: int) -> None:
        hang("lockMachine")
        assert kind == value("LockType", "Shared")
        session._lock(self)

    def launchVMProcess(self, session: Session, name: str, environment: list[str]) -> Progress:
        assert name == "headless"
        hang("launchVMProcess")
        if "launchVMProcess" in FAILS:
            return Progress("launchVMProcess")
        wait = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
        self._process = subprocess.Popen(wait, stdin=subprocess.PIPE)
        self.sessionPID = self._process.pid
        session._lock(self)

        def running() -> None:
            self._become("Running")
            self.sessionState = value("SessionState", "Locked")

        return Progress("launchVMProcess", running)

    def _end(self, state: str) -> None:
        if self._process is not None:
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait()
        self._process = None
        self._become(state)
        self.sessionState = value("SessionState", "Unlocked")

    def saveState(self) -> Progress:
        return Progress("saveState", lambda: self._end("Saved"))

    def discardSavedState(self, remove: bool) -> None:
        self._become("PoweredOff")

    def takeSnapshot(self, name: str, description: str, pause: bool) -> tuple[Progress, str]:
        if not pause and not self._is("Running"):
            raise FakeError("Cannot take a live snapshot of a virtual machine unless it is running.", 0x80BB0002)
        snapshot = Snapshot(name, self)

        def taken() -> None:
            if self._snapshots:
                self._snapshots[-1]._children.append(snapshot)
            self._snapshots.append(snapshot)
            self.snapshotCount += 1

        return Progress("takeSnapshot", taken), snapshot.id

    def findSnapshot(self, name: str) -> Snapshot:
        for snapshot in self._snapshots:
            if name in ("", snapshot.id, snapshot.name):
                return snapshot
        raise FakeError(f"Could not find a snapshot named '{name}'")

    def restoreSnapshot(self, snapshot: Snapshot) -> Progress:
        if self._is("Running", "Paused"):
            raise FakeError("Cannot delete the current state of the running machine", 0x80BB0002)
        return Progress("restoreSnapshot", lambda: self._become("Saved"))

    def deleteSnapshot(self, identity: str) -> Progress:
        snapshot = self.findSnapshot(identity)

        def gone() -> None:
            place = self._snapshots.index(snapshot)
            self._snapshots.remove(snapshot)
            self.snapshotCount -= 1
            if place:
                self._snapshots[place - 1]._children = snapshot._children

        return Progress("deleteSnapshot", gone)

    def unregister(self, mode: int) -> list[Medium]:
        if self.sessionState != value("SessionState", "Unlocked"):
            raise FakeError(f"Cannot unregister the machine '{self.name}' while it is locked", 0x80BB0007)
        self._box._machines.remove(self)
        media = list(self._attached)
        for medium in media:
            medium._machines.remove(self.id)
        # VirtualBox returns what lies under a difference as well: whoever deletes it all, deletes the image.
        return media + [medium.parent for medium in media if medium.parent is not None]


class Console(Thing):
    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def pause(self) -> None:
        hang("pause")
        self._machine._become("Paused")

    def resume(self) -> None:
        self._machine._become("Running")

    def powerDown(self) -> Progress:
        return Progress("powerDown", lambda: self._machine._end("PoweredOff"))


class Session(Thing):
    def __init__(self) -> None:
        super().__init__(state=value("SessionState", "Unlocked"), machine=None, console=None)
        self._first = False

    def _lock(self, machine: Machine) -> None:
        if self.state == value("SessionState", "Locked"):
            raise FakeError("The given session is busy", 0x80BB0007)
        self._first = machine.sessionState == value("SessionState", "Unlocked")
        machine.sessionState = value("SessionState", "Locked")
        self.__dict__.update(machine=machine, state=value("SessionState", "Locked"), console=Console(machine))

    def unlockMachine(self) -> None:
        self.state = value("SessionState", "Unlocked")
        if self._first and self.machine._process is None:
            self.machine.sessionState = value("SessionState", "Unlocked")


class Host(Thing):
    def findHostNetworkInterfaceByName(self, name: str) -> Thing:
        if name != "vboxnet0":
            raise FakeError(f"The host network interface named '{name}' could not be found")
        return Thing(IPAddress="127.0.0.2")


class VirtualBox(Thing):
    def __init__(self) -> None:
        versions = {"version": f"{VERSION}.99", "APIVersion": VERSION.replace(".", "_")}
        super().__init__(**versions, homeFolder="/nowhere", host=Host())
        self._machines: list[Machine] = []
        self._media: list[Medium] = []
        self._foreign()

    def _foreign(self) -> None:
        """A machine of somebody else, and one whose files are gone."""
        directory = os.environ.get("FAKE_VIRTUALBOX_FOREIGN")
        if directory:
            self._machines.append(Machine(self, f"{directory}/theirs/theirs.vbox", "theirs", str(uuid.uuid4())))
            lost = Machine(self, f"{directory}/lost/lost.vbox", "", str(uuid.uuid4()))
            lost.accessible = False
            self._machines.append(lost)

    def getMachines(self) -> list[Machine]:
        return list(self._machines)

    def getHardDisks(self) -> list[Medium]:
        return [m for m in self._media if m.deviceType == value("DeviceType", "HardDisk")]

    def getDVDImages(self) -> list[Medium]:
        return [m for m in self._media if m.deviceType == value("DeviceType", "DVD")]

    if SHAPE >= (7, 1):

        def createMachine(
            self, file: str, name: str, platform: int, groups: Any, system: str, flags: str, a: str, b: str, c: str
        ) -> Machine:
            assert platform == 77
            return self._new(file, name, flags)

    elif SHAPE >= (7, 0):

        def createMachine(  # type: ignore[misc]
            self, file: str, name: str, groups: Any, system: str, flags: str, a: str, b: str, c: str
        ) -> Machine:
            return self._new(file, name, flags)

    else:

        def createMachine(self, file: str, name: str, groups: Any, system: str, flags: str) -> Machine:  # type: ignore[misc]
            return self._new(file, name, flags)

    def _new(self, file: str, name: str, flags: str) -> Machine:
        hang("createMachine")
        assert flags.startswith("UUID=")
        return Machine(self, file, name, flags.removeprefix("UUID="))

    def registerMachine(self, machine: Machine) -> None:
        self._machines.append(machine)

    def findMachine(self, name: str) -> Machine:
        for machine in self._machines:
            if name in (machine.id, machine.name):
                if machine._process is not None and machine._process.poll() is not None:
                    machine._end("Aborted")
                return machine
        raise FakeError(f"Could not find a registered machine named '{name}'")

    def openMedium(self, location: str, kind: int, access: int, new_identity: bool) -> Medium:
        if not Path(location).exists():
            raise FakeError(f"Could not open the medium '{location}': VERR_FILE_NOT_FOUND", 0x80BB000C)
        for medium in self._media:
            if medium.location == location:
                return medium
        self._media.append(Medium(self, location, kind))
        return self._media[-1]

    def createMedium(self, form: str, location: str, access: int, kind: int) -> Medium:
        self._media.append(Medium(self, location, kind))
        return self._media[-1]


class VirtualBoxManager:
    def __init__(self, style: Any = None, parameters: Any = None) -> None:
        if VERSION == "0.0":
            raise FakeError("Failed to start VBoxSVC", 0x80004005)
        self.constants = constants
        self._box = VirtualBox()

    def getVirtualBox(self) -> VirtualBox:
        return self._box

    def getSessionObject(self, box: Any = None) -> Session:
        return Session()

    def queryInterface(self, thing: Any, name: str) -> Any:
        return thing
