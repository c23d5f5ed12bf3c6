"""What is wrong, in words, and what to do about it. Every rule of the monitor's red and amber stands here."""

from __future__ import annotations

from typing import Any

import attrs

from .table import Row

RED, AMBER = "red", "amber"

STARTING_LONG = 180.0  # seconds
NOT_STARTED_LONG = 15.0  # from asking for a command until it runs
SLOW_AT_LEAST = 60.0
SLOW_TIMES = 3.0  # the median run time of the same program
STALLED = 30.0  # seconds without a byte of a copy
RECENT = 600.0  # seconds for which a failure is news
DEEP_QUEUE = 1000
FULL_MEMORY = 0.8
CLOCK_OFF = 60.0  # seconds


@attrs.frozen
class Trouble:
    """`level` is RED or AMBER; `what` says it in a sentence; `todo` is the next step."""

    level: str
    what: str
    todo: str


def of_guest(row: Row, now: float) -> Trouble | None:
    name, state, agent, on = row["vm"], row["state"], row["agent"], _where(row)
    if row["reason"] or state == "crashed":
        reason = row["reason"] or f"The VM {name} ended unexpectedly"
        todo = f"{on}vmctl stop {name} removes it; the end of its console is in its host agent's log"
        return Trouble(RED, reason, todo)
    if state == "stopped":
        return Trouble(RED, f"The VM {name} has ended", f"{on}vmctl stop {name} removes it")
    if agent == "silent" and row.get("because"):
        return Trouble(AMBER, f"{name} is not heard, as {row['because']}", f"see the host {row['host']}")
    if agent == "silent" and state == "running":
        heard = "" if row["seen"] is None else f"; it was last heard {now - row['seen']:.0f} s ago"
        work = f", with {row['commands']} running in it" if row["commands"] else ""
        todo = f"{on}vmctl ping {name}; if it stays silent, vmctl stop {name}"
        return Trouble(RED, f"The agent in {name} is silent{work}{heard}", todo)
    if agent == "gone" and state == "running":
        return Trouble(RED, f"The agent in {name} has ended", f"{on}look at the VM's console; vmctl stop {name}")
    if agent == "waiting" and state in ("starting", "running") and now - row["since"] > STARTING_LONG:
        return Trouble(
            AMBER, f"{name} has been starting for {now - row['since']:.0f} s", f"{on}vmctl doctor looks for the cause"
        )
    # Of one that is heard through a broker, its host agent says whether it is silent; and we may be deaf.
    heard_long_ago = row["seen"] is not None and now - row["seen"] > 60 and not row["via"]
    if heard_long_ago and agent == "present" and state == "running":
        return Trouble(AMBER, f"{name} was last heard {now - row['seen']:.0f} s ago", f"vmctl ping {name}")
    return None


def _where(row: Row) -> str:
    """For a next step that can be taken on one machine only."""
    return f"on {row['host']}: " if row.get("via") else ""


def of_command(row: Row, now: float, usual_s: float | None) -> Trouble | None:
    name, on = f"{row['program']} in {row['vm']}", _where(row)
    trace = f"{on}vmctl trace {row['command']}"
    if row["state"] == "ended":
        if row["outcome"] == "exited" and not row["exit_code"]:
            return None
        how = {
            "exited": f"ended with exit code {row['exit_code']}",
            "signalled": f"was ended by signal {row['signal']}",
            "deadline": "was killed: its deadline had passed",
            "not_started": f"could not be started: {row['reason']}",
            "lost": f"is lost: {row['reason']}",
        }.get(row["outcome"], f"ended as {row['outcome']}")
        recent = row["ended"] is None or now - row["ended"] < RECENT
        return Trouble(RED if recent else AMBER, f"{name} {how}", trace)
    if row["state"] == "asked":
        waited = now - (row["asked"] or now)
        if waited > NOT_STARTED_LONG:
            return Trouble(
                RED,
                f"{name} was asked for {waited:.0f} s ago and has not started",
                f"{on}vmctl ping {row['vm']}; vmctl trace {row['command']}",
            )
        return None
    ran = now - (row["started"] or row["asked"] or now)
    if row["deadline"] and ran > 0.8 * row["deadline"]:
        return Trouble(AMBER, f"{name} has run {ran:.0f} s of at most {row['deadline']:.0f} s", trace)
    if usual_s is not None and ran > max(SLOW_AT_LEAST, SLOW_TIMES * usual_s):
        return Trouble(AMBER, f"{name} is slow: {ran:.0f} s, usually {usual_s:.0f} s", trace)
    return None


def of_copy(row: Row, now: float) -> Trouble | None:
    name = f"The copy {row['direction']} of {row['path']} ({row['vm']})"
    if row["failed"]:
        return Trouble(RED, f"{name} failed: {row['reason']}", f"{_where(row)}vmctl trace {row['copy']}")
    if row["ended"] is None and now - row["moved"] > STALLED:
        return Trouble(
            AMBER, f"{name} has not moved for {now - row['moved']:.0f} s", f"{_where(row)}vmctl ping {row['vm']}"
        )
    return None


def of_checkpoint(row: Row) -> Trouble | None:
    if not row["failed"]:
        return None
    return Trouble(RED, f"{row['action']} of {row['vm']} failed: {row['reason']}", "free disk space? vmctl doctor")


def of_host(row: Row) -> Trouble | None:
    if row["problem"]:
        todo = row["remedy"] or "see the end of the host agent's log; start it again"
        return Trouble(RED, f"{row['host']}: {row['problem']}", todo)
    if row["clock_off_s"]:
        how = "behind" if row["clock_off_s"] > 0 else "ahead"
        what = f"The clock of {row['host']} is {abs(row['clock_off_s'])} s {how}"
        return Trouble(AMBER, what, "set it (NTP): its logs and those of others do not fit together")
    return None


def why_silent(seconds: float, guests_alive: int, readers: int | None) -> tuple[str, str]:
    """What is the matter with a host agent that its broker hears no more, and what to do. `readers`: how many
    connections read its queue, as the broker counts them; None: unknown. Guests in closed networks reach the broker
    through their host agent, so that they fall silent with it."""
    since = f"silent for {seconds:.0f} s" if seconds < 600 else f"silent for {seconds / 60:.0f} min"
    again = "on that machine: the end of the host agent's log; start it again with its --state"
    if guests_alive:
        guests = "1 guest of it is" if guests_alive == 1 else f"{guests_alive} guests of it are"
        return f"{since}; {guests} still heard, so its machine is up, and it hangs or was killed", again
    if readers:
        return f"{since}, though its connection to the broker is there: it hangs", again
    gone = "" if readers is None else ", and the broker has no connection of it"
    return (
        f"{since}{gone}: it was killed, or its machine or the network is down",
        f"is the machine up, and does it reach the broker (vmctl broker check)? {again}",
    )


def of_broker(row: Row) -> Trouble | None:
    name = f"{row['kind']} {row['name']}"
    if row["problem"]:
        return Trouble(RED, f"The broker {name} cannot be asked: {row['problem']}", "is it running? vmctl broker check")
    if row.get("deaf"):
        todo = "is it running, and the login right? A broker that an older vmctl broker init set up lacks the topics"
        return Trouble(RED, f"Nobody is heard through the broker {name}: it {row['deaf']}", todo)
    used, limit = row["memory_bytes"], row["memory_limit_bytes"]
    if used is not None and limit and used > FULL_MEMORY * limit:
        return Trouble(
            RED,
            f"The broker {name} uses {100 * used // limit} % of its memory",
            "which queue is deep, and who reads it?",
        )
    for queue in row["queues"]:
        depth = queue["messages"]
        if depth and depth > DEEP_QUEUE:
            todo = "its reader is gone" if queue["consumers"] == 0 else "its reader is slow or stuck"
            return Trouble(
                AMBER, f"{queue['name']} holds {depth} messages", f"{todo}: find the guest or host it is for"
            )
    if row["dead_letters"]:
        return Trouble(
            AMBER, f"The broker {name} has {row['dead_letters']} dead letters", "agents and broker may not fit together"
        )
    return None


def mark(row: Row, trouble: Trouble | None) -> Row:
    """The row with its trouble in it."""
    values: dict[str, Any] = (
        {"level": "", "what": "", "todo": ""}
        if trouble is None
        else {"level": trouble.level, "what": trouble.what, "todo": trouble.todo}
    )
    return {**row, **values}
