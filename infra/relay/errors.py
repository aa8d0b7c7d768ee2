"""What can stop a relay's session. All of it ends in a new session, from the slot's confirmed position."""


class RelayError(Exception):
    """A session of the relay cannot go on."""


class PostgresAway(RelayError):
    """No connection, or it was lost."""


class SlotBusy(RelayError):
    """Another relay streams from the slot."""


class SlotMissing(RelayError):
    """The slot does not exist."""


class KafkaAway(RelayError):
    """Events could not be published."""
