"""What was decided about dead letters: their topic only grows, so the decisions stand here."""

from collections.abc import Iterable
from typing import Final

import asyncpg

INSERT: Final = """
    INSERT INTO dead_letter_decisions (topic, "partition", "offset", decision, why)
    SELECT $1, p, o, $4, $5 FROM unnest($2::integer[], $3::bigint[]) AS x(p, o)
    ON CONFLICT (topic, "partition", "offset") DO UPDATE
       SET decision = excluded.decision, why = excluded.why, decided_at = now()
"""
SELECT: Final = 'SELECT "partition", "offset", decision FROM dead_letter_decisions WHERE topic = $1'


class LetterDecisions:
    """The decisions about one topic's letters."""

    def __init__(self, postgres_url: str, topic: str) -> None:
        self._postgres_url = postgres_url
        self._topic = topic

    async def all(self) -> dict[tuple[int, int], str]:
        """`retried` or `dropped`, by partition and offset; what is not here is open."""
        connection = await asyncpg.connect(self._postgres_url, timeout=5)
        try:
            return {(row[0], row[1]): row[2] for row in await connection.fetch(SELECT, self._topic)}
        finally:
            await connection.close()

    async def note(self, letters: Iterable[tuple[int, int]], decision: str, why: str = "") -> None:
        """Write a decision down."""
        partitions, offsets = zip(*letters, strict=True)
        connection = await asyncpg.connect(self._postgres_url, timeout=5)
        try:
            await connection.execute(INSERT, self._topic, partitions, offsets, decision, why)
        finally:
            await connection.close()
