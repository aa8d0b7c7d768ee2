# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The relay's inner loop in C: turns messages of the log into Kafka records without an object for each event.

It handles the common case only, and returns any other message to the Python code that does the same: `plain.py` has its
`Records`, and `wal/source.py` does the work of `LogReader`. Without a C compiler Python does everything, at 50 to 60 %
of the speed.
Formats: https://kafka.apache.org/documentation/#recordbatch,
https://www.postgresql.org/docs/17/protocol-logicalrep-message-formats.html
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    # In the order of `pgoutput.OUTBOX_COLUMNS`.
    ID, KEY, TYPE, PAYLOAD, SEQ, SOURCE, VERSION, TIME, TRACE
    FIELDS
    COLUMNS_MAX = 32
    HEADERS = 8
    HEAD = 61
    FIRST_BYTES = 4096
    VARINT_MAX = 10
    # The byte that names a message's kind.
    LOG_DATA = 119     # w
    INSERT = 73        # I
    BEGIN = 66         # B
    COMMIT = 67        # C
    TEXT = 116         # t
    LOG_DATA_HEAD = 25
    INSERT_HEAD = 8
    BEGIN_SIZE = 21
    COMMIT_SIZE = 26
    LENGTH_HEAD = 5
    SEALED = -1

# Each header's name with its length before it, and the field that is its value; the headers of `plain.HEADERS`.
cdef const char* NAMES[HEADERS]
cdef int NAME_SIZES[HEADERS]
cdef int VALUES[HEADERS]
NAMES[:] = [b"\x04id", b"\x0ace_id", b"\x0ece_type", b"\x12ce_source", b"\x0ece_time", b"\x1cce_specversion",
            b"\x16payment_seq", b"\x16traceparent"]
NAME_SIZES[:] = [3, 6, 8, 10, 8, 15, 12, 12]
VALUES[:] = [ID, ID, TYPE, SOURCE, TIME, VERSION, SEQ, TRACE]


cdef inline uint8_t* put_varint(uint8_t* at, int64_t value) noexcept nogil:
    cdef uint64_t rest = (<uint64_t>value << 1) ^ <uint64_t>(value >> 63)
    while rest >= 0x80:
        at[0] = <uint8_t>(rest | 0x80)
        at += 1
        rest >>= 7
    at[0] = <uint8_t>rest
    return at + 1


cdef inline int varint_size(int64_t value) noexcept nogil:
    cdef uint64_t rest = (<uint64_t>value << 1) ^ <uint64_t>(value >> 63)
    cdef int size = 1
    while rest >= 0x80:
        size += 1
        rest >>= 7
    return size


cdef inline uint8_t* put(uint8_t* at, const uint8_t* data, Py_ssize_t size) noexcept nogil:
    """Write a length and as many bytes; a length of -1 is null."""
    at = put_varint(at, size)
    if size > 0:
        memcpy(at, data, size)
        at += size
    return at


cdef inline Py_ssize_t room_for(Py_ssize_t size) noexcept nogil:
    return varint_size(size) + (size if size > 0 else 0)


cdef inline uint32_t big_endian(const uint8_t* at) noexcept nogil:
    return (<uint32_t>at[0] << 24) | (<uint32_t>at[1] << 16) | (<uint32_t>at[2] << 8) | at[3]


cdef inline uint64_t big_endian_long(const uint8_t* at) noexcept nogil:
    return (<uint64_t>big_endian(at) << 32) | big_endian(at + 4)


cdef uint32_t murmur2(const uint8_t* data, Py_ssize_t size) noexcept nogil:
    """The same hash as in `partitions.py`."""
    cdef uint32_t factor = 0x5BD1E995U, value = 0x9747B28CU ^ <uint32_t>size, word
    cdef Py_ssize_t at = 0
    while size - at >= 4:
        word = data[at] | (<uint32_t>data[at + 1] << 8)
        word |= (<uint32_t>data[at + 2] << 16) | (<uint32_t>data[at + 3] << 24)
        word *= factor
        word ^= word >> 24
        value = value * factor ^ word * factor
        at += 4
    if size > at:
        word = 0
        while size > at:
            size -= 1
            word = word << 8 | data[size]
        value = (value ^ word) * factor
    value = (value ^ value >> 13) * factor
    return value ^ value >> 15


cdef class Records:
    """Records of one batch, after room for its head, and how many are of each group; see `plain.Records`."""

    cdef readonly bytearray buffer
    cdef readonly int count
    cdef readonly Py_ssize_t payload_bytes
    cdef readonly list groups
    cdef list _counts
    cdef object _last
    cdef int _last_count
    cdef Py_ssize_t _bytes_max, _end, _capacity

    def __init__(self, Py_ssize_t bytes_max):
        self._bytes_max = bytes_max
        self._end = HEAD
        self._capacity = FIRST_BYTES
        self.buffer = bytearray(FIRST_BYTES)
        self.groups, self._counts = [], []

    @property
    def counts(self):
        return [*self._counts, self._last_count] if self.groups else []

    def append(self, event, group):
        cdef const uint8_t* data[FIELDS]
        cdef Py_ssize_t size[FIELDS]
        cdef int field
        if not isinstance(event, tuple) or len(event) != FIELDS:
            raise TypeError("an event is a tuple of nine fields")
        for field in range(FIELDS):
            value = (<tuple>event)[field]
            if value is None:
                data[field], size[field] = NULL, -1
            else:
                data[field], size[field] = <const uint8_t*>PyBytes_AS_STRING(<bytes?>value), PyBytes_GET_SIZE(value)
        return self.add(data, size, group)

    cdef bint add(self, const uint8_t** data, Py_ssize_t* size, object group) except -1:
        cdef Py_ssize_t body = 2 + varint_size(self.count) + room_for(size[KEY]) + room_for(size[PAYLOAD]) + 1
        cdef int header
        cdef uint8_t* at
        for header in range(HEADERS):
            body += NAME_SIZES[header] + room_for(size[VALUES[header]])
        if self._bytes_max == SEALED or (self.count and self._end + varint_size(body) + body > self._bytes_max):
            return False
        self.grow(self._end + VARINT_MAX + body)
        at = <uint8_t*>PyByteArray_AS_STRING(self.buffer) + self._end
        at = put_varint(at, body)
        at[0] = at[1] = 0  # No attributes; a time offset of 0 ms from the batch.
        at = put_varint(at + 2, self.count)
        at = put(at, data[KEY], size[KEY])
        at = put(at, data[PAYLOAD], size[PAYLOAD])
        at = put_varint(at, HEADERS)
        for header in range(HEADERS):
            memcpy(at, NAMES[header], NAME_SIZES[header])
            at = put(at + NAME_SIZES[header], data[VALUES[header]], size[VALUES[header]])
        self._end = at - <uint8_t*>PyByteArray_AS_STRING(self.buffer)
        self.count += 1
        self.payload_bytes += size[PAYLOAD]
        self.note(group)
        return True

    cdef int grow(self, Py_ssize_t size) except -1:
        if size > self._capacity:
            self._capacity = max(size, min(4 * self._capacity, max(self._bytes_max, self._capacity)))
            PyByteArray_Resize(self.buffer, self._capacity)
        return 0

    cdef int note(self, object group) except -1:
        if group is not self._last:
            if self.groups:
                self._counts.append(self._last_count)
            self.groups.append(group)
            self._last, self._last_count = group, 0
        self._last_count += 1
        return 0

    def seal(self):
        """Cut the buffer to its content; nothing can be appended any more."""
        self._bytes_max = SEALED
        if self._capacity != self._end:
            self._capacity = self._end
            PyByteArray_Resize(self.buffer, self._end)
        return self.buffer


def encode(events, object group, Py_ssize_t payload_max, list records, renew):
    """Encode events into the records of their partitions, up to one that is too large; count and payload bytes.

    The group counts them. `records` and `renew` are as for `LogReader.read`.
    """
    cdef int count = 0
    cdef Py_ssize_t size = 0, payload
    cdef bytes key
    cdef Py_ssize_t partition
    for event in events:
        payload = PyBytes_GET_SIZE(<bytes?>(<tuple>event)[PAYLOAD])
        if payload > payload_max:
            break
        key = <bytes?>(<tuple>event)[KEY]
        partition = partition_of(<const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), len(records))
        value = records[partition]
        if value is None or not (<Records?>value).append(event, group):
            (<Records?>renew(partition)).append(event, group)
        count += 1
        size += payload
    group.missing += count
    return count, size


cdef inline Py_ssize_t partition_of(const uint8_t* key, Py_ssize_t size, Py_ssize_t partitions) noexcept nogil:
    return (murmur2(key, size) & 0x7FFFFFFF) % partitions


cdef class LogReader:
    """Reads the log's messages straight into the records of their partitions."""

    cdef object _get, _read_socket, _note_keepalive, _begin
    cdef list _taken
    cdef uint32_t _relation
    cdef int _columns
    cdef int _places[FIELDS]
    cdef public object group
    """Counts the next events, until it has an end."""
    cdef public int64_t committed_at_us
    """Commit time of the transaction that began last in the log."""
    cdef public bint has_commit
    """Whether a transaction has ended since this was set to False."""

    def __init__(self, get, read_socket, note_keepalive, begin, list taken):
        self._get, self._read_socket, self._note_keepalive = get, read_socket, note_keepalive
        self._begin, self._taken = begin, taken
        self._columns = 0

    def learn(self, uint32_t relation, int columns, places):
        """The outbox is this relation, and has an event's fields at `places`; with too many columns Python reads it."""
        cdef int field
        self._relation, self._columns = relation, columns if columns <= COLUMNS_MAX else 0
        for field in range(FIELDS):
            self._places[field] = places[field]

    def read(self, int events_max, Py_ssize_t bytes_max, Py_ssize_t payload_max, list records, renew):
        """Read until nothing is left, `events_max` events or `bytes_max` bytes were read, or a message needs Python.

        Returns the number of events, the bytes of their payloads, whether nothing is left, and the message for Python;
        an empty message means the end of the stream. `records` has each partition's open records; `renew` returns new
        ones for a partition whose records are full or missing.

        Transactions read by one call share a group. Later calls use another group, even for the remainder of a
        transaction (perhaps its COMMIT alone) that began in a group with an end: such a group may be dropped any time.
        """
        cdef Py_buffer view
        cdef const uint8_t* message
        cdef int events = 0, missing = 0, kind
        cdef Py_ssize_t size, payload, length = 0
        cdef bint was_read = False, is_fresh = False
        cdef object group = self.group
        try:
            while events < events_max and length < bytes_max:
                size, data = self._get(1)
                if size <= 0:
                    if size < 0:
                        return events, length, False, b""
                    if was_read:
                        return events, length, True, None
                    self._read_socket()
                    was_read = True
                    continue
                PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
                try:
                    message = <const uint8_t*>view.buf
                    if message[0] != LOG_DATA or size <= LOG_DATA_HEAD:
                        self._note_keepalive(data)
                        continue
                    was_read = False
                    message += LOG_DATA_HEAD
                    size -= LOG_DATA_HEAD
                    kind = message[0]
                    if kind == INSERT and size >= INSERT_HEAD:
                        if not is_fresh and group.end_lsn is not None:
                            group, is_fresh = self.begin(), True
                        payload = self.insert(message, message + size, payload_max, records, renew, group)
                        if payload < 0:
                            return events, length, False, PyBytes_FromStringAndSize(<const char*>message, size)
                        length += payload
                        events += 1
                        missing += 1
                    elif kind == BEGIN and size >= BEGIN_SIZE:
                        self.committed_at_us = <int64_t>big_endian_long(message + 9)
                        self._taken.append(big_endian(message + 17))
                        if not is_fresh:
                            if missing:
                                group.missing += missing
                                missing = 0
                            group, is_fresh = self.begin(), True
                    elif kind == COMMIT and size >= COMMIT_SIZE:
                        if not is_fresh and group.end_lsn is not None:
                            group, is_fresh = self.begin(), True
                        group.end_lsn = <int64_t>big_endian_long(message + 10)
                        self.has_commit = True
                    else:
                        return events, length, False, PyBytes_FromStringAndSize(<const char*>message, size)
                finally:
                    PyBuffer_Release(&view)
            return events, length, False, None
        finally:
            if missing:
                group.missing += missing

    cdef object begin(self):
        self.group = self._begin(self.committed_at_us)
        return self.group

    cdef Py_ssize_t insert(
        self,
        const uint8_t* message,
        const uint8_t* end,
        Py_ssize_t payload_max,
        list records,
        object renew,
        object group,
    ) except -2:
        """The bytes of the payload; -1 if Python must read the row, also if its lengths do not fit the message."""
        cdef const uint8_t* at[COLUMNS_MAX]
        cdef Py_ssize_t length[COLUMNS_MAX]
        cdef const uint8_t* data[FIELDS]
        cdef Py_ssize_t size[FIELDS]
        cdef int columns = message[6] << 8 | message[7], column, field
        cdef Py_ssize_t partition
        if columns != self._columns or big_endian(message + 1) != self._relation:
            return -1
        message += INSERT_HEAD
        for column in range(columns):
            if message >= end:
                return -1
            if message[0] == TEXT:
                if end - message < LENGTH_HEAD:
                    return -1
                length[column] = big_endian(message + 1)
                message += LENGTH_HEAD
                if length[column] > end - message:
                    return -1
                at[column] = message
                message += length[column]
            else:
                length[column], at[column] = -1, NULL
                message += 1
        for field in range(FIELDS):
            column = self._places[field]
            data[field], size[field] = at[column], length[column]
        if size[PAYLOAD] > payload_max or size[PAYLOAD] < 0 or size[KEY] < 0:
            return -1
        partition = partition_of(data[KEY], size[KEY], len(records))
        value = records[partition]
        if value is None or not (<Records?>value).add(data, size, group):
            value = renew(partition)
            (<Records?>value).add(data, size, group)
        return size[PAYLOAD]
