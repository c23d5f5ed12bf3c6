"""Reads an OCI archive or a `docker save` file: its configuration and its layers, each checked and within limits."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .tools import BuildError, find_tool

MOST_JSON = 4 << 20  # bytes of a manifest or configuration
MOST_LAYERS = 256
MOST_BYTES = 64 << 30  # of all files of all layers
MOST_LINKS = 40  # that one path may lead through
MOST_HEADER = 1 << 20  # bytes of a long name or of other words about one file
MOST_RATIO = 2000  # of a layer's content to its compressed size, above SURE_BYTES
SURE_BYTES = 1 << 30
_GZIP, _XZ, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class HostileArchive(BuildError):
    def __init__(self, what: str) -> None:
        super().__init__(f"the container's archive is refused: {what}")


class BoundedInfo(tarfile.TarInfo):
    """What is said of a file; tarfile reads it into memory, however long it is."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADERS and self.size > MOST_HEADER:
            raise HostileArchive(f"it says {self.size} bytes about one file")
        return super()._proc_member(tar)  # type: ignore[misc]


def open_image(outer: tarfile.TarFile) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Its configuration, and its layers: name in the archive and digest of what is unpacked."""
    names = {member.name.removeprefix("./") for member in outer.getmembers()}
    if "index.json" in names and "oci-layout" in names:
        index = _json(outer, "index.json")
        if len(index["manifests"]) != 1:
            raise BuildError("the OCI archive has several images, and one is needed", "save one image alone")
        manifest = _blob_json(outer, index["manifests"][0]["digest"])
        if "manifests" in manifest:
            fitting = [
                each for each in manifest["manifests"] if each.get("platform", {}).get("architecture") == "amd64"
            ]
            if not fitting:
                raise BuildError("the OCI archive has no image for amd64")
            manifest = _blob_json(outer, fitting[0]["digest"])
        config = _blob_json(outer, manifest["config"]["digest"])
        blobs = [_blob(each["digest"]) for each in manifest["layers"]]
    elif "manifest.json" in names:
        (saved,) = _json(outer, "manifest.json")
        config = _json(outer, saved["Config"])
        blobs = list(saved["Layers"])
    else:
        raise BuildError("the archive has neither an index.json nor a manifest.json: it is no container's")
    digests = config["rootfs"]["diff_ids"]
    if len(blobs) != len(digests) or len(blobs) > MOST_LAYERS:
        raise HostileArchive(f"it has {len(blobs)} layers and {len(digests)} digests of layers")
    if config.get("architecture", "amd64") != "amd64":
        raise BuildError(f"the container is for {config['architecture']}, and images are built for amd64")
    return config, list(zip(blobs, digests, strict=True))


def _blob(digest: str) -> str:
    kind, _, value = digest.partition(":")
    if kind != "sha256" or len(value) != 64 or not all(c in "0123456789abcdef" for c in value):
        raise HostileArchive(f"{digest[:80]!r} is no SHA-256")
    return f"blobs/sha256/{value}"


def _blob_json(outer: tarfile.TarFile, digest: str) -> dict[str, Any]:
    name = _blob(digest)
    content = _read(outer, name)
    if hashlib.sha256(content).hexdigest() != name.rpartition("/")[2]:
        raise HostileArchive(f"{name} was altered: its digest is another")
    value: dict[str, Any] = json.loads(content)
    return value


def _json(outer: tarfile.TarFile, name: str) -> Any:
    return json.loads(_read(outer, name))


def _member(outer: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    for _ in range(MOST_LINKS):
        try:
            member = outer.getmember(name)
        except KeyError:
            member = outer.getmember(f"./{name}")
        if not member.issym():
            break
        name = os.path.normpath(f"{os.path.dirname(name)}/{member.linkname}")  # noqa: PTH120
    if not member.isfile():
        raise HostileArchive(f"{name} is no file")
    return member


def _read(outer: tarfile.TarFile, name: str) -> bytes:
    member = _member(outer, name)
    source = outer.extractfile(member)
    if member.size > MOST_JSON or source is None:
        raise HostileArchive(f"{name} has {member.size} bytes, which no description needs")
    return source.read()


def unpack_layer(outer: tarfile.TarFile, name: str, digest: str, target: Path) -> Path:
    """The layer, not compressed, in a file of its own; its digest is checked."""
    member = _member(outer, name)
    source = outer.extractfile(member)
    assert source is not None
    total, size, most = hashlib.sha256(), 0, max(SURE_BYTES, member.size * MOST_RATIO)
    with target.open("wb") as file, _decompressed(source, target) as plain:
        while block := plain.read(1 << 20):
            size += len(block)
            if size > min(most, MOST_BYTES):
                raise HostileArchive(f"the layer {name} unpacks to more than {size} bytes from {member.size}")
            total.update(block)
            file.write(block)
    if f"sha256:{total.hexdigest()}" != digest:
        raise HostileArchive(f"the layer {name} was altered: its digest is not that of the configuration")
    return target


@contextmanager
def _decompressed(source: IO[bytes], target: Path) -> Iterator[IO[bytes]]:
    magic = source.read(6)
    source.seek(0)
    if magic.startswith(_GZIP):
        with gzip.open(source) as plain:
            yield plain  # type: ignore[misc]
    elif magic.startswith(_XZ):
        with lzma.open(source) as plain:
            yield plain
    elif magic.startswith(_ZSTD):
        packed = target.with_suffix(".zst")
        with packed.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        # As a stream, so that a bomb is cut off while it unpacks.
        command = [find_tool("zstd"), "-q", "-d", "-c", "-M128MB", str(packed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.kill()
        packed.unlink()
    else:
        yield source
