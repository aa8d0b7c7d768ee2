"""Operators' decisions about dead letters; stored in Postgres because the letters' topic is append-only."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

import asyncpg

CLAIM: Final = """
    -- Another operator's open claim of the same letter makes this one wait. Afterwards the WHERE clause is the fence:
    -- a decision other than the one that this operator saw matches no row, unless it is about an earlier letter.
    INSERT INTO dead_letter_decisions AS d (topic, "partition", "offset", decision, why, parked_at)
    VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (topic, "partition", "offset") DO UPDATE
       SET decision = excluded.decision, why = excluded.why, parked_at = excluded.parked_at, decided_at = now()
     WHERE d.decided_at = $7 OR d.parked_at < excluded.parked_at
    RETURNING true
"""
SELECT: Final = """
    SELECT "partition", "offset", decision, decided_at, why, parked_at FROM dead_letter_decisions WHERE topic = $1
"""


@dataclass(frozen=True, slots=True)
class LetterDecision:
    """`retried` or `dropped`, when it was decided, and why the letter was dropped.

    It is about the letter parked at `parked_at`, by the clock of the topic's messages. A letter with the same partition
    and offset that was parked later is another one, on a recreated topic, and still undecided.
    """

    name: str
    decided_at: datetime
    why: str
    parked_at: datetime


class LetterDecisions:
    """The decisions about one topic's letters, on one connection."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", topic: str) -> None:
        self._connection = connection
        self._topic = topic

    @classmethod
    @asynccontextmanager
    async def connect(cls, postgres_url: str, topic: str) -> AsyncIterator[Self]:
        """Connect to this database; the connection is closed when the block is left."""
        # While a letter is claimed, Kafka may take long: the server's own limit would end the claim unnoticed.
        never = {"idle_in_transaction_session_timeout": "0"}
        connection = await asyncpg.connect(postgres_url, timeout=5, server_settings=never)
        try:
            yield cls(connection, topic)
        finally:
            await connection.close()

    async def all(self) -> dict[tuple[int, int], LetterDecision]:
        """All decisions by partition and offset; a letter without one is open."""
        rows = await self._connection.fetch(SELECT, self._topic)
        return {(partition, offset): LetterDecision(*decision) for partition, offset, *decision in rows}

    @asynccontextmanager
    async def claim(
        self, place: tuple[int, int], decision: str, *, parked_at: datetime, seen: LetterDecision | None, why: str = ""
    ) -> AsyncIterator[bool]:
        """Decide about a letter, unless another operator has decided since `seen` was read.

        The block gets True if the decision is this caller's, and then acts on it. Leaving the block commits the
        decision; an error or a crash inside leaves the letter as it was.
        """
        async with self._connection.transaction():
            yield bool(
                await self._connection.fetchval(
                    CLAIM, self._topic, *place, decision, why, parked_at, seen.decided_at if seen else None
                )
            )
