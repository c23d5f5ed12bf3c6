"""How soon a task's end is known: from RESULT's arrival at the host agent to the answer at its control interface.

The guest agent is a local process, so that no hypervisor counts. The arrival is when the bytes of RESULT reach the
host agent's broker port. The goal for `end_p50_ms` and `end_max_ms` is 50 ms. `roundtrip_ms` is the whole of a
`run` of /bin/true, `ratio_to_bare` what that is in units of a bare fork, exec and wait in the same run.
"""

from __future__ import annotations

import subprocess
import time
from statistics import median

from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

from host_agent.hypervisors.images import NO_IMAGE
from host_agent.hypervisors.process import ProcessHypervisor
from host_agent.virtual_machine import BROKER_PORT

from .host import Bench, Services, with_guest

COUNT = 200
PROGRAM = "/bin/true"

_arrived = [0.0]  # when bytes of a RESULT were last received


class _Stamped(ProtocolWrapper):
    def dataReceived(self, data: bytes) -> None:
        if b'"t":"RESULT"' in data:
            _arrived[0] = time.perf_counter()
        super().dataReceived(data)  # type: ignore[no-untyped-call]


def _stamp(services: Services) -> Services:
    factory = WrappingFactory(services[BROKER_PORT])
    factory.noisy = False
    factory.protocol = _Stamped
    return {**services, BROKER_PORT: factory}


def _measure(bench: Bench) -> dict[str, float]:
    latencies, roundtrips, bare = [], [], []
    for _ in range(COUNT):
        began = time.perf_counter()
        subprocess.run([PROGRAM], check=True)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        bench.client.call("run", {"vm": "bench", "argv": [PROGRAM]})
        ended = time.perf_counter()
        assert began < _arrived[0] < ended, "no RESULT was seen"
        latencies.append(ended - _arrived[0])
        roundtrips.append(ended - began)
    return {
        "end_p50_ms": median(latencies) * 1e3,
        "end_max_ms": max(latencies) * 1e3,
        "roundtrip_ms": median(roundtrips) * 1e3,
        "bare_ms": median(bare) * 1e3,
        "ratio_to_bare": median(roundtrips) / median(bare),
    }


def run() -> dict[str, float]:
    """Measure; a few seconds."""
    return with_guest(ProcessHypervisor, NO_IMAGE, _measure, services=_stamp)[0]
