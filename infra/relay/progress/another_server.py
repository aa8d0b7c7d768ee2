"""Rows that were written on another server: their transaction ids would be mistaken for this server's."""

from typing import Final

import psycopg

# The first of several relays to come here has cleared the ids already. Rows that got an id since then were written
# here, and a relay may have to find them by it.
FORGET: Final = """
    UPDATE outbox SET xact = NULL
     WHERE xact IS NOT NULL AND NOT EXISTS (
        SELECT FROM relay_slots AS r, pg_control_system() AS here
         WHERE r.system_identifier = here.system_identifier::text)
"""
MOVE: Final = """
    UPDATE relay_slots AS r
       SET system_identifier = here.system_identifier, repair = 'everything',
           published_below = 0, window_begin = NULL, window_end = NULL, window_position = 0
      FROM pg_control_system() AS here WHERE r.slot_name = %s
"""
# Rows with transaction ids that this server has not assigned yet were written on another server.
FORGET_FUTURE: Final = """
    UPDATE outbox SET xact = NULL WHERE xact >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""


async def move_here(leader: psycopg.AsyncConnection, slot: str) -> None:
    """Take over rows of another server: clear its transaction ids, which would be mistaken for this server's.

    After this, nothing counts as published by the relay of this slot.
    """
    async with leader.transaction():
        await leader.execute("SELECT pg_advisory_xact_lock(hashtext('payments relays move'))")
        await leader.execute(FORGET)
        await forget_future_transactions(leader)
        await leader.execute(MOVE, [slot])


async def forget_future_transactions(leader: psycopg.AsyncConnection) -> None:
    """Clear transaction ids that this server has not assigned yet: rows of a restored outbox, which no poll would see.

    If there are any, the other rows' ids are not this server's either, and may hold earlier events of a payment; so
    those are cleared too, unless a relay has a checkpoint of this server.
    """
    async with leader.transaction():
        if (await leader.execute(FORGET_FUTURE)).rowcount:
            await leader.execute(FORGET)
