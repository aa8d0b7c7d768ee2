"""Whether the schema is there at all: a server that answers is of no use without it."""

from typing import Any, Final, Protocol

HAS_SCHEMA: Final = "SELECT to_regclass('operations') IS NOT NULL"


class Asked(Protocol):
    """A connection of asyncpg, or a pool of them."""

    async def fetchval(self, query: str) -> Any: ...


async def schema_trouble(asked: Asked) -> str | None:
    """What is to be done first, None if nothing; for a readiness check."""
    return None if await asked.fetchval(HAS_SCHEMA) else "the database has no schema: run `payments migrate`"
