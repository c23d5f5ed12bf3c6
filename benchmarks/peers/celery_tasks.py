"""Celery's side: the task, and a client that is asked over its standard input. Runs in Celery's own environment.

celery --app celery_tasks worker …       # the worker
python celery_tasks.py                   # the client: for each line, runs the words in it; prints seconds
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from celery import Celery

app = Celery("celery_tasks", broker=os.environ["BENCH_AMQP"], backend="rpc://")
app.conf.broker_connection_retry_on_startup = True


@app.task(name="run")  # type: ignore[untyped-decorator]
def run(argv: list[str]) -> int:
    """A program, to its end."""
    return subprocess.run(argv, check=False).returncode


if __name__ == "__main__":
    for line in sys.stdin:
        began = time.perf_counter()
        assert run.delay(line.split()).get(timeout=60) == 0
        print(time.perf_counter() - began, flush=True)
