"""256 MiB and 2,000 files of 4 KiB into a VM and out of it, with digests at both ends, against others in the same VM.

scp over a connection that stays, qemu-guest-agent's file calls, virtiofs, Chirp; the limit is a bare TCP stream of the
same bytes on our own path (`stream.py`), with a script in the guest that reads and drops, or sends. All in turn. Slow
ones copy less and are counted in MB/s, or as seconds for 2,000 files: scp, qemu-guest-agent, Chirp, one scp for each
file. Large: megabytes a second, more is better. Small: seconds, less is better. A guest of one processor would have to
receive and to hash with the same: the row of both in turn says what that allows over the network.

`…_cpu_ratio_to_limit` compares the CPU time of QEMU and the host agent with what the stream and the start of its script
take of it, which other work on the machine changes little.

The short form copies 16 MiB and 100 files, without peers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import attrs

from benchmarks import SHORT
from benchmarks.agent import Agent, host_agent
from benchmarks.copiers import CHIRP_PORT, Copier, Hashing, Ours, Qga, Scp, ScpEach, VirtioFs, serve_chirp
from benchmarks.cpu import cpu_seconds
from benchmarks.open_host import doors, qemu_with
from benchmarks.peers import qga
from benchmarks.peers.image import SSH_PORT, let_in, peers_image
from benchmarks.peers.packages import Unavailable, need
from benchmarks.peers.virtiofs import virtiofs
from benchmarks.report import OURS, rounds_of, show, timed
from benchmarks.stream import GUEST_END
from guest_agent.emulated import PLAIN, SETTING
from host_agent.hypervisors.images import DEFAULT_IMAGE, find_image

# VMWRAPPER_BENCH_COPY="32 200" copies that many mebibytes and files, on a machine that is busy.
_MIB, FILES = map(int, os.environ.get("VMWRAPPER_BENCH_COPY", "16 100" if SHORT else "256 2000").split())
LARGE = _MIB << 20
LARGE_OF_SLOW = min(16 << 20, LARGE)
FILES_OF_SLOW = min(100, FILES)
FILES_OF_SCP = min(400, FILES)
FILES_OF_SLOWEST = min(20, FILES)
FILE_BYTES = 4096
ROUNDS = 5 if SHORT else 3
SCP, SCP_EACH, QGA, VIRTIOFS, CHIRP = "scp", "scp, one for each file", "qemu-ga", "virtiofs", "chirp"
LIMIT = "limit: bare TCP stream"
LIMIT_ONE = "that, and SHA-256 in turn"
# In the guest: megabytes a second of SHA-256, with plain instructions.
HASH_RATE = f"""
import os, time
os.environ["{SETTING}"] = "{PLAIN}"
import hashlib
data, digest = os.urandom(1 << 20), hashlib.sha256()
began = time.perf_counter()
for _ in range(32):
    digest.update(data)
print(32 * 1.048576 / (time.perf_counter() - began))
"""


@attrs.frozen
class Way:
    """A copier, and how much of the whole it copies."""

    copier: Copier
    large: int = LARGE  # bytes; 0: none
    files: int = FILES


class Work:
    """Files on the host; what each way needed for them."""

    def __init__(self, folder: Path, agent: Agent) -> None:
        self._folder, self._agent = folder, agent
        self.missing: dict[str, str] = {}
        self.ways: dict[str, Way] = {OURS: Way(Ours(agent))}
        self.found: dict[str, dict[str, list[float]]] = {
            kind: {} for kind in ("large_in", "large_out", "small_in", "small_out")
        }
        (vm,) = agent.call("vms")["vms"]
        self._pids = [int(vm["pid"]), agent.process.pid]
        self.cpu: dict[tuple[str, str], list[float]] = {}  # of QEMU and the host agent: kind and name

    def large(self, size: int) -> Path:
        """A file of random bytes."""
        path = self._folder / f"large-{size >> 20}"
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(size >> 20):
                    file.write(os.urandom(1 << 20))
        return path

    def small(self, count: int) -> Path:
        """A directory of files."""
        path = self._folder / f"small-{count}"
        if not path.exists():
            path.mkdir()
            for number in range(count):
                (path / f"file-{number:04}").write_bytes(os.urandom(FILE_BYTES))
        return path

    def one_round(self) -> None:
        hashing = float(self._agent.run("python3", "-c", HASH_RATE))
        for direction in ("in", "out"):
            stream = LARGE / 1e6 / self._stream("large", direction, LARGE)
            self._add(f"large_{direction}", LIMIT, stream)
            self._add(f"large_{direction}", LIMIT_ONE, 1 / (1 / stream + 1 / hashing))
            self._add(f"small_{direction}", LIMIT, self._stream("small", direction, FILES * FILE_BYTES))
        for name, way in list(self.ways.items()):
            try:
                self._one_way(name, way)
            except (RuntimeError, subprocess.SubprocessError) as error:
                if name == OURS:
                    raise
                self.missing[name] = f"it failed: {' '.join(str(error).split())[-200:]}"
                del self.ways[name]
                self._agent.run("rm", "-rf", "copied")

    def _one_way(self, name: str, way: Way) -> None:
        if way.large:
            seconds = self._there_and_back(name, "large", way.copier, self.large(way.large))
            for kind, each in zip(("large_in", "large_out"), seconds, strict=True):
                self._add(kind, name, way.large / 1e6 / each)
        if way.files:
            seconds = self._there_and_back(name, "small", way.copier, self.small(way.files))
            for kind, each in zip(("small_in", "small_out"), seconds, strict=True):
                self._add(kind, name, each * FILES / way.files)

    def _there_and_back(self, name: str, what: str, copier: Copier, source: Path) -> tuple[float, float]:
        back = self._folder / "back"
        if back.is_dir():
            shutil.rmtree(back)
        back.unlink(missing_ok=True)
        with self._counted(f"{what}_in", name):
            inwards = timed(lambda: copier.put(source, "copied"))
        with self._counted(f"{what}_out", name):
            outwards = timed(lambda: copier.get("copied", back))
        _check_same(source, back)
        self._agent.run("rm", "-r", "copied")
        return inwards, outwards

    def _stream(self, what: str, direction: str, size: int) -> float:
        with self._counted(f"{what}_{direction}", LIMIT):
            return float(self._agent.run("python3", "-c", GUEST_END, direction, str(size)))

    @contextlib.contextmanager
    def _counted(self, kind: str, name: str) -> Iterator[None]:
        before = cpu_seconds(self._pids)
        yield
        self.cpu.setdefault((kind, name), []).append(cpu_seconds(self._pids) - before)

    def _add(self, kind: str, name: str, value: float) -> None:
        self.found[kind].setdefault(name, []).append(value)


def _check_same(source: Path, back: Path) -> None:
    """That all of it came, by sizes; each way has hashed it."""
    sizes = [
        sorted((file.name, file.stat().st_size) for file in place.iterdir() if not file.name.startswith(".__acl"))
        if place.is_dir()
        else place.stat().st_size
        for place in (source, back)
    ]
    assert sizes[0] == sizes[1], f"{back} is not what {source} is"


def run() -> dict[str, float]:
    """Measure; ten minutes where VMs are emulated, one in the short form."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        missing: dict[str, str] = {}
        image = find_image(DEFAULT_IMAGE) if SHORT else peers_image(folder / "images")
        devices, ports = ([], []) if SHORT else (qga.options(folder / "qga.sock"), [SSH_PORT, CHIRP_PORT])
        shared: Path | None = None
        if not SHORT:
            try:
                shared, more = stack.enter_context(virtiofs(folder, image.memory_mb))
                devices += more
            except Unavailable as reason:
                missing[VIRTIOFS] = str(reason)
        env = qemu_with(folder, *devices)
        options = ["--doors", *map(str, ports)]
        module = "benchmarks.open_host"
        agent = stack.enter_context(host_agent(folder / "host", module=module, options=options, env=env))
        agent.start_vm(image=str(image.directory))
        work = Work(folder, agent)
        work.missing = missing
        if not SHORT:
            _add_peers(work, agent, folder, shared, stack)
        for _ in rounds_of(ROUNDS):
            work.one_round()
        return _metrics(work)


def _add_peers(work: Work, agent: Agent, folder: Path, shared: Path | None, stack: contextlib.ExitStack) -> None:
    ways = doors(agent)
    ssh = let_in(agent, ways[SSH_PORT], folder)
    stack.enter_context(ssh.master())

    def hashing(copier: Copier, large: int = LARGE, files: int = FILES) -> Way:
        return Way(Hashing(copier, agent), large, files)

    work.ways[SCP] = hashing(Scp(ssh), LARGE_OF_SLOW, FILES_OF_SCP)
    work.ways[SCP_EACH] = hashing(ScpEach(ssh, agent), 0, FILES_OF_SLOWEST)
    if shared is not None:
        copier = VirtioFs(shared, agent)
        copier.share(work.large(LARGE))
        copier.share(work.small(FILES))
        work.ways[VIRTIOFS] = hashing(copier)
    work.ways[QGA] = hashing(Qga(qga.GuestAgent(folder / "qga.sock"), agent), LARGE_OF_SLOW, FILES_OF_SLOW)
    try:
        need("coop-computing-tools")
        work.ways[CHIRP] = hashing(serve_chirp(agent, ways[CHIRP_PORT]), LARGE_OF_SLOW, FILES_OF_SLOW)
    except Unavailable as reason:
        work.missing[CHIRP] = str(reason)


def _metrics(work: Work) -> dict[str, float]:
    for direction, words in (("in", "into the guest"), ("out", "out of the guest")):
        show(f"{LARGE >> 20} MiB {words}", work.found[f"large_{direction}"], "MB/s", missing=work.missing)
        show(f"{FILES:,} files of 4 KiB {words}", work.found[f"small_{direction}"], "s", missing=work.missing)
    for kind in work.found:
        cpu = {name: values for (what, name), values in work.cpu.items() if what == kind}
        show(f"CPU time of QEMU and the host agent, {kind.replace('_', ' ')}", cpu, "s")
    middle = {kind: {name: median(values) for name, values in by_name.items()} for kind, by_name in work.found.items()}
    metrics: dict[str, float] = {}
    for direction in ("in", "out"):
        large, small = middle[f"large_{direction}"], middle[f"small_{direction}"]
        metrics[f"large_{direction}_ratio_to_limit"] = large[OURS] / large[LIMIT]
        metrics[f"large_{direction}_ratio_to_one_processor"] = large[OURS] / large[LIMIT_ONE]
        metrics[f"large_{direction}_mb_s"] = large[OURS]
        metrics[f"small_files_{direction}_s"] = small[OURS]
        metrics[f"small_files_{direction}_ratio_to_limit"] = small[OURS] / small[LIMIT]
        for what in ("large", "small"):
            ours, limit = (median(work.cpu[f"{what}_{direction}", name]) for name in (OURS, LIMIT))
            metrics[f"{what}_{direction}_cpu_ratio_to_limit"] = ours / limit
    # How many times faster than scp.
    for key, name in (("small_files_ratio_to_scp", SCP), ("small_files_ratio_to_scp_each", SCP_EACH)):
        if name in middle["small_in"]:
            metrics[key] = middle["small_in"][name] / middle["small_in"][OURS]
            metrics[f"{key}_out"] = middle["small_out"][name] / middle["small_out"][OURS]
    return metrics
