"""Which of several relays with one slot is the active one, and whether somebody asks it to adopt: advisory locks.

They are held by a connection, so that no death of a process leaves one behind.
"""

import zlib
from typing import Final

LEADERSHIP: Final = 8146
"""First half of the active relay's lock: any number that only relays use. The second half is the slot's name."""
ADOPTION: Final = 8147
"""The same of who asks to adopt what the slot has passed, for as long as he waits for it."""


def is_held(lock: int) -> str:
    """SQL: whether somebody holds this lock; the value `key` is the second half of `lock_key`."""
    return f"""
        EXISTS (SELECT FROM pg_locks AS l
                 WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {lock}
                   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                   AND l.objid = %(key)s::bigint & 4294967295)
    """  # noqa: S608 - numbers of our own


def lock_key(lock: int, slot: str) -> list[int]:
    """Both halves of the lock of this slot."""
    return [lock, zlib.crc32(slot.encode()) - 2**31]
