"""The embedded broker keeps the contract, as a process of its own; and `vmctl broker` starts it."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.broker_load import latency_beside_a_flood
from tests.brokers import TESTER, TESTER_PASSCODE
from tests.contract.broker_contract import BrokerContract, BrokerUnderTest, logged_in
from tests.contract.broker_process import PROGRAM, running_broker

BODY_BYTES = 2 * 2**20


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerUnderTest]:
    folder = tmp_path_factory.mktemp("broker")
    with running_broker(folder, "--max-body-bytes", str(BODY_BYTES)) as running:
        yield BrokerUnderTest(running.host, running.port, running.login, running.passcode, BODY_BYTES)


class TestEmbeddedBroker(BrokerContract):
    """Every test of the contract."""

    @pytest.fixture
    def broker(self, embedded: BrokerUnderTest) -> BrokerUnderTest:
        return embedded


def test_a_flood_from_one_client_leaves_the_others_their_turn(tmp_path: Path) -> None:
    """The goal is below 3 times, and the benchmark measures it; here other work on the machine is allowed for."""
    with running_broker(tmp_path, login=TESTER, passcode=TESTER_PASSCODE) as running:
        alone, flooded = latency_beside_a_flood(running.port, rounds=3, requests=1000)
    assert flooded < 6 * alone


def start(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "broker", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_a_login_the_passcode_is_in_a_private_file_while_it_runs() -> None:
    with start("--listen", "127.0.0.1:0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+), login (\w+), passcode in (\S+)\n", line)
        assert found, line
        path = Path(found[3])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        passcode = path.read_text().strip()
        assert passcode not in line
        logged_in(BrokerUnderTest("127.0.0.1", int(found[1]), found[2], passcode, BODY_BYTES)).close()
        process.terminate()
        assert process.wait(60) == 0
        assert not path.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "0.0.0.0:0"], "needs a login"),
        (["--listen", "nowhere"], "not HOST:PORT"),
        (["--login", "anna"], "go together"),
        (["--login", "anna", "--passcode-file", "/nonexistent/file"], "cannot be read"),
        (["--max-connections", "0"], "connections"),
        (["--listen", "192.0.2.1:0", "--login", "anna", "--passcode-file", __file__], "cannot listen"),
    ],
)
def test_what_cannot_be_started_says_why(options: list[str], words: str) -> None:
    with start(*options) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert words in errors
    assert output == ""
