"""What the commands of `payments dlq` do and print."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from app.settings import Settings
from handlers.messages.card_numbers import REMOVED, holds_card_number
from infra.kafka.dead_letter_log import DeadLetterLog, Letter, LetterId, OriginalGone
from infra.postgres.letters import LetterDecisions

SHOWN_BYTES = 60


class DeadLetterDesk:
    """One installation's dead letters, seen by an operator. Methods that print return the exit code."""

    def __init__(self, settings: Settings) -> None:
        self._log = DeadLetterLog(settings.kafka_bootstrap, settings.dead_letter_topic)
        self._decisions = LetterDecisions(settings.postgres_url, settings.dead_letter_topic)
        self._out = Console()

    def list_letters(self, *, with_decided: bool, reason: str | None, limit: int, as_json: bool) -> int:
        """Print letters, oldest first, one a line."""
        found = asyncio.run(self._find(with_decided=with_decided, reason=reason, limit=limit + 1))
        rows = [_facts(letter, state) for letter, state in found[:limit]]
        if as_json:
            for row in rows:
                print(json.dumps(row))
            return 0
        self._print_table(rows)
        if len(found) > limit:
            self._out.print(f"… and more: --limit shows more than {limit}")
        return 0

    def _print_table(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self._out.print("No dead letters.")
            return
        table = Table(*rows[0], box=box.SIMPLE)
        for row in rows:
            table.add_row(*map(str, row.values()))
        self._out.print(table, markup=False)

    def show(self, name: str) -> int:
        """Print one letter whole; card numbers are masked in the text and left out of the bytes."""
        letter = asyncio.run(self._log.letter(LetterId.parse(name)))
        value = letter.value or b""
        text = _safe_text(value)
        facts = {
            "letter": str(letter.id),
            "parked_at": letter.parked_at.isoformat(),
            "key": _safe_text(letter.key or b""),
            **letter.facts,
            "headers": {header: _safe_text(each or b"") for header, each in letter.headers},
            "text": text,
            "hex": None if text == REMOVED else value.hex(),
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0

    def choose(self, names: list[str], *, reason: str | None) -> list[Letter]:
        """The letters of these names; without names all that are open, perhaps of one reason.

        Raises:
            LetterUnknown: one of them is not there.
        """
        return asyncio.run(self._choose(names, reason))

    async def _choose(self, names: list[str], reason: str | None) -> list[Letter]:
        if not names:
            found = await self._find(with_decided=False, reason=reason, limit=None)
            return [letter for letter, _ in found]
        return [await self._log.letter(LetterId.parse(name)) for name in names]

    def retry(self, names: list[str], *, reason: str | None, dry_run: bool) -> int:
        """Publish letters again; 1 if one of them could not be."""
        chosen = self.choose(names, reason=reason)
        if dry_run:
            self._out.print(
                f"{len(chosen)} letters would be published again: {', '.join(str(each.id) for each in chosen)}"
            )
            return 0
        failed = 0
        for letter in track(chosen, "publishing again", console=self._out, disable=len(chosen) < 2):
            failed += not asyncio.run(self._retry(letter))
        self._out.print(
            f"{len(chosen) - failed} of {len(chosen)} published again; `payments dlq list` shows what comes back"
        )
        return 1 if failed else 0

    async def _retry(self, letter: Letter) -> bool:
        """Published first and noted afterwards: a crash in between repeats a command, and loses none."""
        try:
            await self._log.publish(letter)
        except OriginalGone as error:
            self._out.print(f"[red]{error}[/]")
            return False
        await self._decisions.note([(letter.id.partition, letter.id.offset)], "retried")
        return True

    def drop(self, letters: list[Letter], *, why: str) -> int:
        """Note that nothing will be done about them."""
        if letters:
            asyncio.run(self._decisions.note([(each.id.partition, each.id.offset) for each in letters], "dropped", why))
        self._out.print(f"{len(letters)} dropped")
        return 0

    async def _find(self, *, with_decided: bool, reason: str | None, limit: int | None) -> list[tuple[Letter, str]]:
        decided = await self._decisions.all()
        found: list[tuple[Letter, str]] = []
        async with aclosing(self._log.letters()) as letters:
            async for letter in letters:
                state = decided.get((letter.id.partition, letter.id.offset), "open")
                if (with_decided or state == "open") and reason in (None, letter.reason):
                    found.append((letter, state))
                    if limit is not None and len(found) >= limit:
                        break
        return found


def _facts(letter: Letter, state: str) -> dict[str, Any]:
    topic, partition, offset = letter.source
    return {
        "letter": str(letter.id),
        "parked at": f"{letter.parked_at:%Y-%m-%d %H:%M:%S}",
        "reason": letter.reason,
        "key": _safe_text(letter.key or b"")[:SHOWN_BYTES],
        "from": f"{topic}:{partition}:{offset}",
        "bytes": letter.size,
        "begins": _safe_text((letter.value or b"")[:SHOWN_BYTES]),
        "state": state,
    }


def _safe_text(value: bytes) -> str:
    """Readable whatever the bytes are: no control character reaches a terminal, no card number a log."""
    text = value.decode(errors="backslashreplace")
    if holds_card_number(text):
        return REMOVED
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
