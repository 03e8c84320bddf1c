"""Many subscribers of one job do not delay others, and miss nothing."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from harp.protocol.ends import Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Records
from harpcaller.notifier import Notifier, Subscriber
from support.deadline import eventually

MANY = 1000


def record(number: int) -> Records:
    return Records([Raw(b"%d" % number)], [1.0])


class Subscribers:
    """Subscribers of a job; each notes the first record in memory at each notification, or that the job has ended."""

    def __init__(self, notifier: Notifier) -> None:
        self.received: list[list[int | bool]] = [[] for _ in range(MANY)]
        self.subscribers = [self._subscriber(received) for received in self.received]
        for subscriber in self.subscribers:
            self._subscription = notifier.subscribe("job", subscriber)

    def _subscriber(self, received: list[int | bool]) -> Subscriber:
        def receive(ended: bool) -> None:
            assert self._subscription.newest is not None
            received.append(ended or self._subscription.newest.first)

        return receive

    @property
    def called(self) -> int:
        return sum(map(len, self.received))


async def test_many_subscribers_are_called_in_several_turns() -> None:
    notifier = Notifier()
    subscribers = Subscribers(notifier)
    turns = []

    def take_turn() -> None:
        turns.append(subscribers.called)
        if turns[-1] < MANY:
            asyncio.get_running_loop().call_soon(take_turn)

    notifier.publish_records("job", 7, record(7))
    take_turn()
    await eventually(lambda: turns[-1] == MANY, what="the last subscriber")
    assert max(after - before for before, after in pairwise([0, *turns])) <= 100
    assert subscribers.received == [[7]] * MANY


async def test_each_subscriber_gets_every_notification_in_order() -> None:
    """Also if one is published before the last subscriber has received the one before."""
    notifier = Notifier()
    subscribers = Subscribers(notifier)
    for number in range(3):
        notifier.publish_records("job", number, record(number))
    notifier.publish_end("job", Returned(Raw(b"1")))
    await eventually(lambda: subscribers.called == 4 * MANY, what="the last notification")
    assert subscribers.received == [[0, 1, 2, True]] * MANY


async def test_subscriber_that_ends_is_not_called() -> None:
    notifier = Notifier()
    subscribers = Subscribers(notifier)
    notifier.publish_records("job", 0, record(0))
    notifier.unsubscribe("job", subscribers.subscribers[-1])
    await eventually(lambda: subscribers.called == MANY - 1, what="the other subscribers")
    for subscriber in subscribers.subscribers[:-1]:
        notifier.unsubscribe("job", subscriber)
    assert list(notifier.subscribers) == []
    notifier.publish_records("job", 1, record(1))
    assert subscribers.called == MANY - 1
