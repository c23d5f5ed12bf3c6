from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from vm_images.cache import Cache, default_cache, digest_of
from vm_images.tools import BuildError


def write(place: Path) -> None:
    (place / "file").write_text("made")


def test_made_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made = []
    for _ in range(2):
        place = cache.layer("kind", "key", lambda place: made.append(place))
    assert len(made) == 1
    assert place == tmp_path / "kind" / "key"


def test_half_made_layer_is_no_layer(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(place: Path) -> None:
        write(place)
        raise BuildError("half-way")

    with pytest.raises(BuildError):
        cache.layer("kind", "key", fail)
    assert [p.name for p in (tmp_path / "kind").iterdir()] == [".lock-key"]
    assert (cache.layer("kind", "key", write) / "file").exists()


def test_refresh_makes_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.layer("kind", "key", write)
    place = cache.layer("kind", "key", lambda place: (place / "new").touch(), refresh=True)
    assert [p.name for p in place.iterdir()] == ["new"]


def test_oldest_layers_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path, keep=2)
    for age, key in enumerate(["a", "b", "c"]):
        place = cache.layer("kind", key, write)
        os.utime(place, (age, age))
    cache.layer("kind", "d", write)
    assert sorted(p.name for p in (tmp_path / "kind").iterdir() if p.is_dir()) == ["c", "d"]


def test_only_builders_of_the_same_layer_wait_for_each_other(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    order: list[str] = []

    def other(place: Path) -> None:
        # Made while the first is being made: with one lock for all of them this would never end.
        maker = threading.Thread(target=cache.layer, args=("kind", "second", write), daemon=True)
        maker.start()
        maker.join(20)
        assert not maker.is_alive()
        order.append("first")
        write(place)

    cache.layer("kind", "first", other)
    waiting = threading.Thread(target=cache.layer, args=("kind", "third", lambda place: order.append("again")))

    def slow(place: Path) -> None:
        waiting.start()
        waiting.join(0.2)
        order.append("third")
        write(place)

    cache.layer("kind", "third", slow)
    waiting.join(20)
    assert order == ["first", "third"]


def test_a_lock_goes_with_its_layer(tmp_path: Path) -> None:
    cache = Cache(tmp_path, keep=1, most=1)
    for key in "ab":
        cache.layer("kind", key, write)
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == [".lock", ".lock-b", "b"]


def test_layers_in_use_stay_up_to_a_limit(tmp_path: Path) -> None:
    """Tests and builders of several recipes take turns: what one reads must not go while another one builds."""
    cache = Cache(tmp_path, keep=1, most=3)
    for key in "abcd":
        os.utime(cache.layer("kind", key, write), (time.time() - 60 + ord(key) - ord("a"),) * 2)
    cache.layer("kind", "e", write)
    assert sorted(p.name for p in (tmp_path / "kind").iterdir() if p.is_dir()) == ["c", "d", "e"]


def test_full_disk_is_said(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BuildError, match="disk is full") as caught:
        Cache(tmp_path).layer("kind", "key", fail)
    assert "--cache" in caught.value.hint


def test_unusable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        Cache(tmp_path / "file").layer("kind", "key", write)


def test_digest_keeps_parts_apart() -> None:
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    assert digest_of(["a"]) == digest_of([b"a"])


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_CACHE", "/chosen")
    assert default_cache() == Path("/chosen")
    monkeypatch.delenv("VMWRAPPER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache().parts[-1] == "vmwrapper"
