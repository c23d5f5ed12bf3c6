"""Past one machine, on paper: what 10,000 and 1,000,000 hosts ask of brokers, from costs that were measured on one.

    python -m benchmarks.site_model            # the tables of docs/scale.md; a second
    python -m benchmarks.site_model --set hours_per_day=24 --set tasks_per_hour=4
    python -m benchmarks broker --json b.json && python -m benchmarks.site_model --measured b.json

Two things are simulated: a day's traffic, host by host (how long each computes is drawn), and the minutes after a
broker's restart, second by second, with the link's own waits between attempts.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import attrs

from common.broker_link import FIRST_WAIT, JITTER, MOST_WAIT, WAIT_FACTOR
from common.messages import Ack, Beacon, Confirm, Envelope, Message, Output, Result, Run, Usage, encode
from guest_agent.runner import USAGE_EVERY, USAGE_LONGEST, USAGE_SHARE

STOMP_BYTES = 190  # of a frame's own headers, both ways of a hop together
SAMPLE = 20_000  # hosts whose day is drawn; more change the third digit
STORM_MOST = 3600  # seconds that are looked at


def _bytes(*messages: Message) -> int:
    """What such messages are as STOMP bodies, between two sessions that have lasted for a while."""
    return sum(
        len(encode(Envelope(message, "0" * 16, "0" * 16, 12_345 if message.NUMBERED else 0, 12_345)))
        for message in messages
    )


_COMMAND = "c-" + "0" * 16
USAGE_BYTES = _bytes(Usage(_COMMAND, 1234.56, 123_456_789, 0.123))
ACK_BYTES = _bytes(Ack())
BEACON_BYTES = _bytes(
    Beacon(
        "0" * 16, 12_345.6, 1.25, 1, 123_456_789, "0" * 16, "worker", "0.1.0", 260_000_000, 1, 1234.5, {_COMMAND: 12.3}
    )
)
COMMAND_BYTES = _bytes(
    Run(_COMMAND, ("./worker.py", "--input", "in", "--output", "out")),
    Result(_COMMAND, "exited", 0, user_s=1.25, system_s=0.25, wall_s=12.25, max_rss_bytes=12_345_678, pid=1234),
    Confirm((_COMMAND,)),
)
OUTPUT_BYTES = _bytes(Output(_COMMAND, "stdout", 12_345, b"x" * 500))


@attrs.frozen
class Inputs:
    """What was measured (docs/performance.md says by which command) and what is assumed of volunteers."""

    # measured: requests of 200 B with replies, each acknowledged, 64 at a time (benchmark `broker`, quiet machine)
    activemq_requests_per_s: float = 11_100
    rabbitmq_requests_per_s: float = 8_400
    # measured: benchmark `broker`, 1,000 idle clients: growth for one
    activemq_kb_per_client: float = 133
    rabbitmq_kb_per_client: float = 203
    # measured: benchmark `scale`: from connection to HELLO's answer
    joins_per_s: float = 178
    # the protocol's own
    beacon_every_s: float = 10.0
    status_every_s: float = 10.0
    status_bytes: int = 1_100  # benchmark `monitor`: one VM, one command
    # assumed
    hours_per_day: float = 10.0  # that a host computes, mean
    tasks_per_hour: float = 0.5
    commands_per_task: float = 3.0
    outputs_per_task: float = 20.0
    fractions_per_task: float = 100.0  # how often the fraction done moves
    heap_gb: float = 8.0  # of a broker


# Where the inputs stand in what benchmarks write with --json.
MEASURED: dict[str, tuple[str, Callable[[float], float]]] = {
    "activemq_requests_per_s": ("activemq_inflight64_per_s", float),
    "rabbitmq_requests_per_s": ("rabbitmq_inflight64_per_s", float),
    "activemq_kb_per_client": ("activemq_idle_kb_per_client", float),
    "rabbitmq_kb_per_client": ("rabbitmq_idle_kb_per_client", float),
    "joins_per_s": ("embedded_1000_join_ms_per_guest", lambda ms: 1000 / ms),
}


def measured(file: Path) -> dict[str, float]:
    """Inputs from what a benchmark wrote."""
    metrics = json.loads(file.read_text("utf-8"))["metrics"]
    return {name: convert(metrics[key]) for name, (key, convert) in MEASURED.items() if key in metrics}


@functools.cache
def usages(task_s: float, fractions: float) -> int:
    """USAGEs of one program that computes for so long, and whose fraction done moves so many times.

    The guest agent's own rule, look by look: whenever the fraction has moved; CPU time alone after a share of the time
    that the program has run, at most so long.
    """
    count, due, told = 0, 0.0, 0
    for look in range(1, int(task_s / USAGE_EVERY) + 1):
        now = look * USAGE_EVERY
        fraction = int(now * fractions / task_s)
        if now >= due or fraction != told:
            count += 1
            due, told = now + min(USAGE_SHARE * now, USAGE_LONGEST), fraction
    return count


def day_of(hours: float, given: Inputs, *, external: bool = True) -> tuple[float, float]:
    """Messages and bytes of one host with one guest on a day when it computes so many hours.

    On an `external` broker its host agent tells its STATUS there, too.
    """
    seconds = hours * 3600
    tasks = hours * given.tasks_per_hour
    usage = tasks * usages(3600 / given.tasks_per_hour, given.fractions_per_task)
    beacons = seconds / given.beacon_every_s
    status = seconds / given.status_every_s if external else 0.0
    commands, outputs = tasks * given.commands_per_task, tasks * given.outputs_per_task
    acks = usage + 2 * commands + outputs  # each is alone: the next message comes later than an ACK waits
    messages = usage + acks + beacons + status + 3 * commands + outputs
    size = usage * USAGE_BYTES + acks * ACK_BYTES + beacons * BEACON_BYTES + status * given.status_bytes
    size += commands * COMMAND_BYTES + outputs * OUTPUT_BYTES
    return messages, size + messages * STOMP_BYTES


def days(given: Inputs, seed: int = 1, *, external: bool = True) -> tuple[float, float, float]:
    """Mean messages, mean bytes and the 99th percentile of messages of a host's day."""
    dice = random.Random(seed)  # noqa: S311
    share = min(1.0, given.hours_per_day / 24)
    spread = share < 1  # who computes all day long does so every day
    hours = [24 * dice.betavariate(2 * share, 2 * (1 - share)) if spread else 24.0 for _ in range(SAMPLE)]
    drawn = [day_of(each, given, external=external) for each in hours]
    counts = sorted(messages for messages, _ in drawn)
    return sum(counts) / SAMPLE, sum(size for _, size in drawn) / SAMPLE, counts[int(SAMPLE * 0.99)]


def storm(clients: int, per_s: float, seed: int = 1) -> tuple[int, int]:
    """A broker is back: seconds until all clients are, and the most attempts in one second.

    A broker takes so many connections in a second and refuses the others, which wait longer each time.
    """
    dice = random.Random(seed)  # noqa: S311
    due: dict[int, Counter[float]] = {0: Counter({FIRST_WAIT: clients})}  # second: wait after a refusal → clients
    left, most = clients, 0
    for second in range(STORM_MOST):
        now = due.pop(second, Counter())
        attempts = sum(now.values())
        most = max(most, attempts)
        room = int(per_s)
        for wait, count in sorted(now.items()):
            taken = min(room, count * room // max(1, attempts) + 1, count)
            room -= taken
            left -= taken
            _wait_again(due, second, wait, count - taken, dice)
        if not left:
            return second + 1, most
    return STORM_MOST, most


def _wait_again(due: dict[int, Counter[float]], second: int, wait: float, count: int, dice: random.Random) -> None:
    """Spread refused clients over the seconds in which their waits end."""
    least, most = second + wait * (1 - JITTER), second + wait * (1 + JITTER)
    slots = range(max(second + 1, int(least)), max(second + 2, int(most) + 1))
    share, rest = divmod(count, len(slots))
    following = min(wait * WAIT_FACTOR, MOST_WAIT)
    for slot in slots:
        if share:
            due.setdefault(slot, Counter())[following] += share
    for _ in range(rest):
        due.setdefault(dice.choice(slots), Counter())[following] += 1


def report(given: Inputs) -> None:
    print(f"bytes: USAGE {USAGE_BYTES}, ACK {ACK_BYTES}, BEACON {BEACON_BYTES}, a command {COMMAND_BYTES}")
    for external in (False, True):
        messages, size, most = days(given, external=external)
        rate = messages / 86_400
        print(
            f"one host, {'external' if external else 'its own'} broker: {messages:,.0f} messages a day (1 % have over "
            f"{most:,.0f}), {size / 1e6:.1f} MB, {rate:.2f} a second on average; "
            f"{_usage_share(given, external):.0%} are USAGE and its ACKs"
        )
    print()
    print("| hosts | one broker for | messages/s for each | ActiveMQ: cores | memory | RabbitMQ: cores | memory |")
    print("|---|---|---|---|---|---|---|")
    for hosts in (10_000, 1_000_000):
        for name, each in (("a host", 1), ("a site of 100", 100), ("10,000", 10_000), ("all", hosts)):
            if each > hosts or (name == "all" and hosts == 10_000):
                continue
            load = rate * each
            cells = [f"{hosts:,}", name, f"{load:,.1f}"]
            for speed, memory in (
                (given.activemq_requests_per_s, given.activemq_kb_per_client),
                (given.rabbitmq_requests_per_s, given.rabbitmq_kb_per_client),
            ):
                # Two messages in a request and its reply, on two cores that the clients shared.
                cells += [f"{load / speed:,.2f}", f"{2 * each * memory / 1e6:,.2f} GB"]
            print(f"| {' | '.join(cells)} |")
    print()
    for name, speed, memory in (
        ("ActiveMQ", given.activemq_requests_per_s, given.activemq_kb_per_client),
        ("RabbitMQ", given.rabbitmq_requests_per_s, given.rabbitmq_kb_per_client),
    ):
        by_messages = speed * 2 / rate
        by_memory = given.heap_gb * 1e6 / memory / 2
        first = "messages" if by_messages < by_memory else "memory"
        print(
            f"{name} on two cores: {by_messages:,.0f} hosts by its messages, {by_memory:,.0f} by {given.heap_gb:g} GB "
            f"of memory: {first} first"
        )
    print()
    print("| clients of a broker that restarts | all are back after | most attempts in a second |")
    print("|---|---|---|")
    for clients in (100, 1_000, 10_000, 100_000):
        seconds, attempts = storm(clients, given.joins_per_s)
        after = f"{seconds:,} s" if seconds < STORM_MOST else f"more than {STORM_MOST:,} s"
        print(f"| {clients:,} | {after} | {attempts:,} |")


def _usage_share(given: Inputs, external: bool) -> float:
    messages, _ = day_of(given.hours_per_day, given, external=external)
    usage = usages(3600 / given.tasks_per_hour, given.fractions_per_task)
    return 2 * given.hours_per_day * given.tasks_per_hour * usage / messages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="INPUT=NUMBER", help="see the class Inputs")
    parser.add_argument(
        "--measured", action="append", default=[], type=Path, metavar="FILE", help="inputs from a benchmark's --json"
    )
    options = parser.parse_args()
    changes: dict[str, float] = {}
    for file in options.measured:
        changes |= measured(file)
    for entry in options.set:
        name, _, value = entry.partition("=")
        if name not in attrs.fields_dict(Inputs):
            parser.error(f"there is no input {name}; there are {', '.join(attrs.fields_dict(Inputs))}")
        try:
            changes[name] = float(value)
        except ValueError:
            changes[name] = 0.0
        if not changes[name] > 0:
            parser.error(f"{entry}: an input is a number above 0")
    for name, number in changes.items():
        print(f"{name} = {number:g}")
    report(attrs.evolve(Inputs(), **changes))  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
