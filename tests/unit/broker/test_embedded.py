"""The embedded broker, with clients in memory and a clock that the tests move."""

from __future__ import annotations

import pytest

from host_agent.broker.limits import BrokerLimits, FrameLimits
from host_agent.broker.principals import Principal
from host_agent.broker.statistics import DestinationStatistics
from tests.unit.broker.harness import Client, Harness

QUEUE = "/queue/vmwrapper.guest.1"
TOPIC = "/topic/presence"
SMALL = BrokerLimits(
    queue_messages=3,
    topic_backlog_messages=3,
    connections=3,
    subscriptions_per_connection=2,
    destinations=4,
    refusals=3,
    prefetch=2,
    prefetch_most=5,
    frames_per_turn=4,
    answer_bytes=100,
    frames=FrameLimits(body_bytes=1000),
)


def depth(harness: Harness, destination: str = QUEUE) -> DestinationStatistics | None:
    found = [one for one in harness.broker.statistics().destinations if one.destination == destination]
    return found[0] if found else None


def acks(client: Client) -> list[str]:
    return [frame.headers["ack"] for frame in client.received()]


# Logging in


def test_connected_names_version_and_server() -> None:
    client = Harness().connect()
    client.send("STOMP", accept_version="1.0,1.1,1.2", host="/", login="anna", passcode="right")
    [frame] = client.received()
    assert frame.command == "CONNECTED"
    assert frame.headers["version"] == "1.2"
    assert frame.headers["server"].startswith("vmwrapper/")


@pytest.mark.parametrize("headers", [{}, {"accept_version": "1.0"}, {"accept_version": "2.0"}])
def test_other_versions_are_refused_with_the_ones_we_speak(headers: dict[str, str]) -> None:
    client = Harness().connect()
    client.send("CONNECT", login="anna", passcode="right", **headers)
    assert "1.2 and 1.1" in client.error()


def test_wrong_passcode_and_frames_before_login() -> None:
    harness = Harness()
    client = harness.connect()
    client.send("CONNECT", accept_version="1.2", login="anna", passcode="wrong")
    sentence = client.error()
    assert "login" in sentence
    assert "wrong passcode" not in sentence
    client = harness.connect()
    client.publish(QUEUE, b"x")
    assert "CONNECT" in client.error()
    assert depth(harness) is None


def test_a_factory_for_one_principal_lets_no_other_in() -> None:
    harness = Harness()
    client = harness.connect(only="vm1")
    client.send("CONNECT", accept_version="1.2", login="vm2", passcode="right")
    assert "may not be used from here" in client.error()
    harness.connect(only="vm1").login("vm1")


def test_rules_of_a_principal() -> None:
    vm1 = Principal.with_rules("vm1", send=["/queue/host", "/topic/presence.*"], subscribe=[QUEUE])
    harness = Harness(authenticate=lambda login, passcode: vm1)
    client = harness.client().subscribe(QUEUE)
    client.publish("/queue/host", b"1")
    client.publish("/topic/presence.vm1", b"2")
    assert not client.closed
    client.publish(QUEUE, b"3")
    assert "may not send to" in client.error()
    client = harness.client().subscribe("/queue/vmwrapper.guest.10")
    assert "may not subscribe to" in client.error()


def test_login_in_time() -> None:
    harness = Harness()
    client = harness.connect()
    harness.advance(10.1)
    assert "No login" in client.error()


def test_body_before_login_is_kept_small() -> None:
    client = Harness().connect()
    client.send_bytes(b"CONNECT\naccept-version:1.2\ncontent-length:2000\n\n")
    assert "1024 bytes" in client.error()


def test_connections_are_limited() -> None:
    harness = Harness(SMALL)
    clients = [harness.client() for _ in range(3)]
    assert "3 connections" in harness.connect().error()
    clients[0].drop()


# Queues


def test_stored_until_somebody_subscribes_and_in_order() -> None:
    harness = Harness()
    sender = harness.client()
    sender.publish(QUEUE, b"1", b"2", b"3")
    assert harness.client().subscribe(QUEUE).bodies() == [b"1", b"2", b"3"]


def test_headers_travel_and_the_brokers_own_do_not() -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE, number="s:1")
    client.publish(QUEUE, b"x", kind="a:b\\c\nd", receipt="r", redelivered="true", message_id="mine")
    message, receipt = client.received()
    assert message.headers["kind"] == "a:b\\c\nd"
    assert message.headers["destination"] == QUEUE
    assert message.headers["subscription"] == "s:1"
    assert message.headers["message-id"] != "mine"
    assert "redelivered" not in message.headers
    assert "receipt" not in message.headers
    assert receipt.headers == {"receipt-id": "r"}


def test_round_robin() -> None:
    harness = Harness()
    consumers = [harness.client().subscribe(QUEUE) for _ in range(3)]
    harness.client().publish(QUEUE, *[b"%d" % number for number in range(6)])
    assert [consumer.bodies() for consumer in consumers] == [[b"0", b"3"], [b"1", b"4"], [b"2", b"5"]]


@pytest.mark.parametrize("header", ["prefetch_count", "activemq.prefetchSize"])
def test_prefetch_is_what_may_be_unacknowledged(header: str) -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE, "client-individual", **{header: "2"})
    client.publish(QUEUE, b"1", b"2", b"3")
    first, second = client.received()
    assert (first.body, second.body) == (b"1", b"2")
    client.send("ACK", id=second.headers["ack"])
    assert client.bodies() == [b"3"]
    found = depth(harness)
    assert found is not None
    assert (found.messages, found.dequeued) == (2, 1)


def test_client_mode_acknowledges_all_before() -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE, "client")
    client.publish(QUEUE, b"1", b"2", b"3")
    client.send("ACK", id=acks(client)[1])
    client.drop()
    assert harness.client().subscribe(QUEUE).bodies() == [b"3"]


def test_unacknowledged_messages_come_back_at_the_front_in_order() -> None:
    harness = Harness()
    first = harness.client().subscribe(QUEUE, "client-individual", prefetch_count="2")
    second = harness.client().subscribe(QUEUE, "client-individual", prefetch_count="2")
    sender = harness.client()
    sender.publish(QUEUE, *[b"%d" % number for number in range(7)])
    second.send("ACK", id=acks(second)[0])
    assert second.bodies() == [b"4"]
    second.drop()
    first.drop()
    frames = harness.client().subscribe(QUEUE).received()
    assert [frame.body for frame in frames] == [b"0", b"2", b"3", b"4", b"5", b"6"]
    redelivered = [frame.headers.get("redelivered") for frame in frames]
    assert redelivered == ["true"] * 4 + [None] * 2


def test_two_subscriptions_of_one_lost_client_do_not_feed_each_other() -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE, "client", prefetch_count="1")
    client.subscribe(QUEUE, "client", "2", prefetch_count="5")
    client.publish(QUEUE, b"1", b"2")
    client.drop()
    frames = harness.client().subscribe(QUEUE).received()
    assert [frame.body for frame in frames] == [b"1", b"2"]
    assert [frame.headers["redelivery-count"] for frame in frames] == ["1", "1"]


def test_unsubscribe_gives_back_and_a_late_ack_is_no_error() -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE, "client")
    client.publish(QUEUE, b"1")
    [ack] = acks(client)
    client.send("UNSUBSCRIBE", id="1", receipt="u")
    assert client.received()[0].headers == {"receipt-id": "u"}
    client.send("ACK", id=ack, receipt="a")
    assert client.received()[0].headers == {"receipt-id": "a"}
    assert harness.client().subscribe(QUEUE).bodies() == [b"1"]


def test_refused_messages_come_back_and_then_go_to_the_dead_letters() -> None:
    harness = Harness(SMALL)
    client = harness.client().subscribe(QUEUE, "client-individual")
    client.publish(QUEUE, b"poison", kind="k")
    for count in (None, "1", "2"):
        [frame] = client.received()
        assert frame.headers.get("redelivery-count") == count
        client.send("NACK", id=frame.headers["ack"])
    assert client.received() == []
    [dead] = harness.client().subscribe("/queue/dead-letter").received()
    assert dead.body == b"poison"
    assert dead.headers["destination"] == "/queue/dead-letter"
    assert dead.headers["original-destination"] == QUEUE
    assert dead.headers["kind"] == "k"
    assert harness.broker.statistics().dead_lettered == 1


def test_losing_the_consumer_again_and_again_never_makes_a_dead_letter() -> None:
    harness = Harness(SMALL)
    harness.client().publish(QUEUE, b"command")
    for _ in range(10):
        client = harness.client().subscribe(QUEUE, "client")
        assert client.bodies() == [b"command"]
        client.drop()
    assert harness.broker.statistics().dead_lettered == 0


def test_queues_are_removed_when_empty_and_unused() -> None:
    harness = Harness(SMALL)
    for number in range(20):
        client = harness.client()
        client.publish(f"/queue/{number}", b"x")
        assert client.subscribe(f"/queue/{number}").bodies() == [b"x"]
        client.drop()
    assert harness.broker.statistics().destinations == ()


def test_destinations_are_limited() -> None:
    client = Harness(SMALL).client()
    for number in range(5):
        client.publish(f"/queue/{number}", b"x")
    assert "4 destinations" in client.error()


@pytest.mark.parametrize(
    "name", ["/queue/", "/temp-queue/a", "plain", "/queue/a*", "/queue/>", "/queue/a b", "/topic/\n"]
)
def test_names_that_are_no_destinations(name: str) -> None:
    harness = Harness()
    client = harness.client()
    client.publish(name, b"x")
    assert "/queue/NAME" in client.error()
    assert "/queue/NAME" in harness.client().subscribe(name).error()


# Expiry


def test_expired_messages_are_dropped_at_every_place() -> None:
    harness = Harness()
    client = harness.client()
    soon = str(int((harness.now + 5) * 1000))
    client.publish(QUEUE, b"late", expires=str(int(harness.now * 1000) - 1))
    client.publish(QUEUE, b"a", b"b", expires=soon)
    client.publish(QUEUE, b"stays", expires="0")
    harness.now += 6
    assert harness.client().subscribe(QUEUE).bodies() == [b"stays"]
    assert harness.broker.statistics().expired == 3


def test_expired_messages_leave_without_a_consumer() -> None:
    harness = Harness()
    harness.client().publish(QUEUE, b"a", b"b", expires=str(int((harness.now + 5) * 1000)))
    harness.now += 6
    harness.advance(2.1)
    statistics = harness.broker.statistics()
    assert (statistics.messages, statistics.bytes, statistics.expired) == (0, 0, 2)
    assert statistics.destinations == ()


def test_expires_must_be_a_number() -> None:
    client = Harness().client()
    client.publish(QUEUE, b"x", expires="tomorrow")
    assert "expires" in client.error()


# Topics


def test_topic_reaches_all_present_subscribers() -> None:
    harness = Harness()
    sender = harness.client()
    sender.publish(TOPIC, b"before")
    subscribers = [harness.client().subscribe(TOPIC) for _ in range(3)]
    sender.publish(TOPIC, b"now")
    assert [subscriber.bodies() for subscriber in subscribers] == [[b"now"]] * 3
    assert harness.broker.statistics().messages == 0


def test_a_slow_subscriber_loses_the_oldest_and_nobody_else_does() -> None:
    harness = Harness(SMALL)
    slow = harness.client().subscribe(TOPIC)
    fast = harness.client().subscribe(TOPIC)
    slow.transport.full()
    bodies = [b"%d" % number for number in range(10)]
    harness.client().publish(TOPIC, *bodies)
    assert fast.bodies() == bodies
    found = depth(harness, TOPIC)
    assert found is not None
    assert (found.messages, found.dropped, found.consumers) == (3, 7, 2)
    slow.transport.drain()
    assert slow.bodies() == [b"7", b"8", b"9"]


def test_acknowledging_a_topic_only_paces_it() -> None:
    harness = Harness(SMALL)
    client = harness.client().subscribe(TOPIC, "client-individual", prefetch_count="1")
    client.publish(TOPIC, b"1", b"2")
    [frame] = client.received()
    client.send("NACK", id=frame.headers["ack"])
    [frame] = client.received()
    assert frame.body == b"2"
    client.drop()
    statistics = harness.broker.statistics()
    assert (statistics.messages, statistics.bytes, statistics.destinations) == (0, 0, ())


# Back-pressure


def test_a_client_that_does_not_read_leaves_its_messages_in_the_queue() -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE)
    client.transport.full()
    other = harness.client()
    other.publish(QUEUE, b"1", b"2")
    assert client.received() == []
    other.subscribe(QUEUE)
    assert other.bodies() == [b"1", b"2"]
    other.publish(QUEUE, b"3")
    client.transport.drain()
    assert (client.bodies(), other.bodies()) == ([], [b"3"])


def test_a_sender_to_a_full_queue_waits_and_goes_on_in_order() -> None:
    harness = Harness(SMALL)
    sender = harness.client()
    sender.publish(QUEUE, b"1", b"2", b"3", b"4", receipt="r")
    assert len(sender.received()) == 3
    assert not sender.transport.reading
    sender.publish(QUEUE, b"5")
    consumer = harness.client().subscribe(QUEUE, "client-individual", prefetch_count="1")
    for expected in (b"1", b"2", b"3", b"4", b"5"):
        [frame] = consumer.received()
        assert frame.body == expected
        consumer.send("ACK", id=frame.headers["ack"])
    assert sender.transport.reading
    assert len(sender.received()) == 1
    assert harness.broker.statistics().senders_held_back >= 1


def test_a_queue_that_stays_full_ends_the_sender_with_its_name() -> None:
    harness = Harness(SMALL)
    sender = harness.client(heart_beat="1000,0")
    sender.publish(QUEUE, b"1", b"2", b"3", b"4")
    harness.advance(9.9)
    assert not sender.closed
    harness.advance(0.2)
    assert QUEUE in sender.error()
    found = depth(harness)
    assert found is not None
    assert found.messages == 3


def test_senders_to_other_queues_are_not_held_back() -> None:
    harness = Harness(SMALL)
    harness.client().publish(QUEUE, b"1", b"2", b"3", b"4")
    client = harness.client().subscribe("/queue/other")
    client.publish("/queue/other", b"x")
    assert client.bodies() == [b"x"]


def test_a_mailbox_drops_its_oldest_and_never_holds_a_sender_back() -> None:
    """One dead guest must not stall the others: the host sends to all through one connection."""
    limits = BrokerLimits(mailbox_prefix="/queue/dead", mailbox_messages=3)
    harness = Harness(limits)
    sender = harness.client()
    alive = harness.client().subscribe("/queue/alive")
    for number in range(50):
        sender.publish("/queue/dead.1", b"%d" % number, receipt="r")
        sender.publish("/queue/alive", b"%d" % number)
        assert sender.transport.reading
        assert alive.bodies() == [b"%d" % number]
    assert len(sender.received()) == 50
    late = harness.client().subscribe("/queue/dead.1")
    assert late.bodies() == [b"47", b"48", b"49"]
    assert harness.broker.statistics().dropped == 47


def test_a_reader_that_does_not_read_its_mailbox_holds_nobody_back() -> None:
    """As a VM that is paused: its connection is open, and nothing is taken from it."""
    harness = Harness(BrokerLimits(mailbox_prefix="/queue/dead", mailbox_bytes=20_000))
    paused = harness.client().subscribe("/queue/dead.1")
    paused.received()
    paused.transport.full()
    sender = harness.client()
    for _ in range(200):
        sender.publish("/queue/dead.1", b"x" * 1000)
    assert sender.transport.reading
    assert harness.broker.statistics().bytes <= 20_000
    harness.advance(60)
    assert not sender.closed


def test_messages_wait_no_longer_than_the_broker_lets_them() -> None:
    harness = Harness(BrokerLimits(message_seconds=60))
    sender = harness.client()
    sender.publish(QUEUE, b"long", expires=str(int((harness.now + 3600) * 1000)))
    sender.publish(QUEUE, b"short", expires=str(int((harness.now + 10) * 1000)))
    sender.publish(QUEUE, b"none")
    harness.now += 30
    harness.advance(3)
    found = depth(harness)
    assert found is not None and (found.messages, found.expired) == (2, 1)
    harness.now += 31
    harness.advance(3)
    assert depth(harness) is None
    assert harness.client().subscribe(QUEUE).bodies() == []


@pytest.mark.parametrize("start", [b"SEND\ndestination:/queue/a\n", b"SEND\ndestination:/queue/a\n\nbody", b"S"])
def test_a_frame_that_comes_byte_by_byte_ends_its_connection(start: bytes) -> None:
    harness = Harness(BrokerLimits(frame_seconds=30))
    slow, other = harness.client(), harness.client().subscribe(QUEUE)
    slow.send_bytes(start)
    for _ in range(14):
        harness.advance(2)
        slow.send_bytes(b"x")
        assert not slow.closed
    for _ in range(3):
        harness.advance(2)
    assert "not come whole within 30 seconds" in slow.error()
    other.publish(QUEUE, b"served")
    assert other.bodies() == [b"served"]


def test_a_client_that_always_ends_in_the_middle_of_a_frame_is_not_slow() -> None:
    harness = Harness(BrokerLimits(frame_seconds=30))
    client = harness.client()
    frame = b"SEND\ndestination:/queue/a\n\nbody\0"
    client.send_bytes(frame[:10])
    for _ in range(40):
        harness.advance(2)
        client.send_bytes(frame[10:] + frame[:10])
    assert not client.closed


def test_time_in_which_the_broker_does_not_read_is_not_the_clients() -> None:
    harness = Harness(BrokerLimits(frame_seconds=5, queue_messages=1))
    client = harness.client()
    client.publish(QUEUE, b"1")
    client.send_bytes(b"SEND\ndestination:%b\n\n2\0SEND\ndesti" % QUEUE.encode())
    assert not client.transport.reading
    harness.advance(8)
    assert not client.closed
    consumer = harness.client().subscribe(QUEUE)
    assert consumer.bodies() == [b"1", b"2"]
    harness.advance(4)
    client.send_bytes(b"nation:%b\n\n3\0" % QUEUE.encode())
    assert consumer.bodies() == [b"3"]


def test_all_queues_together_are_limited() -> None:
    harness = Harness(BrokerLimits(stored_bytes=2_000))
    sender = harness.client()
    sender.publish("/queue/a", b"x" * 800)
    sender.publish("/queue/b", b"y" * 800)
    assert not sender.transport.reading
    assert harness.client().subscribe("/queue/a").bodies() == [b"x" * 800]
    assert sender.transport.reading
    assert harness.client().subscribe("/queue/b").bodies() == [b"y" * 800]


def test_unread_receipts_stop_the_reading() -> None:
    harness = Harness(SMALL)
    client = harness.client()
    client.transport.full()
    for _ in range(20):
        client.publish(TOPIC, b"x", receipt="a receipt of some length")
    assert not client.transport.reading
    held = len(client.received())
    assert held < 6
    while client.transport.producerState == "paused":
        client.transport.drain()
        harness.advance(0)
    assert held + len(client.received()) == 20


def test_one_client_gets_a_bounded_turn() -> None:
    harness = Harness(SMALL)
    flood = harness.client()
    frame = b"SEND\ndestination:/topic/t\n\nx\0"
    flood.connection.dataReceived(frame * 11)
    assert not flood.transport.reading
    watcher = harness.client().subscribe("/topic/t")
    assert len(watcher.bodies()) <= 7
    assert flood.transport.reading


def test_frames_in_pieces_are_waited_for_without_work() -> None:
    harness = Harness(SMALL)
    client = harness.client().subscribe(QUEUE)
    frames = b"SEND\ndestination:/queue/vmwrapper.guest.1\n\nbody\0" * 6
    for place in range(len(frames)):
        client.send_bytes(frames[place : place + 1])
        assert client.transport.reading
    assert client.bodies() == [b"body"] * 6


# Heart-beats


def test_heart_beats_are_sent_in_silence() -> None:
    harness = Harness()
    client = harness.client(heart_beat="0,1000")
    client.transport.clear()
    for _ in range(10):
        harness.advance(0.5)
    assert 4 <= client.transport.value().count(b"\n") <= 10
    assert set(client.transport.value()) == {10}


def test_a_silent_client_is_given_up_and_a_beating_one_is_not() -> None:
    harness = Harness()
    silent = harness.client(heart_beat="1000,0").subscribe(QUEUE, "client")
    beating = harness.client(heart_beat="1000,0")
    silent.publish(QUEUE, b"x")
    silent.received()
    for _ in range(8):
        harness.advance(0.5)
        beating.send_bytes(b"\n")
    assert "heart-beat" in silent.error()
    assert not beating.closed
    assert beating.subscribe(QUEUE).bodies() == [b"x"]


def test_a_machine_that_slept_gives_its_clients_a_moment() -> None:
    harness = Harness()
    client = harness.client(heart_beat="1000,0")
    harness.advance(600)
    client.send_bytes(b"\n")
    harness.advance(1)
    assert not client.closed


def test_heart_beats_are_not_expected_while_we_do_not_read() -> None:
    harness = Harness(SMALL)
    sender = harness.client(heart_beat="1000,0")
    sender.publish(QUEUE, b"1", b"2", b"3", b"4")
    for _ in range(19):
        harness.advance(0.5)
    assert not sender.closed


@pytest.mark.parametrize("header", ["x,y", "-1,0", "5", ""])
def test_heart_beat_headers_that_are_none(header: str) -> None:
    client = Harness().connect()
    client.send("CONNECT", accept_version="1.2", login="a", passcode="right", heart_beat=header)
    assert "heart-beat" in client.error()


# What is refused, and leaving


@pytest.mark.parametrize(
    ("command", "headers", "words"),
    [
        ("BEGIN", {"transaction": "1"}, "no transactions"),
        ("COMMIT", {"transaction": "1"}, "no transactions"),
        ("SEND", {"transaction": "1", "destination": QUEUE}, "no transactions"),
        ("SEND", {}, "no destination header"),
        ("SUBSCRIBE", {"destination": QUEUE}, "no id header"),
        ("SUBSCRIBE", {"destination": QUEUE, "id": "1", "ack": "never"}, "client-individual"),
        ("SUBSCRIBE", {"destination": QUEUE, "id": "1", "selector": "a=1"}, "selectors"),
        ("SUBSCRIBE", {"destination": QUEUE, "id": "1", "prefetch-count": "many"}, "prefetch"),
        ("UNSUBSCRIBE", {"id": "9"}, "no subscription"),
        ("ACK", {"id": "1-1"}, "not delivered here"),
        ("ACK", {"message-id": "1-1"}, "no id header"),
        ("CONNECT", {"accept-version": "1.2"}, "knows no 'CONNECT'"),
        ("DANCE", {}, "knows no 'DANCE'"),
    ],
)
def test_refusals_are_sentences_and_name_the_receipt(command: str, headers: dict[str, str], words: str) -> None:
    client = Harness().client()
    client.send(command, **headers, receipt="7")
    frame = client.received()[-1]
    assert frame.command == "ERROR"
    assert words in frame.headers["message"]
    assert frame.body.decode() == frame.headers["message"]
    if command != "CONNECT":
        assert frame.headers["receipt-id"] == "7"
    assert client.closed


def test_acknowledging_twice_is_an_error() -> None:
    client = Harness().client().subscribe(QUEUE, "client")
    client.publish(QUEUE, b"x")
    [ack] = acks(client)
    client.send("ACK", id=ack)
    client.send("ACK", id=ack)
    assert "not waiting" in client.error()


def test_subscriptions_are_limited_and_ids_are_unique() -> None:
    harness = Harness(SMALL)
    client = harness.client().subscribe(QUEUE)
    client.subscribe(QUEUE)
    assert "already" in client.error()
    client = harness.client().subscribe(QUEUE).subscribe(QUEUE, number="2").subscribe(QUEUE, number="3")
    assert "at most 2" in client.error()


def test_nothing_is_handled_after_an_error() -> None:
    harness = Harness()
    client = harness.client()
    client.send_bytes(b"DANCE\n\n\0SEND\ndestination:/queue/a\n\nx\0")
    client.send_bytes(b"SEND\ndestination:/queue/a\n\nx\0")
    assert harness.broker.statistics().destinations == ()


def test_disconnect_answers_its_receipt_and_gives_back() -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE, "client")
    client.publish(QUEUE, b"x")
    client.received()
    client.send("DISCONNECT", receipt="bye")
    [frame] = client.received()
    assert (frame.command, frame.headers) == ("RECEIPT", {"receipt-id": "bye"})
    assert client.closed
    assert harness.client().subscribe(QUEUE).bodies() == [b"x"]


def test_a_client_that_does_not_let_go_is_cut_off() -> None:
    harness = Harness()
    client = harness.client()
    client.send("DISCONNECT")
    assert not client.transport.aborted
    harness.advance(2.1)
    assert client.transport.aborted


def test_version_1_1_acknowledges_by_message_id() -> None:
    harness = Harness()
    client = harness.connect()
    client.send("CONNECT", accept_version="1.0,1.1", login="a", passcode="right")
    assert client.received()[0].headers["version"] == "1.1"
    client.subscribe(QUEUE, "client-individual")
    client.publish(QUEUE, b"x")
    [frame] = client.received()
    client.send("ACK", message_id=frame.headers["message-id"], subscription="1", receipt="r")
    assert client.received()[0].command == "RECEIPT"
    assert harness.broker.statistics().dequeued == 1


def test_stop_tells_everybody_and_waits_for_them() -> None:
    harness = Harness()
    client = harness.client()
    stopped = harness.broker.stop()
    assert "being stopped" in client.error()
    assert not stopped.called
    client.drop()
    assert stopped.called
    assert harness.clock.getDelayedCalls() == []


def test_statistics_balance() -> None:
    harness = Harness()
    client = harness.client().subscribe(QUEUE, "client-individual", prefetch_count="2")
    client.publish(QUEUE, b"1", b"2", b"3", b"4")
    client.send("ACK", id=acks(client)[0])
    statistics = harness.broker.statistics()
    assert (statistics.enqueued, statistics.dequeued, statistics.messages) == (4, 1, 3)
    assert (statistics.connections, statistics.consumers) == (1, 1)
    assert statistics.bytes > 3 * 256
    assert statistics.bytes_received > 0 < statistics.bytes_sent
