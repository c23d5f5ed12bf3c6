"""Messages between a long job and its project: what was done so far goes up, wishes come down (`docs/credit.md`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from .boinc.runtime import Runtime
from .state import StateFile

VARIETY = "cpu_time"  # of BOINC's wrapper
SHORTEST_PERIOD_S = 10.0

_PERIOD = re.compile(r"<trickle_period>\s*(\d{1,9}(?:\.\d{1,6})?)\s*</trickle_period>")
_END_EARLY = re.compile(r"<end_early\s*/>")


class Work(NamedTuple):
    """How much of a job is done, over all its starts."""

    run_time_s: float
    cpu_s: float
    fraction: float
    tasks_done: int


class Trickles:
    """Sends at the period, and follows the project."""

    def __init__(
        self,
        runtime: Runtime,
        state: StateFile,
        option_s: float,  # the period of the command line; 0: none
        fpops: float,  # the host's measured speed, operations a second; 0: not measured
        say: Callable[[str], None],
        sent_at_s: float = 0.0,  # run time at the last message
    ) -> None:
        self.runtime = runtime
        self.state = state
        self.option_s = option_s
        self.fpops = fpops
        self.say = say
        self.sent_at_s = sent_at_s

    @property
    def period_s(self) -> float:
        """Run time between two messages; 0: none are sent."""
        asked = self.state.state.trickle_s
        return self.option_s if asked is None else asked

    def tick(self, work: Work) -> None:
        """Send when it is time."""
        if self.period_s > 0 and work.run_time_s - self.sent_at_s >= self.period_s:
            self.send(work)

    def last(self, work: Work) -> None:
        """The job is done: what came after the last message counts too."""
        if self.period_s > 0 and work.run_time_s > self.sent_at_s:
            self.send(work)

    def send(self, work: Work) -> None:
        """One message. All but `runtime` are totals, so that a lost message costs nothing."""
        number = self.state.state.trickles + 1
        self.state.change(trickles=number)
        self.runtime.send_trickle_up(VARIETY, trickle_text(work, number, work.run_time_s - self.sent_at_s, self.fpops))
        self.sent_at_s = work.run_time_s

    def follow_project(self) -> None:
        """Act on what came from the project; each message once, also when we are killed in between."""
        for trickle in self.runtime.trickles_down():
            period, end = _PERIOD.search(trickle.text), _END_EARLY.search(trickle.text)
            if period is not None:
                seconds = float(period[1])
                seconds = max(SHORTEST_PERIOD_S, seconds) if seconds else 0.0
                self.state.change(trickle_s=seconds)
                self.say(f"the project wants a message every {seconds:g} s" if seconds else "the project wants none")
            if end is not None:
                self.state.change(end_early=True)
                self.say("the project wants the job to end now, with what it has")
            if period is None and end is None:
                self.say(f"a message of the project says nothing that is known here: {trickle.text[:200]!r}")
            self.runtime.trickle_done(trickle)


def trickle_text(work: Work, number: int, since_s: float, fpops: float) -> str:
    """What goes up. `cpu_time` is the run time, as BOINC's wrapper has it; `runtime` is for its `trickle_credit`."""
    return (
        f"<cpu_time>{work.run_time_s:f}</cpu_time>\n"
        f"<runtime>{since_s:f}</runtime>\n"
        "<vmwrapper>\n"
        f"    <number>{number}</number>\n"
        f"    <run_time_s>{work.run_time_s:f}</run_time_s>\n"
        f"    <cpu_s>{work.cpu_s:f}</cpu_s>\n"
        f"    <host_flops>{fpops:f}</host_flops>\n"
        f"    <operations>{work.cpu_s * fpops:f}</operations>\n"
        f"    <fraction_done>{work.fraction:f}</fraction_done>\n"
        f"    <tasks_done>{work.tasks_done}</tasks_done>\n"
        "</vmwrapper>\n"
    )
