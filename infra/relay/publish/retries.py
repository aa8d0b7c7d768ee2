"""Takes events out of quarantine by publishing them, in the background: their partition may have no leader.

It also keeps the publisher's lists of what must not be published: payments in quarantine, and dropped events.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from infra.relay.event import Group, OutboxEvent
from infra.relay.publish.publisher import Diverted, Publisher
from infra.relay.publish.quarantine import PAYMENTS_AT_ONCE, Quarantine

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Retry:
    """A payment's events, counted until Kafka has acknowledged or refused each."""

    events: list[OutboxEvent] = field(default_factory=list)
    group: Group = field(default_factory=Group)
    put_anew: set[bytes] = field(default_factory=set)
    """Ids of events that were refused again, and of those that wait behind them."""


class Retries:
    """The retries of one session. Events of their payments that the stream brings meanwhile queue up behind."""

    def __init__(self, quarantine: Quarantine, publisher: Publisher) -> None:
        self._quarantine = quarantine
        self._publisher = publisher
        self._under_way: dict[bytes, _Retry] = {}

    async def load(self) -> None:
        """Give the publisher the payments in quarantine and the dropped events, before it publishes anything."""
        self._publisher.blocked = await self._quarantine.keys()
        self._publisher.given_up = await self._quarantine.given_up()

    async def unblock(self) -> None:
        """Unblock payments that have nothing left in quarantine because an operator dropped their events.

        Refused events must have been put there before, or they would be taken for dropped.
        """
        publisher = self._publisher
        blocked = set(publisher.blocked)
        freed = blocked - await self._quarantine.keys() if blocked else set()
        if freed or publisher.given_up:
            publisher.given_up = await self._quarantine.given_up()
            publisher.blocked -= freed

    async def begin(self) -> bool:
        """Publish a portion of the events that are due for a retry; False if there are none, or no room."""
        if len(self._under_way) >= PAYMENTS_AT_ONCE or self._publisher.is_full:
            return False
        due = await self._quarantine.due(besides=self._under_way)
        if not due:
            return False
        keys = {event.aggregateid for event in due}
        log.info("events leave quarantine", events=len(due), payments=len(keys))
        marked = await self._quarantine.mark_due(list(keys))
        retries = {key: _Retry() for key in keys}
        for event in due:
            if event.id in marked:  # An operator may have dropped it just now.
                retries[event.aggregateid].events.append(event)
        self._publisher.given_up = await self._quarantine.given_up()
        self._publisher.blocked -= keys
        self._under_way |= retries
        for retry in retries.values():
            self._publisher.publish(retry.events, retry.group)
        return True

    def note(self, diverted: Iterable[Diverted]) -> None:
        """Report events that were put into quarantine."""
        for event, *_ in diverted:
            if (retry := self._under_way.get(event.aggregateid)) is not None:
                retry.put_anew.add(event.id)

    async def let_go(self) -> bool:
        """Remove events that Kafka has acknowledged from quarantine; whether any payment's retry has ended."""
        ended = {key: retry for key, retry in self._under_way.items() if not retry.group.missing}
        if not ended:
            return False
        taken = [event.id for retry in ended.values() for event in retry.events if event.id not in retry.put_anew]
        await self._quarantine.done(taken)
        for key in ended:
            del self._under_way[key]
        return True
