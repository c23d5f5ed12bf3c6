"""The guest agent with its own Python and C library: for guests that have none, or an old one, or another C library.

    launch          starts the agent, or takes --install and --uninstall
    start.py, …     our packages and their libraries, compiled
    python/         Debian's Python: bin/, lib/ with the loader, the shared libraries and lib/python3.X

The loader is called by its path and told where its libraries are, so that the directory works wherever it lies, and
nothing of it reaches the tasks.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import stat
import tarfile
from pathlib import Path

from common.errors import ConfigError

from .cache import Cache, digest_of
from .debian import PACKAGES, ROOT_TAR
from .recipe import Recipe
from .rootfs import GUEST, SOURCES, agent_files, agent_key
from .tools import SOURCE_DATE_EPOCH, BuildError, explain_os_error, run

LAUNCH = "launch"
BUSYBOX = "busybox"
INIT = GUEST / "init"
LOADER = "ld-linux-x86-64.so.2"
# Parts of Python's own library that neither agent nor installer need.
_UNUSED = (
    "__pycache__", "config-3", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sqlite3", "test",
    "tkinter", "turtledemo", "unittest", "venv", "wsgiref",
)  # fmt: skip
_LIBRARY = re.compile(r"(?:\./)?(?:usr/)?lib/x86_64-linux-gnu/([^/]+\.so[^/]*)")
_LAUNCH = """\
#!/bin/sh
here=$(cd "${{0%/*}}" && pwd)
p=$here/python
exec "$p/lib/{loader}" --library-path "$p/lib" "$p/bin/python{python}" -I -S "$here/start.py" "$@"
"""


def frozen_layer(
    cache: Cache, recipe: Recipe, debian: Path, wheels: tuple[str, Path], sources: Path = SOURCES
) -> tuple[str, Path]:
    """Key and directory of the agent, with `busybox` beside it."""
    ours = (debian / PACKAGES).read_bytes(), Path(__file__).read_bytes()
    key = digest_of(["frozen", recipe.python, wheels[0], agent_key(sources), *ours])

    def make(place: Path) -> None:
        agent = place / "agent"
        shutil.copytree(wheels[1], agent)
        for name, path in agent_files(sources):
            target = agent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        with tarfile.open(debian / ROOT_TAR) as archive:
            _take_python(archive, agent / "python", recipe.python)
            (place / BUSYBOX).write_bytes(_content(archive, "./usr/bin/busybox", "./bin/busybox"))
            (place / BUSYBOX).chmod(0o755)
        launch = agent / LAUNCH
        launch.write_text(_LAUNCH.format(loader=LOADER, python=recipe.python), "utf-8")
        launch.chmod(0o755)
        _compile(agent, recipe.python)

    return key, cache.layer("frozen", key, make)


def container_files(layer: Path) -> dict[str, tuple[int, bytes]]:
    """What a container's file system gets so that it can be a guest's: mode and content; directories end with "/"."""
    script = INIT.read_bytes().replace(b"#!/bin/busybox sh", b"#!/usr/lib/vmwrapper/busybox sh", 1)
    files = {
        **{f"{name}/": (0o755, b"") for name in ("dev", "proc", "root", "run", "sys")},
        "tmp/": (0o1777, b""),
        "usr/lib/vmwrapper/init": (0o755, script),
        "usr/lib/vmwrapper/busybox": (0o755, (layer / BUSYBOX).read_bytes()),
    }
    agent = layer / "agent"
    for path in sorted(path for path in agent.rglob("*") if path.is_file()):
        mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
        files[f"usr/lib/vmwrapper-guest-agent/{path.relative_to(agent)}"] = (mode, path.read_bytes())
    return files


def write_frozen(output: Path, layer: Path) -> Path:
    """The same as a .tar.gz that unpacks to the directory `vmwrapper-guest-agent`; whole or not at all."""
    new = output.with_name(f".{output.name}.{os.getpid()}.new")
    agent = layer / "agent"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            new.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, SOURCE_DATE_EPOCH) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
        ):
            for path in sorted(agent.rglob("*")):
                name = f"vmwrapper-guest-agent/{path.relative_to(agent)}"
                archive.add(path, name, recursive=False, filter=_plain)
        new.replace(output)
    except OSError as error:
        raise explain_os_error(f"writing the agent to {output}", error) from None
    finally:
        new.unlink(missing_ok=True)
    return output


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = SOURCE_DATE_EPOCH
    return info


def _take_python(archive: tarfile.TarFile, place: Path, python: str) -> None:
    """Python, its own library, and the shared libraries that these name."""
    stdlib = f"usr/lib/python{python}/"
    libraries: dict[str, tarfile.TarInfo] = {}
    contents: list[bytes] = []
    for member in archive:
        name = member.name.removeprefix("./")
        if found := _LIBRARY.fullmatch(member.name):
            libraries[found[1]] = member
        elif name == f"usr/bin/python{python}":
            contents.append(_write(archive, member, place / "bin" / f"python{python}"))
        elif name.startswith(stdlib) and member.isfile():
            rest = name[len(stdlib) :]
            if not any(part.startswith(_UNUSED) for part in Path(rest).parts):
                content = _write(archive, member, place / "lib" / f"python{python}" / rest)
                if name.endswith(".so"):
                    contents.append(content)
    if not contents:
        raise ConfigError(f"the recipe's Debian has no Python {python}", "mend `python` or `packages` in the recipe")
    _take_libraries(archive, libraries, contents, place / "lib")


def _take_libraries(
    archive: tarfile.TarFile, libraries: dict[str, tarfile.TarInfo], contents: list[bytes], place: Path
) -> None:
    """Those whose names stand in `contents`, and those whose names stand in these, and so on; and the loader."""
    taken = {LOADER}
    waiting = [*contents, LOADER.encode() + b"\0"]
    while waiting:
        content = waiting.pop()
        for name, member in libraries.items():
            if name not in taken | {""} and name.encode() + b"\0" in content:
                taken.add(name)
                waiting.append(_write(archive, _real(libraries, member), place / name))
    _write(archive, _real(libraries, libraries[LOADER]), place / LOADER)


def _real(libraries: dict[str, tarfile.TarInfo], member: tarfile.TarInfo) -> tarfile.TarInfo:
    for _ in range(8):
        if not member.issym():
            return member
        member = libraries[Path(member.linkname).name]
    raise BuildError(f"the library {member.name} is a link to itself")


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> bytes:
    source = archive.extractfile(member)
    content = source.read() if source is not None else b""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(stat.S_IMODE(member.mode) | 0o644)
    return content


def _content(archive: tarfile.TarFile, *names: str) -> bytes:
    for name in names:
        try:
            return (archive.extractfile(name) or io.BytesIO()).read()
        except KeyError:
            continue
    raise BuildError("the image has no busybox", "add busybox-static to `packages` in the recipe")


def _compile(agent: Path, python: str) -> None:
    """By the Python that is in it, which also shows that it runs."""
    home = agent / "python"
    run(
        [
            *(home / "lib" / LOADER, "--library-path", home / "lib", home / "bin" / f"python{python}"),
            *("-I", "-S", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"),
            *("-s", agent, "-p", "/usr/lib/vmwrapper-guest-agent", agent),
        ],
        "compiling the guest agent",
    )
