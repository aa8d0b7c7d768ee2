"""Closes the connection that aiokafka leaves open if a start is cancelled while it asks the first broker for others.

In production a process that is stopped ends right after that. A test run continues, and the garbage collector would
report the unclosed connection during some unrelated test.
"""

from typing import Any

import aiokafka.client
from aiokafka.conn import AIOKafkaConnection, create_conn


async def _create_conn(*arguments: Any, **options: Any) -> AIOKafkaConnection:
    connection = await create_conn(*arguments, **options)
    if "on_close" not in options:  # Only the first connection has no `on_close`.
        connection.send = _ClosingSend(connection)
    return connection


class _ClosingSend:
    """A connection's `send` that closes the connection if there is no answer."""

    def __init__(self, connection: AIOKafkaConnection) -> None:
        self._connection, self._send = connection, connection.send

    async def __call__(self, request: Any) -> Any:
        try:
            return await self._send(request)
        except BaseException:
            self._connection.close()
            raise


def close_what_a_cancelled_start_leaves() -> None:
    """Patch aiokafka for the rest of this process."""
    vars(aiokafka.client)["create_conn"] = _create_conn
