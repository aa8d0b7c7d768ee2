"""Whether the schema is there, and is not of an earlier release: a server that answers is of no use without it."""

from pathlib import Path
from typing import Any, Final, Protocol

import asyncpg

import migrations

HAS_SCHEMA: Final = "SELECT to_regclass('operations') IS NOT NULL"
REVISION: Final = "SELECT version_num FROM alembic_version"
REVISIONS: Final = sorted(path.stem[:4] for path in Path(migrations.__file__).parent.glob("versions/[0-9]*.py"))
"""Those of this release, the last one being its own."""


class Asked(Protocol):
    """A connection of asyncpg, or a pool of them."""

    async def fetchval(self, query: str) -> Any: ...


async def schema_trouble(asked: Asked) -> str | None:
    """What is to be done first, None if nothing; for a readiness check.

    A later release's schema is none: it is migrated to before its processes start.
    """
    if not await asked.fetchval(HAS_SCHEMA):
        return "the database has no schema: run `payments migrate`"
    revision = await _revision(asked)
    if revision in REVISIONS[:-1]:
        return f"the database's schema is {revision}, and this release needs {REVISIONS[-1]}: run `payments migrate`"
    return None


async def _revision(asked: Asked) -> str | None:
    """None where a role may work with the tables and not ask for this."""
    try:
        return str(await asked.fetchval(REVISION))
    except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedTableError):
        return None
