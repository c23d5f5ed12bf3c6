"""The guest agent as one file: a zip archive that Python runs, with everything inside but Python itself.

    __main__.py     chooses
    cp311/…         byte code for one version of Python, used without a look at its source; one such tree for each
    lib/…           the sources: for every other version, and for `--install`, which compiles them in its guest

Parts in C are left out: they are for one version of Python and one kind of machine.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError

from .cache import Cache
from .rootfs import SOURCES, agent_files
from .tools import SOURCE_DATE_EPOCH, BuildError, explain_os_error, remove_after, run
from .wheels import wheels_layer

MAIN = Path(__file__).parent / "guest" / "agent_main.py"
PYTHONS = {"3.10": "3.10 and newer", "3.9": "3.9"}  # what a file runs on, by the version that its libraries are for
ARCHITECTURE = "x86_64"  # of the wheels, whose parts in C are left out
_DATE = (2023, 11, 14, 22, 13, 20)  # SOURCE_DATE_EPOCH
_TAG = "import sys; print('cp%d%d' % sys.version_info[:2])"
_COMPILE = """
import compileall, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
sys.exit(not compileall.compile_dir(sys.argv[1], quiet=1, legacy=True, optimize=int(sys.argv[2]),
    invalidation_mode=mode, stripdir=sys.argv[1], prependdir="agent"))
"""


def make_agent_file(
    output: Path, cache: Cache, *, python: str = "3.10", compilers: Sequence[str] = (), sources: Path = SOURCES
) -> Path:
    """Write the file; it appears whole or not at all, and is the same each time.

    `python` is the oldest version that it is for (a key of PYTHONS). `compilers` are programs of the versions that get
    byte code: this one by default, where it can run the file.
    """
    if python not in PYTHONS:
        raise ConfigError(f"there is no agent for Python {python}", f"there is one for each of {', '.join(PYTHONS)}")
    if not compilers:
        compilers = [sys.executable] if python != "3.9" else []
    _, wheels = wheels_layer(cache, python, ARCHITECTURE)
    work = output.with_name(f".{output.name}.{os.getpid()}.work")
    new = output.with_name(f".{output.name}.{os.getpid()}.new")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with remove_after(work):
            lib = work / "lib"
            collect(lib, wheels, sources)
            for compiler in compilers:
                _compile(compiler, lib, work)
            main = MAIN.read_text("utf-8").replace("@PYTHON@", python)
            (work / "__main__.py").write_text(main, "utf-8")
            _zip(work, new)
        new.replace(output)
    except OSError as error:
        raise explain_os_error(f"writing the agent to {output}", error) from None
    finally:
        new.unlink(missing_ok=True)
    return output


def collect(place: Path, wheels: Path, sources: Path) -> None:
    """Our packages and their libraries, without parts in C: these are for one version of Python and one machine."""
    shutil.copytree(wheels, place, ignore=shutil.ignore_patterns("*.so"))
    (place / "zope" / "__init__.py").touch()  # a namespace package, which an archive cannot have
    for name, path in agent_files(sources):
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _compile(compiler: str, lib: Path, work: Path) -> None:
    try:
        tag = run([compiler, "-I", "-S", "-c", _TAG], f"asking {compiler} for its version").decode().strip()
    except BuildError as error:
        raise BuildError(f"no byte code for {compiler}: {error}", "name a Python that is here") from None
    tree = work / tag
    if tree.exists():
        return
    shutil.copytree(lib, tree)
    for part in sorted(tree.iterdir()):
        # Of the libraries without texts that nobody reads here, which halves them.
        optimize = "0" if part.name in ("common", "guest_agent") else "2"
        if part.is_dir():
            run([compiler, "-I", "-S", "-c", _COMPILE, part, optimize], "compiling the guest agent")
    run([compiler, "-I", "-S", "-c", _COMPILE, tree, "2"], "compiling the guest agent")
    for path in tree.rglob("*.py"):
        path.unlink()


def _zip(work: Path, target: Path) -> None:
    with target.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(path for path in work.rglob("*") if path.is_file()):
                info = zipfile.ZipInfo(path.relative_to(work).as_posix(), _DATE)
                info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, path.read_bytes())
    target.chmod(0o755)
    os.utime(target, (SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH))
