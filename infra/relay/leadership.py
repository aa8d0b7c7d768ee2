"""Which of several relays with one slot is the active one: the holder of an advisory lock."""

import zlib
from typing import Final

LEADERSHIP: Final = 8146
"""First half of the lock's key: any number that only relays use. The second half is the slot's name."""
IS_LED: Final = f"""
    EXISTS (SELECT FROM pg_locks AS l
             WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {LEADERSHIP}
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND l.objid = %(leadership)s::bigint & 4294967295)
"""  # noqa: S608 - names from our own constants


def leadership_key(slot: str) -> list[int]:
    """The advisory lock that the active relay of a slot holds; its second half is `leadership` in `IS_LED`."""
    return [LEADERSHIP, zlib.crc32(slot.encode()) - 2**31]
