"""Copies: whole, altered, broken off and hostile ones."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import TransferError
from common.transfer import Manifest, Sink, Source, scan

names = st.text("abc.é ", min_size=1, max_size=8).filter(lambda name: name.strip(".") != "")
trees = st.recursive(
    st.dictionaries(names, st.binary(max_size=2000), max_size=4),
    lambda inner: st.dictionaries(names, st.binary(max_size=2000) | inner, max_size=4),
    max_leaves=6,
)


def write_tree(root: Path, tree: dict[str, object]) -> None:
    root.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(root / name, content)
        else:
            assert isinstance(content, bytes)
            (root / name).write_bytes(content)
            (root / name).chmod(0o755 if len(content) % 2 else 0o644)


def read_tree(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), os.access(path, os.X_OK)) if path.is_file() else None
        for path in root.rglob("*")
    }


def copy(source: Path, destination: Path, piece: int = 100, stop_at: int = 0, direct: bool = False) -> str:
    """Copy; with `stop_at`, break off there once and go on with a new Sink."""
    manifest = Manifest.from_json(scan(source).to_json())
    stream = Source(source, manifest)
    sink = Sink(destination, manifest, "c-1", direct=direct)
    while data := stream.read(piece):
        if stop_at and stream.offset > stop_at:
            stop_at = 0
            sink.close()
            sink = Sink(destination, manifest, "c-1")
            stream = Source(source, manifest)
            stream.skip_to(sink.offset)
            continue
        sink.write(data)
    return sink.finish(stream.digest())


@settings(max_examples=50)
@given(tree=trees, piece=st.integers(1, 3000), stop_at=st.integers(0, 3000))
def test_a_tree_arrives_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object], piece: int, stop_at: int
) -> None:
    place = tmp_path_factory.mktemp("copy")
    write_tree(place / "from", tree)
    copy(place / "from", place / "to", piece, stop_at)
    assert read_tree(place / "to") == read_tree(place / "from")
    assert sorted(path.name for path in place.iterdir()) == ["from", "to"]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1_000_000, 1_048_576])
def test_writing_past_the_page_cache_gives_the_same_file(tmp_path: Path, size: int) -> None:
    source = tmp_path / "a"
    source.write_bytes(os.urandom(size))
    manifest = scan(source)
    stream = Source(source, manifest)
    sink = Sink(tmp_path / "b", manifest, "c-1", direct=True)
    buffer = memoryview(mmap.mmap(-1, 262144))  # aligned to pages, as direct writing wants it
    while data := stream.read(len(buffer)):
        buffer[: len(data)] = data
        sink.write(buffer[: len(data)])
    sink.finish(stream.digest())
    assert (tmp_path / "b").read_bytes() == source.read_bytes()
    copy(source, tmp_path / "c", piece=5000, direct=True)  # not aligned: falls back
    assert (tmp_path / "c").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 131_072, 1_000_000, 1_048_576])
@pytest.mark.parametrize("cached", [True, False])
def test_reading_past_the_page_cache_gives_the_same_bytes(tmp_path: Path, size: int, cached: bool) -> None:
    source = tmp_path / "a"
    source.write_bytes(os.urandom(size))
    if not cached:
        with source.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for start in (0, 1):  # a buffer that is aligned to pages, and one that is not: that falls back
        stream = Source(source, scan(source), direct=True)
        buffer = memoryview(mmap.mmap(-1, 262_144 + 4096))[start : 262_144 + start]
        found = b""
        while count := stream.read_into(buffer):
            found += buffer[:count]
        stream.close()
        assert found == source.read_bytes()


def test_a_file_keeps_its_executable_bit_and_replaces_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "a").chmod(0o755)
    (tmp_path / "b").write_bytes(b"older and longer than the new one")
    copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"#!/bin/sh\n"
    assert os.access(tmp_path / "b", os.X_OK)


def test_a_tree_is_merged_into_a_directory_that_is_there(tmp_path: Path) -> None:
    write_tree(tmp_path / "from", {"x": b"new", "d": {"y": b"1"}})
    write_tree(tmp_path / "to", {"x": b"old", "kept": b"2"})
    copy(tmp_path / "from", tmp_path / "to")
    assert set(read_tree(tmp_path / "to")) == {"x", "d", "d/y", "kept"}
    assert (tmp_path / "to" / "x").read_bytes() == b"new"


def test_links_inside_the_tree_stay_links(tmp_path: Path) -> None:
    write_tree(tmp_path / "from", {"d": {"x": b"1"}})
    (tmp_path / "from" / "l").symlink_to("d/x")
    copy(tmp_path / "from", tmp_path / "to")
    assert os.readlink(tmp_path / "to" / "l") == "d/x"


def test_altered_bytes_never_get_the_final_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    manifest = scan(tmp_path / "a")
    stream = Source(tmp_path / "a", manifest)
    stream.read()
    sink = Sink(tmp_path / "b", manifest, "c-1")
    sink.write(b"12346")
    with pytest.raises(TransferError, match="altered"):
        sink.finish(stream.digest())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    stream = Source(tmp_path / "a", scan(tmp_path / "a"))
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(TransferError, match="shorter"):
        while stream.read():
            pass


@pytest.mark.parametrize(
    "entries",
    [
        [["../x", "file", 1, 0, ""]],
        [["/etc/x", "file", 1, 0, ""]],
        [["a/../b", "file", 1, 0, ""]],
        [["a/b", "file", 1, 0, ""]],  # inside a directory that is not listed
        [["a", "link", 0, 0, "b"], ["a/x", "file", 1, 0, ""]],  # through a link
        [["a", "link", 0, 0, "/etc"]],
        [["a", "link", 0, 0, "../.."]],
        [["a", "dir", 0, 0, ""], ["a/l", "link", 0, 0, "../../x"]],
        [["a", "file", -1, 0, ""]],
        [["a", "file", 1e99, 0, ""]],
        [["a", "device", 1, 0, ""]],
        [["a", "file", 1, 0, ""], ["a", "file", 1, 0, ""]],
        [["a\0b", "file", 1, 0, ""]],
        [["/".join("a" * 100), "dir", 0, 0, ""]],
        ["a"],
        [[1, 2, 3, 4, 5]],
    ],
)
def test_a_hostile_list_of_files_is_refused(entries: list[object]) -> None:
    with pytest.raises(TransferError):
        Manifest.from_json(json.dumps({"directory": True, "entries": entries}).encode())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_list_of_files(data: bytes) -> None:
    with pytest.raises(TransferError):
        Manifest.from_json(data)


def test_devices_and_links_that_lead_outside_are_not_sent(tmp_path: Path) -> None:
    write_tree(tmp_path / "from", {})
    (tmp_path / "from" / "l").symlink_to("/etc/passwd")
    with pytest.raises(TransferError, match="stay inside"):
        scan(tmp_path / "from")
    (tmp_path / "from" / "l").unlink()
    os.mkfifo(tmp_path / "from" / "pipe")
    with pytest.raises(TransferError, match="neither"):
        scan(tmp_path / "from")


def test_more_bytes_than_promised_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    sink = Sink(tmp_path / "b", scan(tmp_path / "a"), "c-1")
    with pytest.raises(TransferError, match="more bytes"):
        sink.write(b"12")
    sink.discard()


def test_a_piece_counts_only_when_all_up_to_its_end_is_right(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first second")
    manifest = scan(tmp_path / "a")
    stream, sink = Source(tmp_path / "a", manifest), Sink(tmp_path / "b", manifest, "c-1")
    stream.read(6)
    first = stream.digest()
    stream.read(6)
    assert not sink.write_if(first, memoryview(b"fir5t "))
    assert sink.offset == 0
    assert sink.write_if(first, memoryview(b"first "))
    assert not sink.write_if(first, memoryview(b"second"))
    assert sink.write_if(stream.digest(), memoryview(b"second"))
    sink.finish(stream.digest())
    assert (tmp_path / "b").read_bytes() == b"first second"
