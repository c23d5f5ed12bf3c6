"""`python -m tests.chaos`: commands and copies while everything is killed at random (`make chaos`: the long form)."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

from .chaos import KINDS, Chaos, Plan


def main() -> int:
    """0: nothing was lost, run twice, corrupt or left over; 1: something was, with the seed that shows it again."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--broker", choices=("embedded", "activemq", "rabbitmq"), action="append")
    parser.add_argument("--commands", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=400)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--folder", type=Path, help="work there, and keep what is in it (default: a temporary one)")
    parser.add_argument("--only", choices=KINDS, action="append", help="kill only this; may be repeated")
    options = parser.parse_args()
    code = 0
    for broker in options.broker or ("embedded", "activemq", "rabbitmq"):
        plan = Plan(broker, options.commands, options.copies, options.kills, options.seed, tuple(options.only or KINDS))
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vmw-chaos-") as temporary:
            folder = Path(temporary) if options.folder is None else options.folder / broker
            folder.mkdir(parents=True, exist_ok=True)
            problems = Chaos(plan, folder, lambda text: print(text, file=sys.stderr, flush=True)).run()
        for problem in problems:
            print(f"{broker}: {problem}")
        verdict = "FAILED" if problems else "nothing lost, run twice, corrupt or left over"
        print(
            f"{broker}: {plan.commands} commands, {plan.copies} copies, {plan.kills} kills in "
            f"{time.monotonic() - began:.0f} s, seed {plan.seed}: {verdict}",
            flush=True,
        )
        code |= bool(problems)
    return code


if __name__ == "__main__":
    sys.exit(main())
