"""Closes what aiokafka leaves open where a start is cancelled while it asks its first broker for the others.

In production a process that is told to stop ends right after that. A run of tests goes on, and whichever test the
garbage collector then comes by would be told of an unclosed connection.
"""

from typing import Any

import aiokafka.client
from aiokafka.conn import AIOKafkaConnection, create_conn


async def _create_conn(*arguments: Any, **options: Any) -> AIOKafkaConnection:
    connection = await create_conn(*arguments, **options)
    if "on_close" not in options:  # Only the first one has nobody to tell.
        connection.send = _ClosingSend(connection)
    return connection


class _ClosingSend:
    """A connection's `send` that closes it unless there was an answer."""

    def __init__(self, connection: AIOKafkaConnection) -> None:
        self._connection, self._send = connection, connection.send

    async def __call__(self, request: Any) -> Any:
        try:
            return await self._send(request)
        except BaseException:
            self._connection.close()
            raise


def close_what_a_cancelled_start_leaves() -> None:
    """For the rest of this process."""
    vars(aiokafka.client)["create_conn"] = _create_conn
