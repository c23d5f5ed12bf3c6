"""ActiveMQ and RabbitMQ, set up as `vmctl broker init` does it, keep the contract; with and without TLS."""

from __future__ import annotations

import pytest

from tests.brokers import TESTER, TESTER_PASSCODE, RunningBroker
from tests.conftest import BODY_BYTES
from tests.contract.broker_contract import BrokerContract, BrokerUnderTest

DIFFERENCES: dict[str, dict[str, bool]] = {
    "activemq": {},
    "rabbitmq": {"limits_unfinished_bodies": False, "closes_after_error": False},
}


class TestExternalBrokers(BrokerContract):
    """Every test of the contract, on each."""

    @pytest.fixture
    def broker(self, external: RunningBroker) -> BrokerUnderTest:
        plan = external.plan
        ca = plan.ca.read_text() if plan.tls else ""
        return BrokerUnderTest(
            plan.names[0], plan.port, TESTER, TESTER_PASSCODE, BODY_BYTES, ca=ca, **DIFFERENCES[plan.kind]
        )
