"""An image as one file to be sent: compressed, or as the difference from an image that the receiver has.

A tar archive: `image.json` as it is, `package.json`, and each file of the image packed by zstd, as a patch where the
base has a file of that name, or not at all where it is the same. What comes out is the same bytes, whatever version of
QEMU or zstd made it, and is compared with the manifest before it gets the image's name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from host_agent.hypervisors.images import MANIFEST, Image, find_image, list_images, load_image, verify_image

from .tools import SOURCE_DATE_EPOCH, explain_os_error, find_tool, remove_after, remove_tree, run

PACKAGE = "package.json"
FORMAT = 1
LEVEL = "-19"
WINDOW = "--long=28"  # 256 MiB: a patch has to see all of a disk
MOST_WORDS = 4 << 20  # bytes of a description
_ADVICE = "fetch the package again"


def pack_image(image: Image, output: Path, base: Image | None = None) -> Path:
    """Write the package; whole or not at all."""
    verify_image(image)
    theirs = _manifest(base)["files"] if base is not None else {}
    manifest = _manifest(image)
    new = output.with_name(f".{output.name}.{os.getpid()}.new")
    work = output.with_name(f".{output.name}.{os.getpid()}.work")
    parts: dict[str, str] = {}
    try:
        with remove_after(work), tarfile.open(new, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, described in manifest["files"].items():
                if base is not None and theirs.get(name, {}).get("sha256") == described["sha256"]:
                    parts[name] = "same"
                    continue
                patch = base is not None and name in theirs
                parts[name] = "patch" if patch else "whole"
                against = [f"--patch-from={base.directory / name}"] if patch and base is not None else []
                source, packed = image.directory / name, work / name
                run(["zstd", "-q", LEVEL, WINDOW, *against, source, "-o", packed], f"packing {name}")
            words = {"format": FORMAT, "base": base.digest if base is not None else "", "parts": parts}
            for name, content in (
                (PACKAGE, json.dumps(words).encode()),
                (MANIFEST, (image.directory / MANIFEST).read_bytes()),
            ):
                archive.addfile(_member(name, len(content)), io.BytesIO(content))
            for name in (each for each, how in parts.items() if how != "same"):
                with (work / name).open("rb") as file:
                    archive.addfile(_member(name, (work / name).stat().st_size), file)
        new.replace(output)
    except OSError as error:
        raise explain_os_error(f"writing the package to {output}", error) from None
    finally:
        new.unlink(missing_ok=True)
    return output


def install_package(package: Path, store: Path, name: str = "") -> Image:
    """Unpack into the store, under the image's own name or another; an image of that name is replaced as a whole."""
    try:
        with tarfile.open(package, "r:") as archive:
            words, manifest = json.loads(_read(archive, PACKAGE)), _read(archive, MANIFEST)
            described = json.loads(manifest)
            if words["format"] != FORMAT:
                raise ConfigError(f"{package} is of format {words['format']!r}, and {FORMAT} is known here")
            name = name or str(described["name"])
            for each in (name, *described["files"]):
                if Path(each).name != each or each.startswith(".") or each == MANIFEST:
                    raise ConfigError(f"{package} cannot be used: {each!r} is no plain file name", _ADVICE)
            base = _base(store, words["base"]) if words["base"] else None
            store.mkdir(parents=True, exist_ok=True)
            work, old = store / f".{name}.{os.getpid()}.new", store / f".{name}.{os.getpid()}.old"
            try:
                work.mkdir()
                for part, expected in described["files"].items():
                    _unpack(archive, part, words["parts"][part], base, work / part, int(expected["bytes"]))
                (work / MANIFEST).write_bytes(manifest)
                verify_image(load_image(work))
                if (store / name).exists():
                    (store / name).rename(old)
                work.rename(store / name)
            finally:
                remove_tree(work)
                remove_tree(old)
    except (tarfile.TarError, KeyError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise ConfigError(f"{package} is no package of an image, or was altered ({error!r})", _ADVICE) from None
    except OSError as error:
        raise explain_os_error(f"installing {package}", error) from None
    return load_image(store / name)


def _manifest(image: Image) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((image.directory / MANIFEST).read_text("utf-8"))
    return value


def _base(store: Path, digest: str) -> Image:
    for image in list_images(store):
        if image.digest == digest:
            verify_image(image)
            return find_image(image.directory.name, store)
    advice = "install that image first, or fetch the whole one"
    raise ConfigError(f"this package is a difference from the image {digest[:12]}, which is not in {store}", advice)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.getmember(name)
    source = archive.extractfile(member)
    if source is None or member.size > MOST_WORDS:
        raise ValueError(f"{name} is no description")
    return source.read()


def _unpack(archive: tarfile.TarFile, name: str, how: str, base: Image | None, target: Path, size: int) -> None:
    """One file; no more of it is written than it is to have."""
    if how == "same" and base is not None:
        try:
            target.hardlink_to(base.directory / name)
        except OSError:
            target.write_bytes((base.directory / name).read_bytes())
        return
    packed = target.with_name(f"{name}.zst")
    source = archive.extractfile(name)
    if source is None:
        raise ValueError(f"{name} is no file")
    with packed.open("wb") as file:
        while block := source.read(1 << 20):
            file.write(block)
    against = [f"--patch-from={base.directory / name}"] if how == "patch" and base is not None else []
    command = [find_tool("zstd"), "-q", "-d", "-c", WINDOW, *against, str(packed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        with target.open("wb") as file:
            written = 0
            while written <= size and (block := process.stdout.read(1 << 20)):
                file.write(block)
                written += len(block)
        process.kill() if written > size else None
    packed.unlink()
    target.chmod(0o444)


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, SOURCE_DATE_EPOCH
    return info


def digest_of_package(package: Path) -> str:
    """What to compare with what the sender says."""
    with package.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
