"""How a relay connects to Postgres: what holds on each of its connections, whatever the database's own settings."""

from typing import Any, Final

import psycopg

TRANSACTION_TIMEOUT_SINCE: Final = 170_000
CONNECTION: Final[dict[str, Any]] = {
    "autocommit": True,
    "connect_timeout": 5,
    # A server that vanishes silently is noticed in about ten seconds.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    # These override the database's and the role's settings: bytes other than UTF-8 would go to the topic, psycopg can
    # read times in ISO style only, and reading the whole outbox takes long.
    "client_encoding": "utf8",
    "options": "-c DateStyle=ISO -c statement_timeout=0 -c idle_in_transaction_session_timeout=0"
    " -c idle_session_timeout=0"
    # The server notices our vanished client as fast: a vanished leader must not keep its lock.
    " -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3",
}


def with_settings(settings: str) -> dict[str, Any]:
    """CONNECTION with additional server settings (`-c name=value`)."""
    return CONNECTION | {"options": f"{CONNECTION['options']} {settings}"}


async def lift_time_limit(connection: psycopg.AsyncConnection) -> None:
    """Let its transactions take as long as they need, whatever the database's own limit."""
    if connection.info.server_version >= TRANSACTION_TIMEOUT_SINCE:
        await connection.execute("SET transaction_timeout = 0")
