"""A host agent whose guests are another hypervisor's than those that users choose from, in a process of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred

from host_agent.agent import HostAgent

reactor: Any = _reactor
BROKER_DEADLINE = 60.0


def serve(agent: HostAgent) -> None:
    """Run it until it is asked to end. Prints its endpoint as a host agent does."""

    def begin() -> None:
        started = Deferred.fromCoroutine(agent.start(BROKER_DEADLINE))
        started.addCallbacks(lambda endpoint: print(json.dumps(endpoint.to_json()), flush=True), failed)

    def failed(failure: Any) -> None:
        failure.printTraceback(sys.stderr)
        reactor.stop()

    reactor.callWhenRunning(begin)
    reactor.run()
