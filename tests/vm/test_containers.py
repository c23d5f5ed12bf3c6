"""A container, made by Debian's umoci, as a guest: its programs, environment, directory and user are those of tasks."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from host_agent.hypervisors.images import Image
from tests.system.agent_process import agent_process
from vm_images.builder import build_from_container, frozen_agent
from vm_images.cache import Cache, default_cache
from vm_images.oci import merge_container
from vm_images.recipe import load_recipe

pytestmark = pytest.mark.vm
DEADLINE = 240.0


def umoci(*words: str | Path) -> None:
    subprocess.run(["umoci", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """busybox and a script, in two layers, of which the second takes a file away."""
    place = tmp_path_factory.mktemp("container")
    layout, image = place / "layout", f"{place / 'layout'}:one"
    umoci("init", "--layout", layout)
    umoci("new", "--image", image)
    first = place / "first"
    (first / "bin").mkdir(parents=True)
    (first / "etc").mkdir()
    (first / "work").mkdir()
    shutil.copy(frozen_agent(Cache(default_cache())) / "busybox", first / "bin" / "busybox")
    (first / "bin" / "sh").symlink_to("busybox")
    (first / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\nphysicist:x:1234:1235::/work:/bin/sh\n")
    (first / "etc" / "old").write_text("old")
    (first / "bin" / "compute").write_text('#!/bin/sh\necho "$KIND $(busybox id -u) $PWD $*"\n')
    (first / "bin" / "compute").chmod(0o755)
    umoci("insert", "--image", image, first, "/")
    umoci("insert", "--whiteout", "--image", image, "/etc/old")
    words = ["--config.entrypoint=/bin/compute", "--config.cmd=by default", "--config.env=KIND=container"]
    umoci("config", "--image", image, *words, "--config.workingdir=/work", "--config.user=physicist")
    packed = place / "physics.tar"
    with tarfile.open(packed, "w") as out:
        for path in sorted(layout.rglob("*")):
            out.add(path, path.relative_to(layout), recursive=False)
    return packed


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("docker-archive:{}:physics:latest", []),
        ("oci-archive:{}", ["--dest-compress", "--dest-compress-format", "zstd"]),
    ],
)
def test_other_kinds_of_archives_hold_the_same(archive: Path, target: str, options: list[str], tmp_path: Path) -> None:
    """What Docker saves, and layers packed by zstd, both written by skopeo."""
    other = tmp_path / "other.tar"
    words = ["--insecure-policy", "copy", *options, f"oci-archive:{archive}", target.format(other)]
    subprocess.run(["skopeo", *words], check=True, capture_output=True, timeout=60)
    found = []
    for number, path in enumerate((archive, other)):
        work = tmp_path / f"work-{number}"
        work.mkdir()
        container = merge_container(path, work / "merged.tar", {}, work)
        found.append((container, (work / "merged.tar").read_bytes()))
    assert found[0] == found[1]
    assert other.read_bytes() != archive.read_bytes()


@pytest.fixture(scope="module")
def container(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    output = tmp_path_factory.mktemp("images")
    recipe = load_recipe("debian-minimal")
    return build_from_container(archive, recipe, output, Cache(default_cache()), name="physics")


def test_a_container_is_a_guest(container: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(container.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        assert agent.client is not None
        arguments = {"vm": "one", "image": "physics", "directory": str(tmp_path / "vms"), "deadline_s": DEADLINE}
        agent.client.call("start_vm", arguments, deadline_s=DEADLINE)

        def run(*argv: str) -> str:
            output = tmp_path / "output"
            output.unlink(missing_ok=True)
            request = {"vm": "one", "argv": list(argv), "stdout": str(output)}
            assert agent.client is not None
            ended = agent.client.call("run", request, deadline_s=DEADLINE)
            assert ended["exit_code"] == 0, ended
            return output.read_text()

        assert run("entrypoint", "a", "b c") == "container 1234 /work a b c\n"
        assert run("entrypoint") == "container 1234 /work by default\n"
        assert run("sh", "-c", "busybox test -e /etc/old || echo gone") == "gone\n"
