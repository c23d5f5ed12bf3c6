"""Messages between a job and its project, and the credit handler of `docs/credit.md` on what we really send."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from host_agent.wrapper.boinc.runtime import Trickle
from host_agent.wrapper.boinc.standalone import StandaloneRuntime
from host_agent.wrapper.state import State, StateFile
from host_agent.wrapper.trickles import VARIETY, Trickles, Work, trickle_text

DOCS = Path(__file__).parents[3] / "docs" / "credit.md"


class Client(StandaloneRuntime):
    """Keeps what is sent, and has messages of the project."""

    def __init__(self, slot: Path) -> None:
        super().__init__(slot)
        self.sent: list[tuple[str, str]] = []

    def send_trickle_up(self, variety: str, text: str) -> None:
        self.sent.append((variety, text))


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def trickles(client: Client, said: list[str], tmp_path: Path) -> Trickles:
    return Trickles(client, StateFile(tmp_path), 100.0, 2e9, said.append)


def work(run_time_s: float) -> Work:
    return Work(run_time_s, run_time_s * 0.75, 0.5, 1)


def number(text: str, tag: str) -> float:
    match = re.search(f"<{tag}>(.*?)</{tag}>", text)
    assert match is not None
    return float(match[1])


def test_one_message_a_period(trickles: Trickles, client: Client) -> None:
    for second in range(351):
        trickles.tick(work(second))
    assert [variety for variety, _ in client.sent] == [VARIETY] * 3
    text = client.sent[-1][1]
    assert [number(text, tag) for tag in ("cpu_time", "runtime", "number")] == [300, 100, 3]
    assert [number(text, tag) for tag in ("run_time_s", "cpu_s", "host_flops")] == [300, 225, 2e9]
    assert number(text, "operations") == 225 * 2e9
    trickles.last(work(350))
    assert number(client.sent[-1][1], "runtime") == 50
    trickles.last(work(350))
    assert len(client.sent) == 4


def test_none_without_a_period(client: Client, tmp_path: Path) -> None:
    trickles = Trickles(client, StateFile(tmp_path), 0.0, 0.0, print)
    trickles.tick(work(1e6))
    trickles.last(work(1e6))
    assert client.sent == []


def test_the_project_changes_the_period(trickles: Trickles, client: Client, said: list[str], tmp_path: Path) -> None:
    down = tmp_path / "trickle_down_1_2"
    down.write_text("<trickle_period>30</trickle_period>")
    trickles.follow_project()
    assert not down.exists()
    trickles.tick(work(30))
    assert len(client.sent) == 1
    assert said == ["the project wants a message every 30 s"]
    again = Trickles(client, StateFile(tmp_path), 100.0, 0.0, print)  # after a restart
    assert again.period_s == 30
    down.write_text("<trickle_period>0.5</trickle_period>")
    trickles.follow_project()
    assert trickles.period_s == 10  # a mistake of the project must not flood its own server
    down.write_text("<trickle_period>0</trickle_period>")
    trickles.follow_project()
    assert trickles.period_s == 0


@pytest.mark.parametrize("text", ["<trickle_period>-5</trickle_period>", "<trickle_period>x</trickle_period>", "\0hi"])
def test_what_is_not_known_is_said_and_done_with(
    trickles: Trickles, said: list[str], tmp_path: Path, text: str
) -> None:
    (tmp_path / "trickle_down_1_2").write_text(text)
    trickles.follow_project()
    assert not (tmp_path / "trickle_down_1_2").exists()
    assert "says nothing that is known here" in said[0]
    assert trickles.period_s == 100


def test_a_wish_survives_a_kill_before_its_file_is_removed(
    trickles: Trickles, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trickle_down_1_2").write_text("<end_early/>")

    def killed(_trickle: Trickle) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "trickle_done", killed)
    with pytest.raises(KeyboardInterrupt):
        trickles.follow_project()
    assert StateFile(tmp_path).state == State(end_early=True)


# The handler in the docs


@pytest.fixture
def handler() -> Any:
    """The Python of docs/credit.md, as a project would take it."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "handler"}
    exec(compile(code, str(DOCS), "exec", dont_inherit=True), names)  # noqa: S102
    return names


Grant = Callable[..., float]


def sent(run_time_s: float, fpops: float = 2e9, cpu_s: float | None = None) -> str:
    done = work(run_time_s)
    return trickle_text(done if cpu_s is None else done._replace(cpu_s=cpu_s), 1, 100.0, fpops)


def test_credit_of_what_we_send(handler: Any) -> None:
    grant: Grant = handler["credit"]
    day = 86400.0
    # A cobblestone is 1/200 of a day at 1 GFLOPS.
    assert grant(sent(day, fpops=1e9, cpu_s=day), {}) == pytest.approx(200)
    assert grant(sent(day), {}) == pytest.approx(200 * 2 * 0.75)


def test_totals_make_lost_and_repeated_messages_harmless(handler: Any) -> None:
    grant: Grant = handler["credit"]
    ledger: dict[str, float] = {}
    first = grant(sent(1000), ledger)
    assert grant(sent(1000), ledger) == 0
    rest = grant(sent(5000), ledger)  # those at 2000, 3000 and 4000 were lost
    assert first + rest == pytest.approx(grant(sent(5000), {}))
    assert grant(sent(2000), ledger) == 0  # late


def test_a_volunteer_cannot_claim_more_than_the_machine_can_do(handler: Any) -> None:
    grant: Grant = handler["credit"]
    honest = grant(sent(1000, cpu_s=1000.0), {})
    assert grant(sent(1000, cpu_s=1e9), {}) == honest
    assert grant(sent(1000, fpops=1e30), {}) <= grant(sent(1000, fpops=handler["MOST_FLOPS"], cpu_s=1000.0), {})
    for text in ("", "<cpu_s>5</cpu_s>", sent(1000).replace("<cpu_s>750.000000", "<cpu_s>nan")):
        assert grant(text, {}) == 0


def test_wishes_of_the_project_in_the_docs_are_understood(trickles: Trickles, tmp_path: Path, handler: Any) -> None:
    for text in (handler["SLOWER"], handler["ENOUGH"]):
        (tmp_path / "trickle_down_1_2").write_text(text)
        trickles.follow_project()
    assert trickles.state.state.end_early
    assert trickles.period_s == 3600
