"""Advisory locks: which of several relays with one slot is active, and whether an operator asks it to adopt.

A connection holds them, so a process that dies leaves none behind.
"""

import zlib
from typing import Final

LEADERSHIP: Final = 8146
"""First half of the active relay's lock: any number that only relays use. The second half hashes the slot's name."""
ADOPTION: Final = 8147
"""Likewise, held by `payments relay adopt` for as long as it waits."""


def is_held(lock: int) -> str:
    """SQL for whether any session holds this lock; the parameter `key` is the second half of `lock_key`."""
    return f"""
        EXISTS (SELECT FROM pg_locks AS l
                 WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {lock}
                   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                   AND l.objid = %(key)s::bigint & 4294967295)
    """  # noqa: S608 - numbers of our own


def lock_key(lock: int, slot: str) -> list[int]:
    """Both halves of this slot's lock."""
    return [lock, zlib.crc32(slot.encode()) - 2**31]
