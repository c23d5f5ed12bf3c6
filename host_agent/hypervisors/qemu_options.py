"""QEMU's programs, and its command line: the same for a boot and for what is restored, or QEMU refuses it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs

from host_agent import exchange

from .base import HypervisorError, MachineSpec
from .images import DiskBus, Firmware, Image
from .qemu_wiring import CLOSED_GATEWAY, Wires
from .qemu_words import value

# As images have it; systems have names of their own for it.
ARCHITECTURE = {"AMD64": "x86_64", "ARM64": "aarch64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
QEMU = f"qemu-system-{ARCHITECTURE}"
QEMU_IMG = "qemu-img"
REMEDY = {
    "win32": "install QEMU: https://www.qemu.org/download/#windows",
    "darwin": "brew install qemu zstd",
}.get(sys.platform, "apt install qemu-system-x86 qemu-utils zstd")
GATEWAY = CLOSED_GATEWAY  # on Unix
OVERHEAD_MB = 1024  # 256 of them for translated code; measured: 400 in all for an idle guest, emulated
HOST_LINE = "org.vmwrapper.host"  # the serial port through which the guest hears of pauses and restores

# What a guest here never uses costs half a second of an emulated boot.
MACHINE = "q35,i8042=off,hpet=off,smbus=off,sata=off"
# Images that others made may know older disks only.
MACHINES = {DiskBus.VIRTIO: MACHINE, DiskBus.IDE: "pc", DiskBus.SATA: "q35"}
DISKS = {DiskBus.VIRTIO: "virtio-blk-pci", DiskBus.IDE: "ide-hd,bus=ide.0", DiskBus.SATA: "ide-hd,bus=ide.0"}
UEFI = (Path("/usr/share/ovmf/OVMF.fd"), Path("/usr/share/edk2/ovmf/OVMF.fd"), Path("/usr/share/qemu/ovmf-x86_64.bin"))
NETWORK = "net"  # QEMU's name for the guest's
RAM = "pc.ram"  # its name for the memory of such machines
# What an emulated processor is better without. Told of "fast string moves", Linux copies and clears memory with `rep
# movsb`, which QEMU does byte by byte: a third to a seventh of what plain loops reach. A fifth level of page tables
# makes each look into them longer, for memory that no guest has.
SLOWER = {"x86_64": ",erms=off,fsrm=off,la57=off"}.get(ARCHITECTURE, "")
TCG = ("-accel", "tcg,thread=multi,tb-size=256", "-cpu", f"max{SLOWER}")
KVM = ("-accel", "kvm", "-cpu", "host")
HVF = ("-accel", "hvf", "-cpu", "host")
# It knows no "host"; without the second word, old versions of Windows deliver no interrupts.
WHPX = ("-accel", "whpx,kernel-irqchip=off", "-cpu", "qemu64")
HARDWARE = {"win32": WHPX, "darwin": HVF}.get(sys.platform, KVM)  # what drives processors that can do it
NAMES: dict[tuple[str, ...], str] = {TCG: "emulated", KVM: "with KVM", HVF: "with HVF", WHPX: "with WHPX"}


def accelerator_of(argv: Sequence[str]) -> tuple[str, ...] | None:
    """What drives the processors of a QEMU with this command line, in the form of TCG and its like."""
    try:
        at = argv.index(TCG[0])
    except ValueError:
        return None
    return tuple(argv[at : at + len(TCG)])


def emulated(accelerator: Sequence[str]) -> bool:
    return accelerator[1].startswith("tcg")


def how_it_runs(accelerator: tuple[str, ...]) -> str:
    """In a word for people; also of one that another version of us chose."""
    return NAMES.get(accelerator) or (NAMES[TCG] if emulated(accelerator) else " ".join(accelerator))


@attrs.frozen
class MemoryFile:
    """A file that is a guest's memory. What the guest writes goes into it only when it is `shared`."""

    path: Path
    shared: bool


def command_line(
    spec: MachineSpec,
    accelerator: tuple[str, ...],
    disk: Path,
    wires: Wires,
    config: Path | None,
    memory: MemoryFile | None = None,
) -> list[str]:
    """Everything but how it starts. A restored guest has its `config` in its memory."""
    image = spec.image
    argv = [*_gentle(), *_memory_limit(spec.memory_mb), program(QEMU), "-name", value(spec.name), *accelerator]
    backend = f",memory-backend={RAM}" if memory is not None else ""
    argv += ["-M", MACHINES[image.disk_bus] + backend, "-smp", str(spec.cpus), "-m", str(spec.memory_mb)]
    if memory is not None:
        # Under the name that it has without a file: a state of the one is also one of the other.
        share = "on" if memory.shared else "off"
        named = f"id={RAM},x-use-canonical-path-for-ramblock-id=off"
        argv += [
            "-object",
            f"memory-backend-file,{named},size={spec.memory_mb}M,share={share},mem-path={value(memory.path)}",
        ]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    # elevateprivileges=deny or =children would forbid the setsid() with which QEMU starts the helper of a port.
    sandbox = "on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny"
    argv += ["-sandbox", sandbox] if sys.platform == "linux" else []
    argv += ["-chardev", f"socket,id=monitor,{wires.monitor}"]
    argv += ["-mon", "chardev=monitor,mode=control"]
    argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    if image.kernel is None:
        argv += ["-device", "VGA,vgamem_mb=4"]  # boot loaders write there; our own kernels have no screen at all
        argv += ["-bios", str(_uefi(image))] if image.firmware is Firmware.UEFI else []
    else:
        argv += ["-kernel", str(image.kernel), "-append", image.cmdline]
        argv += ["-initrd", str(image.initrd)] if image.initrd is not None else []
    argv += ["-drive", f"if=none,id=disk,format=qcow2,discard=unmap,cache=writeback,file={value(disk)}"]
    argv += ["-device", f"{DISKS[image.disk_bus]},drive=disk"]
    argv += ["-netdev", f"user,id={NETWORK},ipv6=off,{wires.network}"]
    argv += ["-device", f"virtio-net-pci,netdev={NETWORK},romfile=", "-device", "virtio-rng-pci"]
    argv += ["-chardev", f"socket,id=host,{wires.host}"]
    argv += ["-device", "virtio-serial-pci,max_ports=2", "-device", f"virtserialport,chardev=host,name={HOST_LINE}"]
    argv += ["-device", "vmgenid,guid=auto"]  # guests whose kernels know it seed their random numbers anew
    if has_exchange(spec, accelerator):  # the last, so that a state without it is one for this machine, too
        argv += ["-drive", f"if=none,id=exchange,format=raw,cache=unsafe,file={value(spec.directory / exchange.NAME)}"]
        # When the host's disk is full, copies go without this one; the guest is not to stop.
        argv += ["-device", f"virtio-blk-pci,drive=exchange,serial={exchange.SERIAL},werror=report,rerror=report"]
    if config is not None:
        argv += ["-fw_cfg", f"name=opt/vmwrapper/config,file={value(config)}"]
    return argv


def has_exchange(spec: MachineSpec, accelerator: tuple[str, ...]) -> bool:
    """Whether copies have a disk to go through: where all that a network does is emulated, and in images of our own."""
    return emulated(accelerator) and spec.image.kernel is not None and sys.platform != "win32"


def _uefi(image: Image) -> Path:
    for path in UEFI:
        if path.is_file():
            return path
    raise HypervisorError(f"the image {image.name} needs UEFI firmware, which is not here", "apt install ovmf")


def find_program(name: str) -> str | None:
    """Where it is; QEMU's installer for Windows puts it on no PATH."""
    path = os.environ.get("PATH", os.defpath)
    if sys.platform == "win32":
        path = os.pathsep.join([path, str(Path(os.environ.get("PROGRAMFILES", "C:\\Program Files")) / "qemu")])
    return shutil.which(name, path=path)


def program(name: str) -> str:
    path = find_program(name)
    if path is None:
        raise HypervisorError(f"this host has no {name}", REMEDY)
    return path


def _memory_limit(guest_mb: int) -> list[str]:
    """QEMU's own memory beyond the guest's is bounded: what leaks ends the VM, and not the volunteer's programs.

    A control group would count more exactly, but most volunteers' clients may make none; this needs no permission.
    """
    prlimit = shutil.which("prlimit") if sys.platform == "linux" else None
    return [prlimit, f"--data={(guest_mb + OVERHEAD_MB) << 20}", "--"] if prlimit else []


def _gentle() -> list[str]:
    """What to start QEMU with, where there is such a thing: the end together with its leash, lowest priorities."""
    if sys.platform != "linux":
        return []
    words = []
    if setpriv := shutil.which("setpriv"):
        words += [setpriv, "--pdeathsig", "KILL", "--"]
    if ionice := shutil.which("ionice"):
        words += [ionice, "-t", "-c", "3"]
    if nice := shutil.which("nice"):
        words += [nice, "-n", "19"]
    return words
