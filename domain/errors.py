"""The errors of this service. Each class says what the caller may do; a refusal by the bank is a value, not an error.

PaymentsError
├── ConcurrentUpdate           somebody else won            RETRY: decide again on the fresh state
├── GatewayError
│   ├── GatewayUnreachable     nothing was executed (proof) RETRY, same key
│   ├── OutcomeUnknown         money may have moved         same key or status query; never "failed"
│   └── GatewayContractBroken  we cannot read the answer    treat as unknown, and page
├── StoreUnavailable           Postgres is away             NACK: rewind, back off, charge nothing
├── InputRefusedByStore        a constraint said no         BISECT, then PARK the one bad input
│                              (any other error, alone:     RETRY some seconds with backoff, then PARK)
└── MessageUnreadable          no known version             PARK in the dead-letter topic
"""


class PaymentsError(Exception):
    """Everything that this service raises on purpose."""


class ConcurrentUpdate(PaymentsError):
    """Another transaction changed the same payment, operation or key first."""


class GatewayError(PaymentsError):
    """A gateway call that brought no outcome."""

    def __init__(self, gateway: str, message: str) -> None:
        super().__init__(f"{gateway}: {message}")
        self.gateway = gateway
        self.message = message

    def is_caused_by(self, kind: type[BaseException]) -> bool:
        """Whether this error, or one in its chain of causes, is of `kind`; `TimeoutError` means that time ran out."""
        error: BaseException | None = self
        while error is not None and not isinstance(error, kind):
            error = error.__cause__
        return error is not None


class GatewayUnreachable(GatewayError):
    """Proof that this attempt was not executed: not connected, rate limited, and so on."""


class OutcomeUnknown(GatewayError):
    """The request may have been executed: timeout, cut connection, server error."""


class GatewayContractBroken(OutcomeUnknown):
    """An answer that the gateway's adapter cannot read; the outcome is unknown and somebody should look."""


class StoreUnavailable(PaymentsError):
    """Postgres cannot be reached or gave up the connection; whether the transaction committed may be unknown."""


class InputRefusedByStore(PaymentsError):
    """Postgres refused the rows for what they contain; trying again changes nothing."""


class MessageUnreadable(PaymentsError):
    """A message that names no known command for a usable payment id."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
