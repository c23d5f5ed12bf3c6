"""Merging a container's layers, and what hostile archives get."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vm_images.oci import Container, merge_container
from vm_images.oci_archive import HostileArchive
from vm_images.tools import BuildError


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def layer(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda content: content,
    "gzip": lambda content: gzip.compress(content, mtime=0),
    "zstd": lambda content: subprocess.run(["zstd", "-q", "-c"], input=content, capture_output=True, check=True).stdout,
}


def saved(place: Path, *layers: bytes, form: str = "oci-gzip", **config: Any) -> Path:
    """An OCI archive, or a `docker save` file as Docker wrote it until it had both in one ("docker-plain")."""
    kind, _, how = form.partition("-")
    packed = [PACKERS[how](each) for each in layers]
    ids = [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers]
    described = {"architecture": "amd64", "config": config, "rootfs": {"type": "layers", "diff_ids": ids}}
    files: dict[str, bytes] = {}

    def blob(content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        files[f"blobs/sha256/{digest}"] = content
        return {"digest": f"sha256:{digest}", "size": len(content)}

    if kind == "docker":
        names = [f"{hashlib.sha256(each).hexdigest()}/layer.tar" for each in layers]
        files = {"config.json": json.dumps(described).encode(), **dict(zip(names, packed, strict=True))}
        words = [{"Config": "config.json", "RepoTags": ["physics:latest"], "Layers": names}]
        files["manifest.json"] = json.dumps(words).encode()
    else:
        manifest = {"config": blob(json.dumps(described).encode()), "layers": [blob(each) for each in packed]}
        files["index.json"] = json.dumps({"manifests": [blob(json.dumps(manifest).encode())]}).encode()
        files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    path = place / "saved.tar"
    path.write_bytes(layer(*(entry(name, content) for name, content in files.items())))
    return path


def merge(
    place: Path, *layers: bytes, form: str = "oci-gzip", **config: Any
) -> tuple[dict[str, tarfile.TarInfo], Container]:
    work = place / "work"
    work.mkdir()
    found = merge_container(saved(place, *layers, form=form, **config), place / "merged.tar", {}, work)
    with tarfile.open(place / "merged.tar") as archive:
        members = {member.name.removeprefix("./"): member for member in archive}
    return {name: each for name, each in members.items() if not name.startswith("usr")}, found


def content_of(place: Path, name: str) -> bytes:
    with tarfile.open(place / "merged.tar") as archive:
        source = archive.extractfile(f"./{name}")
        assert source is not None
        return source.read()


FORMS = ["oci-plain", "oci-gzip", "oci-zstd", "docker-plain", "docker-gzip", "docker-zstd"]


@pytest.mark.parametrize("form", FORMS)
def test_later_layers_hide_earlier_ones(form: str, tmp_path: Path) -> None:
    first = layer(
        entry("a/one", b"1"), entry("a/two", b"2"), entry("b/three", b"3"), entry("b/four", b"4"), entry("c", b"old")
    )
    second = layer(entry("a/.wh.one"), entry("b/five", b"5"), entry("b/.wh..wh..opq"), entry("c", b"new"))
    members, _ = merge(tmp_path, first, second, form=form)
    assert {name for name in members if "/" in name} == {"a/two", "b/five"}
    assert content_of(tmp_path, "c") == b"new"


def test_owners_modes_and_links(tmp_path: Path) -> None:
    members, _ = merge(
        tmp_path,
        layer(
            entry("bin", type=tarfile.DIRTYPE, mode=0o711, uid=7),
            entry("bin/a", b"x", uid=12, gid=34, mode=0o4755),
            entry("bin/b", type=tarfile.LNKTYPE, linkname="bin/a"),
            entry("sbin", type=tarfile.SYMTYPE, linkname="bin"),
        ),
        layer(entry("sbin/c", b"through the link")),
    )
    assert (members["bin"].mode, members["bin"].uid) == (0o711, 7)
    assert (members["bin/a"].uid, members["bin/a"].gid, members["bin/a"].mode) == (12, 34, 0o4755)
    assert members["bin/b"].islnk() and members["bin/b"].linkname == "./bin/a"
    assert members["sbin"].issym() and "bin/c" in members and "sbin/c" not in members


def test_what_its_tasks_have(tmp_path: Path) -> None:
    _, found = merge(
        tmp_path,
        layer(entry("etc/passwd", b"root:x:0:0::/:/bin/sh\nme:x:5:6::/:/bin/sh\n"), entry("etc/group", b"us:x:77:\n")),
        Entrypoint=["/run"],
        Cmd=["x"],
        Env=["A=b=c"],
        WorkingDir="/work",
        User="me:us",
    )
    assert found == Container(("/run",), ("x",), {"A": "b=c"}, "/work", 5, 77)


@pytest.mark.parametrize("form", ["oci-zstd", "docker-plain"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (entry("../up"), "leads out"),
        (entry("a/../../up"), "leads out"),
        (entry("/absolute"), "leads out"),
        (entry("dev/null", type=tarfile.CHRTYPE), "device"),
        (entry("dev/sda", type=tarfile.BLKTYPE), "device"),
        (entry("pipe", type=tarfile.FIFOTYPE), "pipe"),
        (entry("h", type=tarfile.LNKTYPE, linkname="../../etc/shadow"), "leads out"),
        (entry("h", type=tarfile.LNKTYPE, linkname="nothing"), "hard link"),
        (entry("file/below", b""), "no directory"),
        (entry("loop/below", b""), "links"),
        (entry("/".join(["d"] * 300)), "too deep"),
        (entry("x" * 3_000_000), "30000.. bytes about one file"),
    ],
)
def test_hostile_entries(tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], words: str, form: str) -> None:
    good = [entry("file", b"x"), entry("loop", type=tarfile.SYMTYPE, linkname="loop")]
    with pytest.raises(HostileArchive, match=words):
        merge(tmp_path, layer(*good), layer(bad), form=form)


def test_a_link_leads_nowhere_but_into_the_tree(tmp_path: Path) -> None:
    out = entry("out", type=tarfile.SYMTYPE, linkname="/../../../tmp")
    members, _ = merge(tmp_path, layer(out), layer(entry("out/evil", b"x")))
    assert "tmp/evil" in members


@pytest.mark.parametrize("form", FORMS)
def test_bombs(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vm_images.oci_archive.MOST_BYTES", 100_000)
    with pytest.raises(HostileArchive, match="unpacks to more"):
        merge(tmp_path, layer(entry("zeros", bytes(2_000_000))), form=form)


def test_a_bomb_is_told_by_its_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zstd packs noughts 30,000 to 1: what stops it is the ratio, and it is stopped while it unpacks."""
    monkeypatch.setattr("vm_images.oci_archive.SURE_BYTES", 1 << 20)
    with pytest.raises(HostileArchive, match="unpacks to more"):
        merge(tmp_path, layer(entry("zeros", bytes(64 << 20))), form="oci-zstd")
    assert max(path.stat().st_size for path in (tmp_path / "work").iterdir()) < 40 << 20


@pytest.mark.parametrize("form", ["oci-gzip", "oci-zstd", "docker-plain", "docker-zstd"])
def test_a_layer_whose_content_is_another(form: str, tmp_path: Path) -> None:
    """Its name in the archive proves nothing: what counts is the digest in the configuration."""
    good, bad = layer(entry("a", b"1")), layer(entry("a", b"2"))
    path = saved(tmp_path, good, form=form)
    pack = PACKERS[form.partition("-")[2]]
    members = {}
    with tarfile.open(path) as archive:
        for member in archive:
            source = archive.extractfile(member)
            assert source is not None
            members[member.name] = source.read()
    changed = {name: pack(bad) if content == pack(good) else content for name, content in members.items()}
    assert changed != members
    path.write_bytes(layer(*(entry(name, content) for name, content in changed.items())))
    (tmp_path / "work").mkdir()
    with pytest.raises(HostileArchive, match="altered"):
        merge_container(path, tmp_path / "merged.tar", {}, tmp_path / "work")


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_a_layer_that_breaks_off(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PACKERS[how]
    monkeypatch.setitem(PACKERS, how, lambda content: whole(content)[:-20])
    with pytest.raises(BuildError) as caught:
        merge(tmp_path, layer(entry("a", random.Random(1).randbytes(5000))), form=f"oci-{how}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b'[{"Config": "../../etc/passwd", "Layers": []}]',
        b'[{"Config": "config.json", "Layers": ["/etc/passwd"]}]',
        b'[{"Config": "config.json", "Layers": ["link"]}]',
        b'[{"Config": "config.json"}]',
        b"{",
    ],
)
def test_a_docker_file_that_names_what_is_not_in_it(manifest: bytes, tmp_path: Path) -> None:
    config = json.dumps({"rootfs": {"diff_ids": [f"sha256:{'0' * 64}"]}}).encode()
    link = entry("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    path = tmp_path / "saved.tar"
    path.write_bytes(layer(entry("manifest.json", manifest), entry("config.json", config), link))
    (tmp_path / "work").mkdir()
    with pytest.raises(BuildError) as caught:
        merge_container(path, tmp_path / "merged.tar", {}, tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vm_images.oci.MOST_ENTRIES", 3)
    with pytest.raises(HostileArchive, match="more than 3 files"):
        merge(tmp_path, layer(*(entry(f"f{number}") for number in range(5))))


@pytest.mark.parametrize("content", [b"", b"no archive", layer(entry("x", b"y")), layer(entry("manifest.json", b"{}"))])
def test_what_is_no_container(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(BuildError):
        merge_container(path, tmp_path / "merged.tar", {}, tmp_path)
