"""Why a message is on the dead-letter topic: the values of its header `dlq_reason`."""

from enum import StrEnum


class DeadLetterReason(StrEnum):
    """Why a message is parked instead of refused. A closed list; the value is the header `dlq_reason`."""

    EMPTY = "empty"
    TOO_LARGE = "too_large"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    UNKNOWN_TYPE = "unknown_type"
    NO_PAYMENT_ID = "no_payment_id"
    RECORD_UNDECODABLE = "record_undecodable"
    """The Kafka client could not decode the record: only its topic, partition and offset are known."""
    CANNOT_BE_PROCESSED = "cannot_be_processed"
    """The command can be read, but processing it failed, even by itself."""
