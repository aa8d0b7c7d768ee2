"""The work behind `payments dlq`: list, show, retry and drop letters. Postgres keeps each decision."""

import asyncio
import json
from bisect import insort
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import datetime
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from rich.progress import Progress

from app.console import new_console, safe_text, tell_of_more, time_text
from app.settings import Settings
from app.tables import print_wide, table_of
from handlers.messages.card_numbers import REMOVED, holds_card_number
from handlers.messages.dead_letter_reason import DeadLetterReason
from handlers.messages.events import write_time
from infra.kafka.dead_letter_log import DeadLetterLog, Letter, LetterId, NotRetriable
from infra.postgres.letters import LetterDecision, LetterDecisions

SHOWN_BYTES = 60


class Seen(NamedTuple):
    """A letter as it was when chosen: when it was parked, and the decision about it until then."""

    parked_at: datetime
    decision: LetterDecision | None


Chosen = dict[LetterId, Seen]


class ReasonUnknown(ValueError):
    """There is no such reason; the message lists those that exist."""


class DeadLetterDesk:
    """One installation's dead letters, seen by an operator. Methods that print return the exit code."""

    def __init__(self, settings: Settings) -> None:
        self._log = DeadLetterLog(settings.kafka, settings.dead_letter_topic)
        self._postgres_url = settings.postgres_url
        self._topic = settings.dead_letter_topic
        self._out = new_console()

    def list_letters(self, *, with_decided: bool, reason: str | None, limit: int, as_json: bool) -> int:
        """Print letters, oldest first.

        Raises:
            ReasonUnknown: there is no such reason.
        """
        found = asyncio.run(self._rows(with_decided=with_decided, reason=_known(reason), limit=limit + 1))
        rows = found[:limit]
        if as_json:
            print(json.dumps([row | {"parked_at": write_time(row["parked_at"])} for row in rows], indent=2))
        else:
            self._print_table(rows)
        if len(found) > limit:
            tell_of_more(limit)
        return 0

    def _print_table(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self._out.print("No dead letters.")
            return
        names = (name.replace("_", " ") for name in rows[0])
        cells = ((row | {"parked_at": time_text(row["parked_at"])}).values() for row in rows)
        print_wide(self._out, table_of(names, (map(str, each) for each in cells), whole={"letter", "key"}))

    def show(self, name: str) -> int:
        """Print one letter completely. If its text holds a card number, text and bytes are left out."""
        letter = asyncio.run(self._log.letter(LetterId.parse(name)))
        value = letter.value or b""
        text = _safe_text(value)
        facts = {
            "letter": str(letter.id),
            "parked_at": write_time(letter.parked_at),
            "key": _safe_text(letter.key or b""),
            **{name: _safe_text(fact.encode()) for name, fact in letter.facts.items()},
            "headers": [[_safe_text(header.encode()), _safe_text(each or b"")] for header, each in letter.headers],
            "text": text,
            "hex": None if text == REMOVED else value.hex(),
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0

    def choose(self, names: list[str], *, reason: str | None) -> Chosen:
        """The letters with these names; without names, all open letters, with `reason` only those of that reason.

        Raises:
            LetterUnknown: one of them does not exist.
            ReasonUnknown: there is no such reason.
        """
        return asyncio.run(self._choose(names, _known(reason)))

    async def _choose(self, names: list[str], reason: str | None) -> Chosen:
        if not names:
            return {letter.id: Seen(letter.parked_at, None) async for letter in self._open(reason)}
        async with self._decisions() as decisions:
            decided = await decisions.all()
        chosen: Chosen = {}
        for each in sorted(LetterId.parse(name) for name in names):
            letter = await self._log.letter(each)
            chosen[each] = Seen(letter.parked_at, _about(letter, decided))
        return chosen

    async def _open(self, reason: str | None) -> AsyncGenerator[Letter, None]:
        async with aclosing(self._find(with_decided=False, reason=reason)) as found:
            async for letter, _ in found:
                yield letter

    def undecided(self, chosen: Chosen) -> Chosen:
        """The letters that nobody has decided about; prints the decision about each of the others."""
        for letter, (_, decision) in chosen.items():
            if decision is not None:
                why = f": {safe_text(decision.why)}" if decision.why else ""
                self._out.print(f"{letter} was {decision.name} already{why} ({time_text(decision.decided_at)})")
        return {letter: seen for letter, seen in chosen.items() if seen.decision is None}

    def retry(self, names: list[str], *, reason: str | None, dry_run: bool, again: bool) -> int:
        """Publish letters again, decided ones only with `again`. Returns 1 if a letter was refused or left alone."""
        chosen = self.choose(names, reason=reason)
        wanted = chosen if again else self.undecided(chosen)
        left_alone = len(chosen) - len(wanted)
        if left_alone:
            self._out.print(f"{left_alone} left alone; --again publishes them all the same")
        if dry_run:
            self._out.print(f"{len(wanted)} letters would be published again: {', '.join(map(str, wanted))}")
            return 0
        if not chosen:
            self._out.print("No open letter matches.")
            return 0
        if not wanted:
            return 1
        return max(asyncio.run(self._retry_all(wanted, is_named=bool(names))), int(left_alone > 0))

    async def _retry_all(self, chosen: Chosen, *, is_named: bool) -> int:
        """Publish one after the other, in the order of the topic: a payment's letters keep their order."""
        outcomes: Counter[str] = Counter()
        try:
            async with self._decisions() as decisions, self._log.publisher() as producer:
                with Progress(console=self._out, disable=len(chosen) < 2) as progress:
                    task = progress.add_task("publishing again", total=len(chosen))
                    async with aclosing(self._read(chosen, is_named=is_named)) as letters:
                        async for letter in letters:
                            outcomes[await self._retry(letter, chosen[letter.id].decision, decisions, producer)] += 1
                            progress.advance(task)
        finally:
            self._report(outcomes, len(chosen))
        return 1 if outcomes["refused"] else 0

    def _report(self, outcomes: Counter[str], total: int) -> None:
        self._out.print(
            f"{outcomes['published']} of {total} published again; `payments dlq list` shows what comes back"
        )
        self._tell_of_others(outcomes["decided"])

    def _tell_of_others(self, count: int) -> None:
        if count:
            self._out.print(f"{count} left alone: somebody else has decided about them meanwhile")

    async def _read(self, chosen: Chosen, *, is_named: bool) -> AsyncGenerator[Letter, None]:
        """The chosen letters, one in memory at a time; many are found fastest by reading the whole topic once."""
        if is_named:
            for each in chosen:
                yield await self._log.letter(each)
            return
        async with aclosing(self._log.letters()) as letters:
            async for letter in letters:
                if letter.id in chosen:
                    yield letter

    async def _retry(
        self, letter: Letter, seen: LetterDecision | None, decisions: LetterDecisions, producer: AIOKafkaProducer
    ) -> str:
        """Publish, then record the decision: a crash in between repeats a command but loses none."""
        place = (letter.id.partition, letter.id.offset)
        try:
            async with decisions.claim(place, "retried", parked_at=letter.parked_at, seen=seen) as is_ours:
                if not is_ours:
                    return "decided"
                await self._log.publish(letter, producer)
        except NotRetriable as error:
            self._out.print(str(error), style="red")
            return "refused"
        return "published"

    def drop(self, chosen: Chosen, *, why: str) -> int:
        """Record that nothing will be done about these letters."""
        dropped = asyncio.run(self._drop(chosen, why))
        self._out.print(f"{dropped} of {len(chosen)} dropped")
        self._tell_of_others(len(chosen) - dropped)
        return 0

    async def _drop(self, chosen: Chosen, why: str) -> int:
        dropped = 0
        async with self._decisions() as decisions:
            for each, (parked_at, seen) in chosen.items():
                place = (each.partition, each.offset)
                async with decisions.claim(place, "dropped", parked_at=parked_at, seen=seen, why=why) as is_ours:
                    dropped += is_ours
        return dropped

    def _decisions(self) -> AbstractAsyncContextManager[LetterDecisions]:
        return LetterDecisions.connect(self._postgres_url, self._topic)

    async def _find(self, *, with_decided: bool, reason: str | None) -> AsyncGenerator[tuple[Letter, str], None]:
        async with self._decisions() as decisions:
            decided = await decisions.all()
        async with aclosing(self._log.letters()) as letters:
            async for letter in letters:
                decision = _about(letter, decided)
                if (with_decided or decision is None) and reason in (None, letter.reason):
                    yield letter, decision.name if decision else "open"

    async def _rows(self, *, with_decided: bool, reason: str | None, limit: int) -> list[dict[str, Any]]:
        """The oldest letters: the topic's partitions are read beside each other, so all of them are looked at."""
        oldest: list[tuple[Letter, str]] = []
        async with aclosing(self._find(with_decided=with_decided, reason=reason)) as found:
            async for each in found:
                insort(oldest, each, key=lambda each: (each[0].parked_at, each[0].id))
                del oldest[limit:]
        return [_facts(letter, state) for letter, state in oldest]


def _about(letter: Letter, decided: Mapping[tuple[int, int], LetterDecision]) -> LetterDecision | None:
    decision = decided.get((letter.id.partition, letter.id.offset))
    return decision if decision and letter.parked_at <= decision.parked_at else None


def _facts(letter: Letter, state: str) -> dict[str, Any]:
    return {
        "letter": str(letter.id),
        "parked_at": letter.parked_at,
        "reason": _safe_text(letter.reason.encode(), SHOWN_BYTES),
        "key": _safe_text(letter.key or b"", SHOWN_BYTES),
        "from": _safe_text(":".join(map(str, letter.source or "?")).encode()),
        "bytes": letter.size,
        "begins": _safe_text(letter.value or b"", SHOWN_BYTES),
        "state": state,
    }


def _known(reason: str | None) -> str | None:
    if reason is not None and reason not in set(DeadLetterReason):
        raise ReasonUnknown(f"{reason!r} is not a reason; use one of: {', '.join(DeadLetterReason)}")
    return reason


def _safe_text(value: bytes, length: int | None = None) -> str:
    """Readable text for any bytes: no control character reaches a terminal, no card number a log.

    The whole value is searched for card numbers before it is cut: a number that lost its last digit would pass.
    """
    text = value.decode(errors="backslashreplace")
    if holds_card_number(text):
        return REMOVED
    return safe_text(text[:length])[:length]
