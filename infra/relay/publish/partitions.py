"""Which partition a key belongs to: murmur2 as in Java's client, so that relays and Debezium agree.

aiokafka's own `murmur2` gives the same result and takes twice as long. The cache is there because events of one payment
mostly follow each other closely. Source: `org.apache.kafka.common.utils.Utils.murmur2`.
"""

from functools import lru_cache
from struct import unpack_from

_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


@lru_cache(maxsize=16_384)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of `key` among `partitions`."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """The unsigned 32-bit hash."""
    length = len(data)
    value = 0x9747B28C ^ length
    for word in unpack_from(f"<{length >> 2}I", data):
        mixed = word * _M & _MASK
        # Multiplications are masked once per round: bits above the 32nd never affect those below.
        value = (value * _M ^ (mixed ^ mixed >> 24) * _M) & _MASK
    if length & 3:
        value = (value ^ int.from_bytes(data[length & ~3 :], "little")) * _M & _MASK
    value = (value ^ value >> 13) * _M & _MASK
    return value ^ value >> 15
