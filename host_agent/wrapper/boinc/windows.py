"""What the runtime asks of Windows: a named mapping, a file that nobody else may open, whether a process is there.

The calls are those of Python's own `_winapi`, the module under `multiprocessing.shared_memory`; handles are numbers.
"""

from __future__ import annotations

import importlib
import mmap
from pathlib import Path
from typing import Any

_PROCESS_QUERY_LIMITED_INFORMATION = 0x1000
_OPEN_ALWAYS = 4
_ERROR_ACCESS_DENIED = 5
_ERROR_SHARING_VIOLATION = 32
_STILL_ACTIVE = 259


def _winapi() -> Any:
    return importlib.import_module("_winapi")


def open_mapping(name: str, size: int) -> mmap.mmap:
    """The existing mapping of that name, of all sessions or of ours. Raises OSError.

    Python's mmap makes a mapping that is not there, so it is looked for first.
    """
    api = _winapi()
    mapping: Any = mmap.mmap
    for tag in (f"Global\\{name}", name):
        try:
            handle = api.OpenFileMapping(api.FILE_MAP_READ | api.FILE_MAP_WRITE, False, tag)
        except OSError:
            continue
        try:
            return mapping(-1, size, tagname=tag)  # type: ignore[no-any-return]
        finally:
            api.CloseHandle(handle)
    raise OSError(f"there is no shared memory {name}")


def open_alone(path: Path) -> int | None:
    """A handle of a file, made if need be, that nobody else can open; None when somebody has it. Raises OSError."""
    api = _winapi()
    try:
        return int(api.CreateFile(str(path), api.GENERIC_WRITE, 0, api.NULL, _OPEN_ALWAYS, 0, api.NULL))
    except OSError as error:
        if getattr(error, "winerror", 0) == _ERROR_SHARING_VIOLATION:
            return None
        raise


def close(handle: int) -> None:
    """Give a handle back."""
    _winapi().CloseHandle(handle)


def process_exists(pid: int) -> bool:
    """Whether there is such a process, of whatever user."""
    api = _winapi()
    try:
        handle = api.OpenProcess(_PROCESS_QUERY_LIMITED_INFORMATION, False, pid)
    except OSError as error:
        return bool(getattr(error, "winerror", 0) == _ERROR_ACCESS_DENIED)
    try:
        return bool(api.GetExitCodeProcess(handle) == _STILL_ACTIVE)
    finally:
        api.CloseHandle(handle)
