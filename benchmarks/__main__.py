"""`python -m benchmarks NAME [--json FILE]`: measure, print a table, and say on which machine."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import SHORT, profiles
from benchmarks.machine import machine
from benchmarks.peers.packages import Unavailable

NAMES = {
    "end_latency": "how soon a task's end is known",
    "roundtrip_local": "a command's round trip to a local process, against ssh to this host and Celery on RabbitMQ",
    "broker": "requests, large bodies and memory of the embedded broker, against ActiveMQ and RabbitMQ",
    "wrapper": "memory, CPU time and latencies of the wrapper, against BOINC's runtime and a Python that polls",
    "boot": "cold boot of the default image until its agent answers",
    "vm_states": "saving, snapshots and restoring of a VM",
    "checkpoint": "a live checkpoint of a working VM, against QEMU's snapshot-save and a copy of the disk",
    "vm_start": "warm start, cold boot and return of a VM, against QEMU by hand and a boot with cloud-init",
    "roundtrip": "a command's round trip in a QEMU guest, against qemu-guest-agent and ssh in the same guest",
    "copy": "256 MiB and 2,000 files into a VM and out of it, against scp, qemu-guest-agent, virtiofs and Chirp",
    "clones": "three clones of a template at once against one, and what a suspended VM computes",
    "image": "the default image: its build, its size when packed, its boot in 128 MB",
    "agent_file": "the one-file guest agent: size, readiness, memory, idle CPU time",
    "monitor": "the monitor's page with 1,000 guests and 100 events a second, for a minute",
    "scale": "10, 100 and 1,000 simulated guests on one host agent, on each broker",
}
UNAVAILABLE = 69  # the exit status where this machine lacks what a benchmark cannot do without
IMAGES = Path(__file__).parents[1] / "build" / "images"


def main() -> int:
    lines = "\n".join(f"  {name:15} {line}" for name, line in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"benchmarks:\n{lines}\n  {'all':15} each of them, in a process of its own",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=[*NAMES, "all"], help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics there, too")
    parser.add_argument("--short", action="store_true", help="a form that takes seconds, with fewer peers")
    parser.add_argument(
        "--profile", action="store_true", help="say where the time goes in host agents and embedded brokers"
    )
    options = parser.parse_args()
    if options.profile and options.name != "all":
        with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
            argv = [word for word in sys.argv[1:] if word != "--profile"]
            env = {**os.environ, profiles.VARIABLE: folder}
            status = subprocess.run([sys.executable, "-m", "benchmarks", *argv], env=env, check=False).returncode
            os.environ[profiles.VARIABLE] = folder
            profiles.show()
        return status
    if options.short and not SHORT:
        os.environ["VMWRAPPER_BENCH_SHORT"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])  # noqa: S606
    os.environ.setdefault("VMWRAPPER_IMAGES", str(IMAGES))
    if options.name == "all":
        return _all(options.json)
    try:
        metrics: dict[str, float] = importlib.import_module(f"benchmarks.{options.name}").run()
    except Unavailable as reason:
        print(f"{options.name} cannot be measured: {' '.join(str(reason).split())}", file=sys.stderr)
        return UNAVAILABLE
    print(f"{options.name}, on {machine()}")
    for metric, value in metrics.items():
        print(f"  {metric:28} {value:12.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"name": options.name, "metrics": metrics}) + "\n", "utf-8")
    return 0


def _all(file: Path | None) -> int:
    """Each benchmark in a process of its own: Twisted's reactor starts only once."""
    failed, found = 0, {}
    for name in NAMES:
        part = file.with_name(f"{file.name}.{name}") if file is not None else None
        options = ["--json", str(part)] if part is not None else []
        failed += bool(subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=False).returncode)
        if part is not None and part.exists():
            found.update({f"{name}.{key}": value for key, value in json.loads(part.read_text())["metrics"].items()})
            part.unlink()
    if file is not None:
        file.write_text(json.dumps({"name": "all", "metrics": found}) + "\n", "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
