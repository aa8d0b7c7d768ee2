"""The trigger that wakes a poller on each insert: on while a relay polls, otherwise off."""

from typing import Final

import psycopg
import structlog

log = structlog.get_logger(__name__)

NOTIFIES: Final = """
    SELECT tgenabled <> 'D' FROM pg_trigger WHERE tgname = 'outbox_notify' AND tgrelid = 'outbox'::regclass
"""


async def set_notify(leader: psycopg.AsyncConnection, *, is_on: bool) -> bool:
    """Enable or disable the trigger that wakes a poller on each insert; False if a writer holds the lock: try again.

    A role that does not own the outbox cannot do this, which is logged; True then too. Until somebody enables the
    trigger, the poller is woken by its tick.
    """
    row = await (await leader.execute(NOTIFIES)).fetchone()
    if row is None or row[0] == is_on:
        return True
    try:
        # The lock waits for writers, and others wait behind it: hence the short timeout. One message is one
        # transaction, so other users of this connection never find it in a failed one.
        await leader.execute(
            "SET LOCAL lock_timeout = '100ms';"
            f" ALTER TABLE outbox {'ENABLE' if is_on else 'DISABLE'} TRIGGER outbox_notify".encode()
        )
    except psycopg.errors.LockNotAvailable:
        return False
    except psycopg.errors.InsufficientPrivilege:
        log.warning("the relay's role does not own the outbox: see docs/operations/relay.md", trigger="outbox_notify")
    return True
