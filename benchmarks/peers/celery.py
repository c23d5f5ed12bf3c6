"""Celery on RabbitMQ: a worker and a client as processes, in an environment of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.brokers import TESTER, TESTER_PASSCODE, RunningBroker, free_port

from .packages import environment

TASKS = Path(__file__).with_name("celery_tasks.py")
DEADLINE = 60.0


def speaks_amqp(broker: RunningBroker) -> int:
    """Give a RabbitMQ that does not run yet the protocol that Celery needs; its port."""
    port, file = free_port(), broker.plan.directory / "rabbitmq.conf"
    text = file.read_text()
    assert "listeners.tcp = none" in text
    file.write_text(text.replace("listeners.tcp = none", f"listeners.tcp.1 = 127.0.0.1:{port}"))
    return port


@contextmanager
def celery(amqp_port: int, folder: Path) -> Iterator[Callable[[str], float]]:
    """One worker process, as Celery starts it (prefork); the function runs a program and returns its seconds."""
    python = environment("bench")
    url = f"amqp://{TESTER}:{TESTER_PASSCODE.replace(' ', '%20')}@127.0.0.1:{amqp_port}//"
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "BENCH_AMQP": url}
    shutil.copy(TASKS, folder)
    argv = [str(python), "-m", "celery", "--app", "celery_tasks", "worker", "--concurrency", "1"]
    with (folder / "celery.log").open("wb") as log:
        worker = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=folder)
        script = [str(python), str(folder / TASKS.name)]
        client = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env)
    assert client.stdin is not None and client.stdout is not None
    asked, answers = client.stdin, client.stdout

    def run(program: str) -> float:
        asked.write(program.encode() + b"\n")
        asked.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"Celery failed: {(folder / 'celery.log').read_text()[-2000:]}")
        return float(answer)

    try:
        run("/bin/true")  # waits until the worker is there
        yield run
    finally:
        for process in (client, worker):
            process.terminate()
            process.wait(DEADLINE)
