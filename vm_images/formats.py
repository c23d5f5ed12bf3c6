"""The disk in the forms that other hypervisors take: VDI, streamOptimized VMDK, and an appliance (OVA) around that."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from .tools import SOURCE_DATE_EPOCH, BuildError, run

_VDI_SIGNATURE = b"\x7f\x10\xda\xbe"
_VDI_IDENTITIES = 0x188  # of the image and of its last change, 16 bytes each
_SECTOR = 512
_VMDK_MAGIC = b"KDMV"
_VMDK_HEADER = struct.Struct("<4s24xQQ")  # and where its descriptor begins and ends, in sectors
_VMDK_DESCRIPTOR_MOST = 128  # sectors

_OVF = """\
<?xml version="1.0" encoding="UTF-8"?>
<Envelope ovf:version="1.0" xml:lang="en-US" xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
 <References><File ovf:id="file1" ovf:href="{disk}" ovf:size="{size}"/></References>
 <DiskSection>
  <Info>The disk</Info>
  <Disk ovf:diskId="disk1" ovf:fileRef="file1" ovf:capacity="{capacity}"
   ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
 </DiskSection>
 <NetworkSection>
  <Info>The network</Info>
  <Network ovf:name="NAT"><Description>NAT</Description></Network>
 </NetworkSection>
 <VirtualSystem ovf:id="{name}">
  <Info>A guest of VMwrapper</Info>
  <OperatingSystemSection ovf:id="101"><Info>Linux</Info><Description>Linux26_64</Description></OperatingSystemSection>
  <VirtualHardwareSection>
   <Info>One processor, an IDE disk, a virtio network card</Info>
   <System><vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>
    <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>
    <vssd:VirtualSystemType>virtualbox-2.2</vssd:VirtualSystemType></System>
{items}  </VirtualHardwareSection>
 </VirtualSystem>
</Envelope>
"""
_ITEMS: tuple[dict[str, str], ...] = (
    {"ElementName": "1 processor", "InstanceID": "1", "ResourceType": "3", "VirtualQuantity": "1"},
    {"AllocationUnits": "MegaBytes", "ElementName": "memory", "InstanceID": "2", "ResourceType": "4"},
    {"Address": "0", "ElementName": "IDE", "InstanceID": "3", "ResourceSubType": "PIIX4", "ResourceType": "5"},
    {
        "AddressOnParent": "0",
        "ElementName": "disk",
        "HostResource": "/disk/disk1",
        "InstanceID": "4",
        "Parent": "3",
        "ResourceType": "17",
    },
    {
        "AutomaticAllocation": "true",
        "Connection": "NAT",
        "ElementName": "network",
        "InstanceID": "5",
        "ResourceSubType": "virtio",
        "ResourceType": "10",
    },
)


def to_vdi(source: Path, place: Path, digest: str, memory_mb: int, name: str) -> Path:
    """VirtualBox's own form."""
    target = place / "disk.vdi"
    _convert(source, "vdi", target)
    with target.open("r+b") as file:
        head = file.read(_VDI_IDENTITIES + 32)
        if head[0x40:0x44] != _VDI_SIGNATURE:
            raise BuildError("qemu-img wrote no VDI that this builder knows")
        # Random otherwise; VirtualBox tells disks apart by them.
        file.seek(_VDI_IDENTITIES)
        file.write(hashlib.sha256(f"vdi {digest}".encode()).digest())
    return target


def to_vmdk(source: Path, place: Path, digest: str, memory_mb: int, name: str) -> Path:
    """Compressed, to be read from the front to the end: what appliances have."""
    target = place / "disk.vmdk"
    _convert(source, "vmdk", target, "-o", "subformat=streamOptimized")
    with target.open("r+b") as file:
        magic, sector, sectors = _VMDK_HEADER.unpack(file.read(_VMDK_HEADER.size))
        if magic != _VMDK_MAGIC or sectors > _VMDK_DESCRIPTOR_MOST:
            raise BuildError("qemu-img wrote no VMDK that this builder knows")
        file.seek(sector * _SECTOR)
        descriptor = with_content_id(file.read(sectors * _SECTOR), digest[:8])
        file.seek(sector * _SECTOR)
        file.write(descriptor)
    return target


def with_content_id(descriptor: bytes, content_id: str) -> bytes:
    """A VMDK's descriptor, padded with zeros as before, with this content id (eight hexadecimal digits).

    qemu-img's is random and has up to eight digits. It writes one first and the real one over it, so that the end of a
    longer text may still stand behind the zero that ends a shorter one.

    Raises:
        BuildError: there is no content id in it, or no room for this one.
    """
    text = descriptor.partition(b"\0")[0]
    changed, times = re.subn(rb"\nCID=[0-9a-f]+\n", b"\nCID=%s\n" % content_id.encode("ascii"), text)
    if times != 1 or len(changed) > len(descriptor):
        raise BuildError("qemu-img wrote a VMDK with a descriptor that this builder does not know")
    return changed.ljust(len(descriptor), b"\0")


def to_ova(source: Path, place: Path, digest: str, memory_mb: int, name: str) -> Path:
    """An appliance with one disk: a tar archive with its description first."""
    disk = to_vmdk(source, place, digest, memory_mb, name)
    capacity = int(_virtual_size(source))
    ovf = _OVF.format(
        disk=disk.name,
        size=disk.stat().st_size,
        capacity=capacity,
        name=escape(name),
        items="".join(_item(each, memory_mb) for each in _ITEMS),
    ).encode("utf-8")
    with disk.open("rb") as file:
        sums = {f"{name}.ovf": hashlib.sha256(ovf), disk.name: hashlib.file_digest(file, "sha256")}
    manifest = "".join(f"SHA256({each})= {total.hexdigest()}\n" for each, total in sums.items()).encode("utf-8")
    target = place / "disk.ova"
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for part, content in ((f"{name}.ovf", ovf), (f"{name}.mf", manifest)):
            archive.addfile(_member(part, len(content)), io.BytesIO(content))
        with disk.open("rb") as file:
            archive.addfile(_member(disk.name, disk.stat().st_size), file)
    disk.unlink()
    return target


FORMATS: dict[str, Callable[[Path, Path, str, int, str], Path]] = {"vdi": to_vdi, "vmdk": to_vmdk, "ova": to_ova}


def _convert(source: Path, kind: str, target: Path, *options: str) -> None:
    # No threads: they write a compressed disk's parts in another order each time.
    run(["qemu-img", "convert", "-m", "1", "-f", "qcow2", "-O", kind, *options, source, target], f"writing the {kind}")


def _virtual_size(disk: Path) -> str:
    found = re.search(rb'"virtual-size": (\d+)', run(["qemu-img", "info", "--output=json", disk], "reading the disk"))
    if not found:
        raise BuildError(f"qemu-img says nothing of the size of {disk}")
    return found[1].decode("ascii")


def _item(fields: dict[str, str], memory_mb: int) -> str:
    if fields["ResourceType"] == "4":
        fields = {**fields, "VirtualQuantity": str(memory_mb)}
    inside = "".join(f"<rasd:{key}>{escape(value)}</rasd:{key}>" for key, value in sorted(fields.items()))
    return f"   <Item>{inside}</Item>\n"


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(os.path.basename(name))  # noqa: PTH119
    info.size, info.mode, info.mtime = size, 0o644, SOURCE_DATE_EPOCH
    return info
