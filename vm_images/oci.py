"""A container's file system from an OCI archive or a `docker save` file, as one tar archive; hostile ones are refused.

The layers are merged by name, never unpacked on this host: later ones hide what earlier ones have (whiteouts), paths
are followed through links inside of the tree alone, and what leaves it, devices, and sizes beyond all limits are
errors. Extended attributes are left out.
"""

from __future__ import annotations

import io
import json
import lzma
import shlex
import tarfile
import zlib
from pathlib import Path
from typing import Any

import attrs

from .oci_archive import MOST_BYTES, MOST_JSON, MOST_LINKS, BoundedInfo, HostileArchive, open_image, unpack_layer
from .tools import SOURCE_DATE_EPOCH, BuildError

MOST_ENTRIES = 500_000
MOST_DEPTH = 200  # directories in one another
MOST_NAME = 4096
PROGRAMS = "usr/lib/vmwrapper/bin"
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"


@attrs.frozen
class Container:
    """What a container's configuration says of its programs."""

    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    directory: str  # absolute
    user: int
    group: int

    def extra(self) -> dict[str, tuple[int, bytes]]:
        """What the guest has of it: the defaults of tasks, and a program that is the entry point."""
        path = self.environment.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        tasks = {
            "user": self.user,
            "group": self.group,
            "home": self.directory,
            "environment": {**self.environment, "PATH": f"{path}:/{PROGRAMS}"},
        }
        default = f"[ $# -gt 0 ] || set -- {shlex.join(self.command)}\n" if self.command else ""
        script = f'#!/usr/lib/vmwrapper/busybox sh\n{default}exec {shlex.join(self.entrypoint)} "$@"\n'
        return {
            "usr/lib/vmwrapper/tasks.json": (0o644, json.dumps(tasks, indent=2).encode("utf-8")),
            f"{PROGRAMS}/entrypoint": (0o755, script.encode("utf-8")),
        }


@attrs.define
class _Node:
    """A file of the merged tree: its description, and where its content is."""

    info: tarfile.TarInfo
    layer: int = -1
    children: dict[str, _Node] = attrs.field(factory=dict)

    @property
    def is_dir(self) -> bool:
        return self.info.isdir()


def merge_container(archive: Path, target: Path, ours: dict[str, tuple[int, bytes]], work: Path) -> Container:
    """Write the merged tree to the tar archive `target`, with `ours` on top: modes and contents by name."""
    try:
        with tarfile.open(archive, "r:*", tarinfo=BoundedInfo) as outer:
            config, layers = open_image(outer)
            paths = []
            for number, (name, digest) in enumerate(layers):
                paths.append(unpack_layer(outer, name, digest, work / f"layer-{number}"))
        root = _merge(paths)
        container = _describe(config, root, paths)
        extra = {**ours, **container.extra()}
        for name, (mode, content) in extra.items():
            _add_extra(root, name, mode, content)
        workplace = _walk(root, _parts(container.directory.lstrip("/")), "the working directory")
        if not workplace.children:
            workplace.info.uid, workplace.info.gid = container.user, container.group
        _write(root, paths, target, {name: content for name, (_, content) in extra.items()})
    except (tarfile.TarError, KeyError, ValueError, TypeError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise BuildError(
            f"{archive} is no OCI archive and no `docker save` file that can be read ({error!r})"
        ) from None
    except OSError as error:
        raise BuildError(f"{archive} cannot be read: {error.strerror or error}") from None
    return container


# -- merging


def _merge(paths: list[Path]) -> _Node:
    root = _Node(_directory(""))
    entries = size = 0
    for number, path in enumerate(paths):
        fresh: set[int] = set()  # what this layer itself has put there, which its whiteouts do not hide
        with tarfile.open(path, "r:", tarinfo=BoundedInfo) as layer:
            for info in layer:
                entries += 1
                size += info.size
                if entries > MOST_ENTRIES or size > MOST_BYTES:
                    raise HostileArchive(f"it has more than {entries - 1} files or {size} bytes")
                _apply(root, info, number, fresh)
    return root


def _apply(root: _Node, info: tarfile.TarInfo, layer: int, fresh: set[int]) -> None:
    parts = _parts(info.name)
    if not parts:
        if info.isdir():
            root.info = info
        return
    *above, name = parts
    parent = _walk(root, above, info.name)
    if name == OPAQUE:
        parent.children = {key: each for key, each in parent.children.items() if id(each) in fresh}
        return
    if name.startswith(WHITEOUT):
        parent.children.pop(name[len(WHITEOUT) :], None)
        return
    if (
        info.ischr()
        or info.isblk()
        or info.isfifo()
        or not (info.isreg() or info.isdir() or info.issym() or info.islnk())
    ):
        if info.isfifo():
            raise HostileArchive(f"{info.name[:200]!r} is a pipe")
        raise HostileArchive(f"{info.name[:200]!r} is a device")
    before = parent.children.get(name)
    if info.islnk():
        found = _find(root, _parts(info.linkname), info.name)
        if found is None or found.is_dir:
            raise HostileArchive(f"{info.name[:200]!r} is a hard link to {info.linkname[:200]!r}, which is no file")
        node = found
    elif info.isdir() and before is not None and before.is_dir:
        before.info = info
        node = before
    else:
        node = _Node(info, layer)
    parent.children[name] = node
    fresh.add(id(node))


def _parts(name: str) -> list[str]:
    """A path's parts; HostileArchive for one that leaves the tree."""
    if len(name) > MOST_NAME or "\0" in name:
        raise HostileArchive(f"{name[:80]!r} is no file name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise HostileArchive(f"the path {name[:200]!r} leads out of the container")
    return parts


def _directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, SOURCE_DATE_EPOCH
    return info


def _walk(root: _Node, parts: list[str], whose: str, *, make: bool = True) -> _Node:
    """The directory at a path, followed through links; made where it is missing."""
    links, waiting, place = 0, list(parts), [root]
    while waiting:
        part = waiting.pop(0)
        if part == "..":
            place = place[:-1] or [root]
            continue
        child = place[-1].children.get(part)
        if child is None:
            if not make:
                raise HostileArchive(f"{whose[:200]!r} lies in a directory that is not there")
            child = place[-1].children[part] = _Node(_directory(part))
        if child.info.issym():
            links += 1
            if links > MOST_LINKS:
                raise HostileArchive(f"{whose[:200]!r} lies behind more than {MOST_LINKS} links")
            to = child.info.linkname
            waiting = [each for each in to.split("/") if each not in ("", ".")] + waiting
            place = [root] if to.startswith("/") else place
        elif child.is_dir and len(place) < MOST_DEPTH:
            place.append(child)
        else:
            raise HostileArchive(f"{whose[:200]!r} lies in {part[:80]!r}, which is no directory or too deep")
    return place[-1]


def _find(root: _Node, parts: list[str], whose: str) -> _Node | None:
    if not parts:
        return root
    return _walk(root, parts[:-1], whose, make=False).children.get(parts[-1])


def _add_extra(root: _Node, name: str, mode: int, content: bytes) -> None:
    """A file of ours, or a directory when its name ends with a slash."""
    parts = _parts(name)
    if name.endswith("/"):
        _walk(root, parts, name).info.mode = mode
        return
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), mode, SOURCE_DATE_EPOCH
    _walk(root, parts[:-1], name).children[parts[-1]] = _Node(info, -2)


# -- writing


def _write(root: _Node, paths: list[Path], target: Path, extra: dict[str, bytes]) -> None:
    layers = [tarfile.open(path, "r:") for path in paths]  # noqa: SIM115  (closed below)
    written: dict[int, str] = {}
    try:
        with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as out:

            def put(node: _Node, name: str) -> None:
                info = tarfile.TarInfo(f"./{name}")
                info.type, info.mode, info.linkname = node.info.type, node.info.mode & 0o7777, node.info.linkname
                info.uid, info.gid, info.mtime = node.info.uid, node.info.gid, int(node.info.mtime)
                if node.info.isreg() and id(node) in written:
                    info.type, info.linkname = tarfile.LNKTYPE, written[id(node)]
                    out.addfile(info)
                elif node.info.isreg():
                    written[id(node)] = info.name
                    info.size = node.info.size
                    source = (
                        io.BytesIO(extra[node.info.name])
                        if node.layer == -2
                        else layers[node.layer].extractfile(node.info)
                    )
                    out.addfile(info, source)
                else:
                    out.addfile(info)
                for child in sorted(node.children):
                    put(node.children[child], f"{name}/{child}" if name else child)

            put(root, "")
    finally:
        for layer in layers:
            layer.close()


def _describe(config: dict[str, Any], root: _Node, paths: list[Path]) -> Container:
    own = config.get("config") or {}
    user, group = _who(str(own.get("User") or ""), root, paths)
    return Container(
        entrypoint=tuple(str(each) for each in own.get("Entrypoint") or ()),
        command=tuple(str(each) for each in own.get("Cmd") or ()),
        environment={key: value for key, _, value in (str(each).partition("=") for each in own.get("Env") or [])},
        directory="/" + "/".join(_parts(str(own.get("WorkingDir") or "/").lstrip("/"))),
        user=user,
        group=group,
    )


def _who(text: str, root: _Node, paths: list[Path]) -> tuple[int, int]:
    """Numbers of the user and group that a configuration names, by the container's own lists; root when it does not."""
    name, _, group_name = text.partition(":")
    user = group = 0
    for line in _text(root, paths, "etc/passwd"):
        fields = line.split(":")
        if len(fields) > 3 and name in (fields[0], fields[2]):
            user, group = int(fields[2]), int(fields[3])
            break
    else:
        if name:
            if not name.isdigit():
                raise BuildError(f"the container is to run as {name[:80]!r}, whom its etc/passwd does not have")
            user = int(name)
    if group_name:
        numbers = [line.split(":")[2] for line in _text(root, paths, "etc/group") if line.split(":")[0] == group_name]
        group = int(numbers[0] if numbers else group_name)
    return user, group


def _text(root: _Node, paths: list[Path], name: str) -> list[str]:
    try:
        node = _find(root, _parts(name), name)
    except HostileArchive:
        return []
    if node is None or not node.info.isreg() or node.info.size > MOST_JSON:
        return []
    with tarfile.open(paths[node.layer], "r:") as layer:
        source = layer.extractfile(node.info)
        return source.read().decode("utf-8", "replace").splitlines() if source is not None else []
