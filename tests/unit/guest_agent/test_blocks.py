"""The blocks of a copy out of a guest: any offset, in any order, and the digest of all in the end."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import TransferError
from common.transfer import scan
from guest_agent.blocks import Blocks

SIZE = 10_000


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    for number, length in enumerate((0, 1, 9_999, 10_000, 25_000, 0, 7)):
        (root / f"file-{number}").write_bytes(random.Random(number).randbytes(length))
    return root


@pytest.fixture
def blocks(tree: Path) -> Iterator[Blocks]:
    made = Blocks(tree, scan(tree), SIZE)
    yield made
    made.close()


def whole(tree: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(tree.iterdir()))


def rest(blocks: Blocks, offset: int = 0) -> bytes:
    found = b""
    while block := blocks.at(offset + len(found)):
        found += block
    return found


def digest(tree: Path) -> str:
    return hashlib.sha256(scan(tree).to_json() + whole(tree)).hexdigest()


def test_one_after_the_other_they_are_the_stream(tree: Path, blocks: Blocks) -> None:
    assert len(blocks.at(0)) == SIZE
    assert rest(blocks) == whole(tree)
    assert blocks.digest() == digest(tree)


def test_a_block_stays_as_it_is_while_the_next_is_read(tree: Path, blocks: Blocks) -> None:
    block = blocks.at(0)
    assert blocks._next is not None
    assert len(blocks._next.result(30)) == SIZE  # it is read
    assert block == whole(tree)[:SIZE]


def test_a_block_can_be_asked_for_again(tree: Path, blocks: Blocks) -> None:
    first = bytes(blocks.at(0))
    assert blocks.at(0) == first
    second = bytes(blocks.at(SIZE))
    assert blocks.at(SIZE) == second
    assert first + second + rest(blocks, 2 * SIZE) == whole(tree)
    assert blocks.digest() == digest(tree)


def test_the_last_ones_are_kept(tree: Path, blocks: Blocks) -> None:
    """A receiver that lost the end of what was sent has it again without a look at the files."""
    expected = whole(tree)
    for number in range(4):
        blocks.at(number * SIZE)
    source = blocks._source
    for offset in (3 * SIZE, 3 * SIZE + 5, 2 * SIZE + 1, SIZE):
        assert blocks.at(offset) == expected[offset : offset - offset % SIZE + SIZE]
    assert rest(blocks, SIZE + 1) == expected[SIZE + 1 :]
    assert blocks._source is source
    assert blocks.digest() == digest(tree)


def test_what_is_not_kept_is_read_again(tree: Path, blocks: Blocks) -> None:
    for number in range(4):
        blocks.at(number * SIZE)
    assert blocks._next is not None
    blocks._next.result(30)  # into the memory of the first
    assert blocks.at(5) == whole(tree)[5 : SIZE + 5]
    assert rest(blocks, 5) == whole(tree)[5:]
    assert blocks.digest() == digest(tree)


@pytest.mark.parametrize("start", [0, 1, SIZE, 12_345])
def test_it_goes_back_and_forth(tree: Path, blocks: Blocks, start: int) -> None:
    """The host has less, or more, than was thought: it was started again, or an answer was lost."""
    blocks.at(0)
    blocks.at(SIZE)
    assert rest(blocks, 30_000) == whole(tree)[30_000:]
    assert rest(blocks, start) == whole(tree)[start:]
    assert blocks.digest() == digest(tree)


def test_nothing_is_one_empty_block(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    blocks = Blocks(tmp_path / "empty", scan(tmp_path / "empty"), SIZE)
    assert not blocks.at(0)
    assert not blocks.at(0)
    assert blocks.digest() == hashlib.sha256(scan(tmp_path / "empty").to_json()).hexdigest()
    blocks.close()


def test_a_file_that_shrank_or_went_is_an_error_of_the_copy(tree: Path, blocks: Blocks) -> None:
    (tree / "file-3").write_bytes(b"less")
    (tree / "file-4").unlink()
    with pytest.raises(TransferError, match="file-3 became shorter"):
        rest(blocks)
    manifest = scan(tree)
    (tree / "file-3").unlink()
    again = Blocks(tree, manifest, SIZE)
    with pytest.raises(TransferError, match=r"cannot be read: No such file"):
        rest(again)
    again.close()
