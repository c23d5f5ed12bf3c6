"""Layers kept by content: `CACHE/KIND/KEY/`, made once and never changed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from common.errors import ConfigError

from .tools import explain_os_error, remove_tree

FRESH = 3600.0  # seconds; no build takes longer


def default_cache() -> Path:
    """`VMWRAPPER_CACHE`, or this platform's place for files that can be made again."""
    if chosen := os.environ.get("VMWRAPPER_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "vmwrapper" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vmwrapper"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmwrapper"


def digest_of(parts: Iterable[bytes | str]) -> str:
    """Hex SHA-256 of a list of parts, each with its length, so that no two lists look alike."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(b"%d:" % len(data) + data)
    return total.hexdigest()


def _is_still(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


@attrs.frozen
class Cache:
    """A directory of layers. Two builders of one layer wait for each other rather than do the work twice."""

    root: Path
    keep: int = 3  # layers of each kind that stay, the last used ones
    most: int = 12  # that stay while they have been used within FRESH: another builder may be reading them

    def layer(self, kind: str, key: str, make: Callable[[Path], None], *, refresh: bool = False) -> Path:
        """The directory of layer `key`; `make` fills it when it is not there yet."""
        place = self.root / kind / key[:40]
        with self._locked(kind, f".lock-{key[:40]}"):
            if refresh:
                remove_tree(place)
            if place.is_dir():
                os.utime(place)
                return place
            work = place.with_name(f".making-{key[:40]}")
            try:
                remove_tree(work)
                work.mkdir(parents=True)
                make(work)
                work.rename(place)
            except OSError as error:
                raise explain_os_error(f"making the image's {kind}", error) from None
            finally:
                remove_tree(work)
        with self._locked(kind, ".lock"):
            self._prune(place)
        return place

    @contextmanager
    def _locked(self, kind: str, name: str) -> Iterator[None]:
        """One lock for each layer, so that only those wait for each other who want the same one."""
        path = self.root / kind / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if _is_still(lock, path):
                    break
                os.close(lock)  # the file went with an old layer while we waited
        except OSError as error:
            raise ConfigError(
                f"the cache directory {self.root} cannot be used ({error.strerror})",
                "choose another one with --cache or VMWRAPPER_CACHE",
            ) from None
        try:
            yield
        finally:
            os.close(lock)

    def _prune(self, newest: Path) -> None:
        layers = [p for p in newest.parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
        layers.sort(key=lambda p: p.stat().st_mtime, reverse=True)
        fresh = time.time() - FRESH
        for number, old in enumerate(layers[self.keep :], self.keep):
            if old != newest and (number >= self.most or old.stat().st_mtime < fresh):
                remove_tree(old)
                old.with_name(f".lock-{old.name}").unlink(missing_ok=True)
