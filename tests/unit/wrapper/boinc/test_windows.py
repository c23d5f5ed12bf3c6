"""The Windows paths with Windows' calls played by this test."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest

from host_agent.wrapper.boinc import windows


class WindowsError_(OSError):
    def __init__(self, number: int) -> None:
        super().__init__(number, "Windows says no")
        self.winerror = number


class Api:
    """`_winapi` of a Windows where some names are taken."""

    FILE_MAP_READ, FILE_MAP_WRITE, GENERIC_WRITE, NULL = 4, 2, 0x40000000, 0

    def __init__(self) -> None:
        self.mappings: set[str] = set()
        self.processes = {1: 259, 2: 0}  # number to exit code
        self.shut: set[str] = set()
        self.open: set[int] = set()

    def _handle(self) -> int:
        self.open.add(number := len(self.open) + 1)
        return number

    def OpenFileMapping(self, access: int, inherit: bool, name: str) -> int:
        assert access == 6
        assert not inherit
        if name not in self.mappings:
            raise WindowsError_(2)
        return self._handle()

    def CreateFile(self, name: str, access: int, share: int, *_rest: int) -> int:
        assert (access, share) == (self.GENERIC_WRITE, 0)
        if name in self.shut:
            raise WindowsError_(32)
        if "missing" in name:
            raise WindowsError_(3)
        self.shut.add(name)
        return self._handle()

    def OpenProcess(self, access: int, inherit: bool, pid: int) -> int:
        assert access == 0x1000
        assert not inherit
        if pid not in self.processes:
            raise WindowsError_(5 if pid == 3 else 87)
        return self._handle() + 100 * pid

    def GetExitCodeProcess(self, handle: int) -> int:
        return self.processes[handle // 100]

    def CloseHandle(self, handle: int) -> None:
        self.open.discard(handle % 100)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setitem(sys.modules, "_winapi", made)
    return made


@pytest.mark.parametrize("tag", ["Global\\shm_x", "shm_x"])
def test_the_mapping_of_either_name(tag: str, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(mmap, "mmap", lambda *words, **names: opened.append((*words, names)))
    api.mappings = {tag}
    windows.open_mapping("shm_x", 8192)
    assert opened == [(-1, 8192, {"tagname": tag})]
    assert not api.open


def test_a_missing_mapping_is_not_made(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", None)
    with pytest.raises(OSError, match="there is no shared memory shm_x"):
        windows.open_mapping("shm_x", 8192)


def test_a_file_for_one(api: Api) -> None:
    handle = windows.open_alone(Path("lock"))
    assert handle is not None
    assert windows.open_alone(Path("lock")) is None
    windows.close(handle)
    assert not api.open
    with pytest.raises(OSError, match="says no"):
        windows.open_alone(Path("missing/lock"))


def test_processes(api: Api) -> None:
    assert [windows.process_exists(pid) for pid in (1, 2, 3, 4)] == [True, False, True, False]
    assert not api.open
