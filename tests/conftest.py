"""For all tests. The external brokers are started once for all that ask; who stops one uses a broker of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from host_agent.broker.setup.plan import Limits
from tests.brokers import RunningBroker

# A loaded machine is no reason to fail.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

BODY_BYTES = 2 * 2**20
HOSTS = ("host-a", "host-b")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for one test, as pytest's own but with a short name: the path of a socket may have 107 bytes."""
    return tmp_path_factory.mktemp("t")


def run(kind: str, factory: pytest.TempPathFactory, tls: bool) -> Iterator[RunningBroker]:
    limits = Limits(frame_bytes=BODY_BYTES)
    # One of RabbitMQ's tells of itself by its management plugin, the other one by its ctl.
    management = kind == "rabbitmq" and tls
    with RunningBroker.make(
        kind, factory.mktemp("broker"), tls=tls, hosts=HOSTS, guests=2, limits=limits, management=management
    ) as broker:
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
