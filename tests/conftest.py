"""The external brokers, each started once for all tests that ask for it; who stops one uses a broker of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from host_agent.broker.setup.plan import Limits
from tests.brokers import RunningBroker

# A loaded machine is no reason to fail.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

BODY_BYTES = 2 * 2**20
HOSTS = ("host-a", "host-b")


def run(kind: str, factory: pytest.TempPathFactory, tls: bool) -> Iterator[RunningBroker]:
    limits = Limits(frame_bytes=BODY_BYTES)
    with RunningBroker.make(kind, factory.mktemp("broker"), tls=tls, hosts=HOSTS, guests=2, limits=limits) as broker:
        yield broker


@pytest.fixture(scope="session")
def activemq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    yield from run("activemq", tmp_path_factory, tls=False)


@pytest.fixture(scope="session")
def activemq_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    yield from run("activemq", tmp_path_factory, tls=True)


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    yield from run("rabbitmq", tmp_path_factory, tls=False)


@pytest.fixture(scope="session")
def rabbitmq_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    yield from run("rabbitmq", tmp_path_factory, tls=True)


@pytest.fixture(scope="session", params=["activemq", "activemq_tls", "rabbitmq", "rabbitmq_tls"])
def external(request: pytest.FixtureRequest) -> RunningBroker:
    """Each of the external brokers in turn."""
    broker: RunningBroker = request.getfixturevalue(request.param)
    return broker
