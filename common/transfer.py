"""What a copy is made of: a manifest, one stream of bytes, and a digest over both.

A copy carries one file or one directory tree. The sender describes it in a *manifest* (paths, sizes, the executable
bit, links), then sends the contents of all its files one after another, in the manifest's order, and last the
digest (`checksum.py`) of the manifest and of these bytes. The receiver writes to a temporary place beside the
destination and renames only when the digest is right; after a break it goes on at the byte where it stopped.
A tree of many small files therefore costs one stream, and nobody ever sees half a file under its final name.

The two ends talk HTTP (`docs/protocol.md`), but nothing here knows of it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from .checksum import DIGITS, SHA256, Checksum
from .direct_io import DIRECT, in_page_cache, past_the_page_cache, whole_pages
from .errors import TransferError

MAX_ENTRIES = 100_000
MAX_MANIFEST = 32 * 1024 * 1024  # bytes
MAX_DEPTH = 64
MAX_PATH = 4096
CHUNK = 256 * 1024
SYNC_FILES = 64  # up to so many files are flushed to the disk one by one


@attrs.frozen
class Entry:
    """One thing in a tree. `path` is relative, with "/"; it is "" for a copy of a single file."""

    path: str
    kind: str  # "file", "dir", "link"
    size: int = 0  # bytes, of a file
    executable: bool = False
    target: str = ""  # of a link: relative, inside the tree


@attrs.frozen
class Manifest:
    """What a copy contains, in the order of its bytes; directories stand before what they hold."""

    directory: bool
    entries: tuple[Entry, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    @property
    def files(self) -> int:
        return sum(1 for entry in self.entries if entry.kind == "file")

    def to_json(self) -> bytes:
        rows = [[e.path, e.kind, e.size, int(e.executable), e.target] for e in self.entries]
        return json.dumps({"directory": self.directory, "entries": rows}, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest that came over the network; TransferError when it is not acceptable."""
        if len(data) > MAX_MANIFEST:
            raise TransferError(f"the list of files is larger than {MAX_MANIFEST} bytes")
        try:
            value = json.loads(data)
            directory, rows = value["directory"], value["entries"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise TransferError("the list of files cannot be read") from None
        if not isinstance(directory, bool) or not isinstance(rows, list) or len(rows) > MAX_ENTRIES:
            raise TransferError(f"the list of files is not one, or has more than {MAX_ENTRIES} entries")
        manifest = cls(directory, tuple(_checked_entry(row) for row in rows))
        _check_tree(manifest)
        return manifest


def _checked_entry(row: Any) -> Entry:
    if not isinstance(row, list) or len(row) != 5:
        raise TransferError("an entry in the list of files has the wrong shape")
    path, kind, size, executable, target = row
    if not isinstance(path, str) or not isinstance(target, str) or kind not in ("file", "dir", "link"):
        raise TransferError("an entry in the list of files has the wrong types")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**62 or (kind != "file" and size):
        raise TransferError(f"{path[:80]!r} has an impossible size")
    return Entry(path, kind, size, bool(executable), target)


def _check_tree(manifest: Manifest) -> None:
    if not manifest.directory:
        if len(manifest.entries) != 1 or manifest.entries[0].path or manifest.entries[0].kind != "file":
            raise TransferError("the copy of a file must list that file alone")
        return
    kinds: dict[str, str] = {}
    for entry in manifest.entries:
        _check_path(entry.path)
        parent = entry.path.rpartition("/")[0]
        if entry.path in kinds:
            raise TransferError(f"{entry.path!r} is listed twice")
        if parent and kinds.get(parent) != "dir":
            raise TransferError(f"{entry.path!r} is not inside a listed directory")
        kinds[entry.path] = entry.kind
        if entry.kind == "link":
            _check_link(entry)


def _check_path(path: str) -> None:
    parts = path.split("/")
    if (
        not 0 < len(path) <= MAX_PATH
        or len(parts) > MAX_DEPTH
        or any(part in ("", ".", "..") for part in parts)
        or any(character in path for character in "\0\\")
    ):
        raise TransferError(f"{path[:80]!r} is not an acceptable path in a copy")


def _check_link(entry: Entry) -> None:
    depth = entry.path.count("/")
    if not entry.target or len(entry.target) > MAX_PATH or entry.target.startswith("/") or "\0" in entry.target:
        raise TransferError(f"the link {entry.path!r} does not stay inside the copy")
    for part in entry.target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            raise TransferError(f"the link {entry.path!r} does not stay inside the copy")


def scan(path: Path) -> Manifest:
    """Describe a file or a directory on this disk. Devices, sockets and links that lead outside are refused."""
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return Manifest(False, (Entry("", "file", found.st_size, bool(found.st_mode & 0o111)),))
        if not stat.S_ISDIR(found.st_mode):
            raise TransferError(f"{path} is neither a file nor a directory")
        manifest = Manifest(True, tuple(_walk(path, "")))
    except OSError as error:
        raise TransferError(f"{path} cannot be read: {error.strerror}") from None
    if len(manifest.entries) > MAX_ENTRIES:
        raise TransferError(f"{path} holds more than {MAX_ENTRIES} files")
    _check_tree(manifest)
    return manifest


def _walk(directory: Path, prefix: str) -> Iterator[Entry]:
    for item in sorted(os.scandir(directory), key=lambda found: found.name):
        name = prefix + item.name
        if item.is_symlink():
            yield Entry(name, "link", target=str(Path(item.path).readlink()))
        elif item.is_dir():
            yield Entry(name, "dir")
            yield from _walk(Path(item.path), name + "/")
        elif item.is_file():
            found = item.stat()
            yield Entry(name, "file", found.st_size, bool(found.st_mode & 0o111))
        else:
            raise TransferError(f"{item.path} is neither a file, a directory nor a link")


class Source:
    """The sending end: the stream of a manifest's bytes, from any offset, and its digest at the end.

    With `direct`, `read_into` reads past the page cache what is not in it, where the system can do that.
    """

    def __init__(
        self, root: Path, manifest: Manifest, ways: tuple[str, ...] = (SHA256,), *, direct: bool = False
    ) -> None:
        self.manifest = manifest
        self._root = str(root)
        self._length = manifest.total
        self._files = iter([entry for entry in manifest.entries if entry.kind == "file"])
        self._checksum = Checksum(ways, manifest.to_json())
        self._open: io.FileIO | None = None
        self._left = 0  # bytes of the open file
        self._direct = DIRECT if direct else 0
        self.offset = 0

    @property
    def length(self) -> int:
        """Bytes of the stream with the digests after it."""
        return self._length + sum(DIGITS[way] for way in self.ways)

    @property
    def ways(self) -> tuple[str, ...]:
        """Of its checksum."""
        return self._checksum.ways

    def skip_to(self, offset: int) -> None:
        """Go on at `offset`. What lies before is read again, because the digest needs it."""
        if not self.offset <= offset <= self._length:
            raise TransferError(f"there is no byte {offset} to go on from")
        while self.offset < offset:
            self.read(min(CHUNK, offset - self.offset))

    def read(self, most: int = CHUNK) -> bytes:
        """The next bytes of the files, b"" at the end."""
        if not self._next_file():
            return b""
        assert self._open is not None
        data = self._open.read(min(most, self._left))
        self._take(data or b"")
        return data or b""

    def read_into(self, view: memoryview) -> int:
        """Fill `view` with the next bytes, as far as there are any; how many."""
        filled = 0
        while filled < len(view) and self._next_file():
            assert self._open is not None
            count = self._read_into(self._open, view[filled : filled + self._left])
            self._take(view[filled : filled + count])
            filled += count
        return filled

    def _read_into(self, file: io.FileIO, view: memoryview) -> int:
        whole = whole_pages(file, view) if self._direct else 0
        if whole and not in_page_cache(file):
            try:
                with past_the_page_cache(file):
                    return file.readinto(view[:whole]) or 0
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = 0  # not on this file system, or not into memory that lies like this
        return file.readinto(view) or 0

    def _next_file(self) -> bool:
        """Open the file with the next byte, if that is not done; False at the end."""
        while self._left == 0:
            self.close()
            entry = next(self._files, None)
            if entry is None:
                return False
            self._open = io.FileIO(f"{self._root}/{entry.path}" if entry.path else self._root)
            self._left = entry.size
        return True

    def _take(self, data: bytes | memoryview) -> None:
        if not data:
            assert self._open is not None
            raise TransferError(f"{self._open.name} became shorter while it was copied")
        self._left -= len(data)
        self.offset += len(data)
        self._checksum.update(data)

    def digest(self) -> str:
        """Of the manifest and of all bytes read so far: what the other end has to find (hex)."""
        return self._checksum.compared()

    def digests(self) -> str:
        """The same by every way."""
        return self._checksum.all()

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class Sink:
    """The receiving end: writes the stream beside `destination` and puts it there when the digest is right.

    `copy_id` names the temporary place, so that a later Sink for the same copy finds what is there already:
    `offset` is where the sender has to go on. With `direct`, pieces that are whole pages go past the page cache
    where the system can do that: an emulated processor writes so ten times as fast.
    """

    def __init__(
        self,
        destination: Path,
        manifest: Manifest,
        copy_id: str,
        ways: tuple[str, ...] = (SHA256,),
        *,
        direct: bool = False,
    ) -> None:
        self.manifest = manifest
        self._destination = destination
        self._part = _part(destination, copy_id)
        self._place_of_files = str(self._part)
        self._checksum = Checksum(ways, manifest.to_json())
        self._files = iter([entry for entry in manifest.entries if entry.kind == "file"])
        self._open: io.FileIO | None = None
        self._left = 0
        self._direct = DIRECT if direct else 0
        self.offset = 0
        self.total = manifest.total
        try:
            self._prepare()
        except OSError as error:
            raise TransferError(f"{destination} cannot be written: {error.strerror}") from None

    def _prepare(self) -> None:
        self._destination.parent.mkdir(parents=True, exist_ok=True)
        if self._destination.is_dir() and not self.manifest.directory:
            raise TransferError(f"{self._destination} is a directory, but a file was to be copied there")
        if self._destination.is_file() and self.manifest.directory:
            raise TransferError(f"{self._destination} is a file, but a directory was to be copied there")
        if self.manifest.directory:
            self._part.mkdir(exist_ok=True)
            for entry in self.manifest.entries:
                if entry.kind == "dir":
                    (self._part / entry.path).mkdir(exist_ok=True)
        self._take_over_earlier_part()

    def _take_over_earlier_part(self) -> None:
        while self._next_file():
            assert self._open is not None
            while self._left:
                data = self._open.read(min(CHUNK, self._left))
                if not data:
                    return
                self._checksum.update(data)
                self._left -= len(data)
                self.offset += len(data)
            if self._open.read(1):
                self._open.truncate(self._open.tell() - 1)

    def _next_file(self) -> bool:
        if self._open is not None:
            self._finish_file()
        entry = next(self._files, None)
        if entry is None:
            return False
        path = f"{self._place_of_files}/{entry.path}" if entry.path else self._place_of_files
        # Never through a link that somebody put in our way.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags, 0o755 if entry.executable else 0o644)
        self._open = io.FileIO(handle, "r+")
        self._left = entry.size
        return True

    def _finish_file(self) -> None:
        assert self._open is not None
        if self.manifest.files <= SYNC_FILES:
            os.fsync(self._open.fileno())
        self._open.close()
        self._open = None

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the stream (without the digest)."""
        self._checksum.update(data)
        self._put(memoryview(data))

    def write_if(self, digest: str, data: memoryview) -> bool:
        """The same, if `digest` is the one of all up to the end of `data`; whether it is."""
        checksum = self._checksum.with_more(data)
        if checksum.compared() != digest:
            return False
        self._checksum = checksum
        self._put(data)
        return True

    def _put(self, view: memoryview) -> None:
        try:
            while len(view):
                if self._left == 0 and not self._next_file():
                    raise TransferError("more bytes came than the list of files holds")
                assert self._open is not None
                count = self._write(self._open, view[: self._left])
                self._left -= count
                self.offset += count
                view = view[count:]
        except OSError as error:
            raise TransferError(f"{self._destination} cannot be written: {error.strerror}") from None

    def _write(self, file: io.FileIO, view: memoryview) -> int:
        whole = whole_pages(file, view) if self._direct else 0
        if not whole:
            return file.write(view)
        try:
            with past_the_page_cache(file):
                return file.write(view[:whole])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = 0  # not on this file system, or not from memory that lies like this
        return file.write(view)

    def finish(self, digest: str) -> str:
        """Check the digest and put everything in its place. Returns the last of our own (hex)."""
        if self.offset != self.total or digest != self._checksum.compared():
            self.discard()
            raise TransferError(
                f"{self._destination} arrived altered ({self.offset} of {self.total} bytes) and was dropped"
            )
        try:
            while self._next_file():  # empty files at the end
                pass
            self._place()
        except OSError as error:
            raise TransferError(f"{self._destination} cannot be written: {error.strerror}") from None
        return self._checksum.all()[-DIGITS[self._checksum.ways[-1]] :]

    def _place(self) -> None:
        for entry in self.manifest.entries:
            if entry.kind == "link":
                link = self._part / entry.path
                link.unlink(missing_ok=True)
                link.symlink_to(entry.target)
        if not self.manifest.directory or not self._destination.exists():
            self._part.replace(self._destination)
            return
        for entry in self.manifest.entries:
            target = self._destination / entry.path
            if entry.kind == "dir":
                if target.is_symlink():
                    raise TransferError(f"{target} is a link; nothing is copied through links")
                target.mkdir(exist_ok=True)
            else:
                (self._part / entry.path).replace(target)
        shutil.rmtree(self._part)

    def close(self) -> None:
        """Stop here; a later Sink can go on."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def discard(self) -> None:
        """Stop and remove what was received."""
        self.close()
        _remove(self._part)


def discard_part(destination: Path, copy_id: str) -> None:
    """Remove what an earlier process received of a copy."""
    _remove(_part(destination, copy_id))


def _part(destination: Path, copy_id: str) -> Path:
    return destination.parent / f".{destination.name[:100]}.{copy_id}.part"


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
