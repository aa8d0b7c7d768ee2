"""Checks that the schema exists and is not of an earlier release: without it, a server that answers is of no use."""

from pathlib import Path
from typing import Any, Final, Protocol

import asyncpg

import migrations

HAS_SCHEMA: Final = "SELECT to_regclass('operations') IS NOT NULL"
REVISION: Final = "SELECT version_num FROM alembic_version"
REVISIONS: Final = sorted(path.stem[:4] for path in Path(migrations.__file__).parent.glob("versions/[0-9]*.py"))
"""The revisions that this release knows; the last one is its own."""


class Asked(Protocol):
    """An asyncpg connection or pool."""

    async def fetchval(self, query: str) -> Any: ...


async def schema_trouble(asked: Asked) -> str | None:
    """What is wrong with the schema and how to fix it, for a readiness check; None if nothing is.

    A later release's schema is fine: the database is migrated before that release's processes start.
    """
    if not await asked.fetchval(HAS_SCHEMA):
        return "the database has no schema: run `payments migrate`"
    revision = await _revision(asked)
    if revision in REVISIONS[:-1]:
        return f"the database's schema is {revision}, and this release needs {REVISIONS[-1]}: run `payments migrate`"
    return None


async def _revision(asked: Asked) -> str | None:
    """The schema's revision; None if the role may use the tables but not read this."""
    try:
        return str(await asked.fetchval(REVISION))
    except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedTableError):
        return None
