from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from twisted.internet.task import Clock

from common import messages
from common.broker_address import BrokerAddress, Credentials
from common.config import GuestConfig
from common.link import Link
from common.messages import Ack, Confirm, Envelope, Message, Welcome
from guest_agent.agent import GuestAgent


class Host:
    """The host's side of one guest agent, whose other parts do nothing."""

    def __init__(self) -> None:
        self.said: list[Envelope] = []
        self.acknowledged = 0
        self.confirmed: list[str] = []
        config = GuestConfig(
            guest="g-1", host="h-1", name="box", brokers=(BrokerAddress("127.0.0.1", 1),),
            credentials=Credentials("l", "p"), secret="s", files="http://127.0.0.1:1",
        )  # fmt: skip
        clock = Clock()
        self.agent = GuestAgent(clock, config, Path("/nowhere"))
        nothing: Any = SimpleNamespace(
            boot="boot", held=dict, new_session=lambda: None, every=lambda _: None, stop=lambda: None,
            run=None, signal=None, copy_in=None, copy_out=None, confirm=self.confirmed.append,
        )  # fmt: skip
        broker: Any = SimpleNamespace(send=lambda _, body: self.said.append(messages.decode(body)))
        self.link = Link(clock, "guest-session", self.agent.transmit, self.agent.deliver)
        self.agent.wire(broker, self.link, cast(Any, None), nothing, nothing, nothing)

    def tell(self, message: Message, seq: int = 0, ack: int = 0, session: str = "host-session") -> None:
        self.agent.broker_message("/queue/g", messages.encode(Envelope(message, session, "guest-session", seq, ack)))

    def welcome(self) -> None:
        self.agent.broker_connected()
        self.tell(Welcome("h-1", True, self.agent._epoch, 10.0, 0.0))

    def hears_of(self, command: str) -> None:
        def acknowledged() -> None:
            self.acknowledged += 1

        self.link.send(messages.Started(command, 1), acknowledged)


def test_what_was_on_its_way_before_a_restore_is_not_listened_to() -> None:
    host = Host()
    host.welcome()
    host.hears_of("c-1")
    # The memory is that of a moment before the host acknowledged and confirmed, which it has done since and undone.
    host.agent.broker_disconnected("restored")
    host.agent.broker_connected()
    host.tell(Ack(), ack=1)
    host.tell(Confirm(("c-1",)), seq=1, ack=1)
    assert host.acknowledged == 0
    assert host.confirmed == []


def test_what_still_counts_is_heard_after_the_welcome() -> None:
    host = Host()
    host.welcome()
    host.hears_of("c-1")
    host.agent.broker_disconnected("the network was away")
    host.welcome()
    host.tell(Confirm(("c-1",)), seq=1, ack=1)
    assert host.acknowledged == 1
    assert len(host.confirmed) == 2  # the runner's and the copier's
