"""`python -m tests.fuzz TARGET [--seconds N] [--seed N] [--found DIR]`: coverage-guided fuzzing of one target.

Ends with 0 when nothing was found. What is found is left in DIR (default: build/fuzz/TARGET) as `crash-…`; put it into
`tests/fuzz/corpus/TARGET`, where it is tried on every run from then on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["common", "host_agent", "json"]):
    from tests.fuzz.targets import CORPUS, TARGETS

LARGEST = 4096  # bytes of one input


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="repeat a run; 0, the default: another one each time")
    parser.add_argument("--found", type=Path, help="what was found, and what was learnt on the way")
    options = parser.parse_args()
    found: Path = options.found or Path("build") / "fuzz" / options.target
    learnt = found / "learnt"
    learnt.mkdir(parents=True, exist_ok=True)
    arguments = [
        sys.argv[0],
        f"-max_total_time={options.seconds}",
        f"-seed={options.seed}",
        f"-max_len={LARGEST}",
        f"-artifact_prefix={found}/",
        "-rss_limit_mb=1024",
        "-timeout=10",  # seconds for one input: what takes longer is a finding, too
        "-print_final_stats=1",
        str(learnt),
        str(CORPUS / options.target),
    ]
    atheris.Setup(arguments, TARGETS[options.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
