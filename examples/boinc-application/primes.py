#!/usr/bin/env python3
"""A BOINC application in Python: it counts primes below the number in `in` and writes how many to `out`.

It can be suspended and ended at any moment; the next start goes on after the last checkpoint. A trickle-up tells the
project about every tenth of the way. Without a client it runs too: put a number into `in` and start it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from host_agent.wrapper.boinc.application import Application, run

STATE = Path("state")


def main(app: Application) -> int:
    limit = int(app.resolve("in").read_text())
    start, count = (int(word) for word in STATE.read_text().split()) if STATE.exists() else (2, 0)
    for number in range(start, limit):
        if number % 1000 == 0:
            app.step(number / limit)
            if app.time_to_checkpoint():
                with app.checkpoint():
                    new = STATE.with_suffix(".new")
                    new.write_text(f"{number} {count}")
                    new.replace(STATE)
        if number % max(1, limit // 10) == 0:
            app.runtime.send_trickle_up("primes", f"<below>{number}</below>\n<count>{count}</count>\n")
        count += all(number % divisor for divisor in range(2, int(number**0.5) + 1))
    app.resolve("out").write_text(f"{count}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
