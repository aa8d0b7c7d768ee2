"""The work behind `payments relay`. Commands write requests into the relay's tables; the relay carries them out."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeVar

import psycopg
from aiokafka.errors import KafkaError
from rich import box
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from app.command_line import fail
from app.console import new_console, safe_text, tell_of_more, time_text
from app.processes import relay_config
from app.relay_troubles import in_bytes, troubles_of
from app.settings import Settings
from app.signals import stop_on_signals
from app.tables import print_wide, table_of
from app.times import moment
from infra.kafka.topics import has_topic
from infra.relay.connection import CONNECTION
from infra.relay.progress.checkpoint import Repair
from infra.relay.progress.gaps import advice_on, is_about_destination, setting_behind
from infra.relay.progress.repairs import (
    count_retained,
    count_unproven,
    find_blocker,
    find_repair,
    find_source,
    list_unproven,
    request_repair,
    withdraw_adopt,
)
from infra.relay.publish.quarantine import QuarantineDesk
from infra.relay.publish.replay import EventReplay, Selection
from infra.relay.status import Overview, RelayStatus, is_led, read_status

T = TypeVar("T")

REQUESTS: Final[dict[str, str]] = {
    "unproven": "`payments relay repair`",
    "everything": "`payments relay repair --everything`",
    "adopt": "`payments relay adopt`",
}
SAY_EVERY_SECONDS = 5.0
"""How often a wait prints its progress if the output is not a terminal."""


class RelayDesk:
    """One database's relays, for an operator. Each public method prints, and returns the exit code."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slot = settings.relay_slot
        self._named = f"relay {self._slot!r}, which PAYMENTS_RELAY_SLOT names"
        self._nothing = f"Nothing of that is in quarantine of {self._named}."
        self._out = new_console()

    # --- status -------------------------------------------------------------------------------------------------------

    def status(self, *, as_json: bool) -> int:
        overview = asyncio.run(read_status(self._settings.postgres_url))
        troubles = troubles_of(overview)
        if as_json:
            print(json.dumps(asdict(overview) | {"troubles": troubles}, indent=2, default=str))
        else:
            self._print_status(overview, troubles)
        return 1 if troubles else 0

    def _print_status(self, overview: Overview, troubles: list[str]) -> None:
        for relay in overview.relays:
            self._out.print(_relay_table(relay))
        for name in overview.starting:
            self._out.print(f"relay {name}: its first start is publishing what is in the outbox, and has not finished")
        if not overview.relays and not overview.starting:
            self._out.print("No relay has ever run on this database.")
        for stranger in overview.strangers:
            kept = in_bytes(stranger.retained_bytes)
            self._out.print(
                f"other slot: {stranger.slot}, {'active' if stranger.is_active else 'inactive'}, keeps {kept}"
            )
        newest = overview.last_event_at
        self._out.print(f"newest event written: {'none' if newest is None else time_text(newest)}")
        for trouble in troubles:
            self._out.print(Text.assemble(("!", "bold red"), f" {trouble}"))

    # --- repair and adopt ---------------------------------------------------------------------------------------------

    def repair(self, *, everything: bool, dry_run: bool, limit: int, timeout_seconds: float) -> int:
        self._require_relay()
        count = count_retained if everything else partial(count_unproven, slot=self._slot)
        events, first, last = self._ask(count)
        what = "events are retained" if everything else "retained events have no proof of publication"
        self._out.print(f"{events} {what}" + (f", from {time_text(first)} to {time_text(last)}" if events else ""))
        if dry_run:
            if not everything:
                self._list_unproven(limit)
            return 0
        gap, *_ = self._ask(lambda connection: find_repair(connection, self._slot))
        if gap is not None and is_about_destination(gap) and not everything:
            why = (
                "If that is a mistake, waiting events would go to the wrong place"
                if setting_behind(gap)
                else "It would publish nothing of what was lost"
            )
            self._out.print(f"Not done: {gap}. {why}: {advice_on(gap)}.")
            return 1
        repair: Repair = "everything" if everything else "unproven"
        try:
            return self._decide(repair, timeout_seconds)
        finally:
            if self._ask(lambda connection: find_repair(connection, self._slot))[1] == repair:
                self._out.print(f"{REQUESTS[repair]} stays requested: a relay does it as soon as one can.")

    def _list_unproven(self, limit: int) -> None:
        found = self._ask(partial(list_unproven, slot=self._slot, limit=limit + 1))
        rows = [[_cell(fact) for fact in row] for row in found[:limit]]
        if rows:
            names = ("event", "payment", "seq", "type", "written")
            print_wide(self._out, table_of(names, rows, whole={"event", "payment"}))
        if len(found) > limit:
            tell_of_more(limit)

    def adopt(self, *, timeout_seconds: float) -> int:
        self._require_relay()
        try:
            return self._decide("adopt", timeout_seconds)
        finally:
            if self._ask(lambda connection: withdraw_adopt(connection, self._slot)):
                self._out.print("The request to adopt is withdrawn: ask again when a relay runs.")

    def _require_relay(self) -> str:
        """The relay's source. Fails if it never ran: for a mistyped name every event would count as unproven."""
        source = self._ask(lambda connection: find_source(connection, self._slot))
        if source is None:
            fail(f"{self._named}, has never run here, or its first start has not finished: see `payments relay status`")
        return source

    def _decide(self, repair: Repair, timeout_seconds: float) -> int:
        async def decided(connection: psycopg.AsyncConnection) -> int:
            if await request_repair(connection, self._slot, repair):
                return await self._wait_for_repair(connection, repair, timeout_seconds)
            gap, asked, _ = await find_repair(connection, self._slot)
            if asked is not None:
                self._out.print(
                    f"Not done: {REQUESTS[asked]} was requested before, and a running relay does that first"
                    f"{_with_setting_of(gap)}: ask again afterwards"
                )
                return 1
            self._out.print(
                f"Nothing to do: relay {self._slot!r} is active, or is trying to be: see `payments relay status`. (To"
                " publish events again while it runs: `payments relay replay`.)"
            )
            return 1

        return self._ask(decided)

    async def _wait_for_repair(self, connection: psycopg.AsyncConnection, asked: Repair, timeout_seconds: float) -> int:
        started = time.monotonic()
        said_at = started
        with self._out.status("requested; waiting for the relay …") as shown:
            while (now := time.monotonic()) < started + timeout_seconds:
                text = f"{now - started:.0f} s: {await self._repairing(connection, asked)}"
                shown.update(text)
                if not self._out.is_terminal and now - said_at > SAY_EVERY_SECONDS:
                    said_at = now
                    self._out.print(text)
                gap, repair, events = await find_repair(connection, self._slot)
                if repair is None and gap is not None:
                    self._out.print(f"not done, the relay stands still: {gap}. To do: {advice_on(gap)}")
                    return 1
                if repair is None:
                    self._out.print(f"done{await self._outcome(connection, asked, events)}; the relay goes on")
                    return 0
                await asyncio.sleep(0.2)
        self._out.print("requested, but not done yet: is a relay running?")
        return 1

    async def _outcome(self, connection: psycopg.AsyncConnection, asked: Repair, events: int) -> str:
        """What a repair published. A polling relay is only set back, and publishes later as it goes on."""
        if asked != "adopt" and await find_source(connection, self._slot) == "poll":
            return ": the events to be repeated are published from here on"
        return f": {events} events published" if events else ""

    async def _repairing(self, connection: psycopg.AsyncConnection, asked: Repair) -> str:
        if (blocker := await find_blocker(connection, self._slot)) is not None:
            who, since = blocker
            return f"the new slot waits for the end of a transaction of {who} that has run since {time_text(since)}"
        if await is_led(connection, self._slot):
            is_slot_made = asked != "adopt" and await find_source(connection, self._slot) == "wal"
            return f"a relay is working on it{': it creates the slot again and publishes' if is_slot_made else ''}"
        return "no relay is working on it yet; a relay that stopped at a gap checks every 2 s"

    # --- quarantine ---------------------------------------------------------------------------------------------------

    def list_quarantine(self, *, with_dropped: bool, limit: int, as_json: bool) -> int:
        names = ("event", "payment", "seq", "type", "state", "reason", "bytes", "since", "dropped because")
        found = self._at_quarantine(lambda desk: desk.entries(with_dropped=with_dropped, limit=limit + 1))
        rows = found[:limit]
        if as_json:
            print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2, default=str))
        elif not rows:
            self._out.print(f"Nothing is in quarantine of {self._named}.")
        else:
            print_wide(self._out, table_of(names, (map(_cell, row) for row in rows), whole={"event", "payment"}))
        if len(found) > limit:
            tell_of_more(limit)
        return 0

    def show_quarantine(self, name: str) -> int:
        rows = self._at_quarantine(lambda desk: desk.show(name))
        print(json.dumps(rows, indent=2, default=str))
        if not rows:
            fail(self._nothing)
        return 0

    def retry(self, names: list[str], *, everything: bool, timeout_seconds: float) -> int:
        events = self._at_quarantine(lambda desk: desk.retry(names, everything=everything))
        code = self._wait_for_quarantine(set(events), timeout_seconds) if events else 1
        left = set(names) - events.keys() - set(events.values())
        unknown = left - self._tell_of_dropped(left)
        if not events and (unknown or everything):
            self._out.print(self._nothing)
        elif unknown:
            self._out.print(f"Not in quarantine of {self._named}: {', '.join(map(safe_text, sorted(unknown)))}")
        return 1 if left else code

    def _tell_of_dropped(self, names: set[str]) -> set[str]:
        """Those of these events and payments that were dropped before, each printed with its reason."""
        found = self._at_quarantine(lambda desk: desk.dropped(names))
        for event, payment, why in found:
            self._out.print(f"{event} of {safe_text(payment)} was dropped before: {safe_text(why)}")
        return names & {name for event, payment, _ in found for name in (event, payment)}

    def _wait_for_quarantine(self, events: set[str], timeout_seconds: float) -> int:
        """Wait until the relay has tried each of `events`; other events in quarantine do not matter here."""
        deadline, asked = time.monotonic() + timeout_seconds, f"requested {len(events)} events"
        with self._out.status(f"{asked}; waiting for the relay …"):
            while time.monotonic() < deadline:
                states = self._at_quarantine(lambda desk: desk.states(events))
                if "retry" not in states:
                    dropped = states.count("dropped")
                    results = [f"{len(events) - len(states)} published" if states else "all published"]
                    results += [f"{len(states) - dropped} in quarantine again"] if len(states) > dropped else []
                    results += [f"{dropped} dropped by somebody meanwhile"] if dropped else []
                    self._out.print(f"{asked}: {', '.join(results)}")
                    self._tell_of_refusals(events)
                    return 1 if states else 0
                time.sleep(0.3)
        published = len(events) - len(self._at_quarantine(lambda desk: desk.states(events)))
        self._out.print(f"{asked}, but not all are done: {published} published; {self._who_works_on_it()}")
        return 1

    def _tell_of_refusals(self, events: set[str]) -> None:
        """Print why events came back, and what can be done."""
        reasons = self._at_quarantine(lambda desk: desk.reasons(events))
        for reason in reasons:
            self._out.print(f"refused: {safe_text(reason)}")
        if reasons:
            is_size = all("TooLarge" in reason for reason in reasons)
            fix = "raise the topic's max.message.bytes" if is_size else "fix the cause, if possible"
            give_up = "give up what was refused: `payments relay quarantine drop EVENT_ID --why …`"
            self._out.print(f"To do: {fix}, and retry; or {give_up}")

    def _who_works_on_it(self) -> str:
        if self._ask(lambda connection: is_led(connection, self._slot)):
            return "a relay is working on it, `quarantine list` shows what is left"
        return "no relay is active; the next one goes on with it"

    def drop(self, names: list[str], *, why: str) -> int:
        unknown = set(names) - self._tell_of_dropped(set(names))
        dropped, tried = self._at_quarantine(lambda desk: desk.drop(names, why=why))
        if tried:
            self._out.print(
                f"{tried} of {len(names)} not dropped: the relay is trying to publish them right now. List again."
            )
        elif not dropped and unknown:
            self._out.print(f"{self._nothing} `drop` takes event ids: nothing was dropped.")
        if dropped:
            self._out.print(
                f"{dropped} of {len(names)} dropped; a running relay now publishes the events that waited behind them:"
                " `quarantine list` shows what is left"
            )
        return 0 if dropped == len(set(names)) else 1

    # --- replay -------------------------------------------------------------------------------------------------------

    def replay(self, wanted: dict[str, str | None], *, topic: str | None, rate: int, dry_run: bool) -> int:
        selection = _selection(wanted)
        target = topic or self._settings.events_topic
        self._refuse_own_input(target)
        self._require_relay()
        replay = EventReplay(relay_config(self._settings), selection, topic=target, rate=rate)
        if not dry_run:
            self._check_topic(target)
        count = asyncio.run(replay.count())
        if dry_run:
            self._out.print(f"{count} events would be published to {target}")
            return 0
        if not count:
            self._out.print(f"Nothing to publish again: {self._named}, has published no retained event like that.")
            return 1
        left, since, failure = self._publish_again(replay, f"to {target}, at most {rate}/s", total=count)
        self._report_replay(replay.done, left, since, target)
        if failure is not None:
            raise failure
        return 1 if left else 0

    def _publish_again(
        self, replay: EventReplay, title: str, *, total: int
    ) -> tuple[int, datetime | None, KafkaError | None]:
        with Progress(console=self._out) as progress:
            task = progress.add_task(title, total=total)
            return asyncio.run(_replay(replay, lambda published: progress.update(task, completed=published)))

    def _report_replay(self, published: int, left: int, since: datetime | None, target: str) -> None:
        done = f"{published} of {published + left}" if left else f"{published}"
        self._out.print(f"{done} events published again to {target}")
        if since is not None:
            again = f"--since {since.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
            advice = (
                f"To go on: the same command with {again} instead of its own, if any. A few events may be repeated."
            )
            self._out.print(advice, soft_wrap=True)

    def _refuse_own_input(self, topic: str) -> None:
        if topic in (self._settings.commands_topic, self._settings.dead_letter_topic):
            fail(f"--to {topic}: that topic is for commands, not for events; name a topic that only subscribers read")

    def _check_topic(self, topic: str) -> None:
        """Fail early if the topic is missing: a producer would wait long for it, and then blame Kafka."""
        kafka = self._settings.kafka
        if not asyncio.run(has_topic(kafka, topic)):
            fail(
                f"there is no topic {topic}: create it, with as many partitions as {self._settings.events_topic}:\n"
                f"kafka-topics.sh --bootstrap-server {kafka.bootstrap} --create --topic {topic}"
                f" --partitions {self._settings.topic_partitions}"
            )

    # --- shared -------------------------------------------------------------------------------------------------------

    async def _connect(self) -> psycopg.AsyncConnection:
        return await psycopg.AsyncConnection.connect(self._settings.postgres_url, **CONNECTION)

    def _ask(self, ask: Callable[[psycopg.AsyncConnection], Awaitable[T]]) -> T:
        async def connected() -> T:
            async with await self._connect() as connection:
                return await ask(connection)

        return asyncio.run(connected())

    def _at_quarantine(self, ask: Callable[[QuarantineDesk], Awaitable[T]]) -> T:
        return self._ask(lambda connection: ask(QuarantineDesk(connection, self._slot)))


def _selection(wanted: dict[str, str | None]) -> Selection:
    return Selection(
        payment=wanted["payment"],
        type=wanted["type"],
        since=moment(wanted["since"]),
        until=moment(wanted["until"]),
    )


async def _replay(
    replay: EventReplay, on_progress: Callable[[int], None]
) -> tuple[int, datetime | None, KafkaError | None]:
    """If it stopped early: how many events are left, the earliest time that they were written, and Kafka's error."""
    stop, failure = stop_on_signals(first=_tell_that_it_ends), None
    try:
        await replay.run(on_progress, stop)
    except KafkaError as error:
        failure = error
    left = await replay.remaining() if replay.done and (failure or stop.is_set()) else (0, None)
    return *left, failure


def _tell_that_it_ends() -> None:
    new_console(to_stderr=True).print(
        "Ending after what is under way is done. Another signal ends at once.", soft_wrap=True
    )


def _with_setting_of(gap: str | None) -> str:
    if gap is None or not setting_behind(gap):
        return ""
    return f" with the earlier {setting_behind(gap)}, or use `payments relay repair --everything` for the new one"


def _relay_table(relay: RelayStatus) -> Table:
    table = Table(show_header=False, box=box.SIMPLE, title=f"relay {relay.slot}", title_justify="left")
    quarantine = ", ".join(f"{count} {name}" for name, count in relay.quarantine.items() if count) or "empty"
    rows = {
        "source": relay.source,
        "running": f"{'one active' if relay.is_running else 'NONE ACTIVE'}, {relay.standbys} standing by",
        "slot": f"{relay.slot_state}" + (f", keeps {in_bytes(relay.retained_bytes)}" if relay.retained_bytes else ""),
        "lag": f"{relay.lag_seconds:.1f} s, as of {time_text(relay.saved_at)}, when progress was last saved",
        "log to confirm": "" if relay.lag_bytes is None else f"{in_bytes(relay.lag_bytes)}, of other tables too",
        "quarantine": quarantine,
        "gap": relay.gap or "none",
    }
    # A request to adopt exists only while an operator waits for it, and sees it.
    if relay.repair in ("unproven", "everything"):
        rows["requested"] = f"{REQUESTS[relay.repair]}, and not done yet: a relay does it as soon as one can"
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def _cell(fact: object) -> str:
    return time_text(fact) if isinstance(fact, datetime) else str(fact)
