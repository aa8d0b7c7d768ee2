"""The commands on the wire, version 1, as pydantic models: what an order service may send, field by field.

Promises: strict types (a text is no number, true is no integer), unknown fields are ignored, and a model dumped as it
stands is canonical: alphabetical fields, sorted metadata, times in UTC. Parser and AsyncAPI document share them.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Final, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from domain.commands import NO_METADATA, Command, OperationKind
from domain.money import AMOUNT_MAX_MINOR, MINOR_UNITS

_NO_CARD: Final = "A text that is or holds a card number (by its form and check digit) is refused."

UUID_PATTERN: Final = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


class _CanonicalUuid:
    """A UUID written as 8-4-4-4-12 hexadecimal digits: of the forms that Rust parses, the only one of 36 characters."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(min_length=36, max_length=36, strict=True)
        return core_schema.chain_schema([text, core_schema.uuid_schema(strict=False)])

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # Told to senders only: reading with the pattern, too, would cost every command some time, and refuse no more.
        return handler(schema) | {"format": "uuid", "pattern": UUID_PATTERN}


class _Rfc3339:
    """A point in time with its offset, as RFC 3339 writes it; finer than microseconds is cut off."""

    PATTERN: Final = (
        r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
    )

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(pattern=self.PATTERN, max_length=40, strict=True)
        return core_schema.chain_schema([text, core_schema.datetime_schema(strict=False, tz_constraint="aware")])

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"format": "date-time"}


class _KnownCurrency:
    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(sorted(MINOR_UNITS))


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("outside the years 1 to 9999 in UTC") from error


def _sorted_or_none(metadata: dict[str, str]) -> dict[str, str] | None:
    """Empty metadata says the same as none, so it must read the same."""
    return dict(sorted(metadata.items())) or None


def _true_or_none(value: bool) -> bool | None:
    """False says what leaving it out says."""
    return value or None


def _of_decimals(decimals: int) -> str:
    return ", ".join(sorted(currency for currency, has in MINOR_UNITS.items() if has == decimals))


_MINOR_UNITS: Final = "Integer minor units, in digits alone (`1250.0` is refused)"
Amount = Annotated[
    int,
    Field(
        gt=0,
        le=AMOUNT_MAX_MINOR,
        description=f"{_MINOR_UNITS}: 1250 is USD 12.50 and JPY 1250.",
        examples=[1250],
    ),
]
AmountOrRest = Annotated[
    Annotated[int, Field(gt=0, le=AMOUNT_MAX_MINOR)] | None,
    Field(description=f"{_MINOR_UNITS}: 1250 is USD 12.50. Left out: all that remains.", examples=[1250]),
]
Currency = Annotated[
    str,
    _KnownCurrency(),
    Field(
        description=f"ISO 4217, upper case. Minor units have 0 decimals in {_of_decimals(0)}; 3 in {_of_decimals(3)}; "
        "2 in all others. A provider's own scale is the service's to convert, but what it cannot take is "
        "`gateway_refused`: at Stripe a last decimal other than 0 in BHD, JOD, KWD, OMR or TND; at PayPal a fraction "
        "in HUF or TWD.",
        examples=["USD"],
    ),
]
OptionalCurrency = Annotated[
    Annotated[str, _KnownCurrency()] | None,
    Field(description="Checked against the payment's currency where it is given.", examples=["USD"]),
]
CustomerId = Annotated[
    Annotated[str, Field(min_length=1, max_length=255)] | None,
    Field(
        description="Whose payment it is, in your words; a Stripe customer (`cus_…`) is named to Stripe, too. "
        f"{_NO_CARD}",
        examples=["customer-77"],
    ),
]
ExpiresAt = Annotated[
    Annotated[datetime, _Rfc3339(), AfterValidator(_in_utc)] | None,
    Field(
        description="RFC 3339 with an offset. Past this time the command is not begun, but refused when its turn "
        "comes. One that may have reached the provider before is repeated there, under the same key, until its outcome "
        "is known; so it can be executed later than this. You get its result: refund it if it is too late for you.",
        examples=["2030-01-01T12:00:00Z"],
    ),
]
GatewayName = Annotated[
    Annotated[str, Field(min_length=1, max_length=64)] | None,
    Field(
        description="Which gateway to use, of those that are set up: `momo`, `paypal`, `stripe`, `vnpay` (`instant`, "
        "for measurements, moves no money). Left out: the service's default.",
        examples=["stripe"],
    ),
]
IdempotencyKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        description="Names this request, among those of all payments, for ever: the same key and content again moves "
        f"nothing and repeats the result. Compared code point by code point, not trimmed. {_NO_CARD}",
        examples=["order-1001-charge"],
    ),
]
Metadata = Annotated[
    Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=40)],
            Annotated[str, Field(max_length=500)],
        ],
        Field(max_length=50),
        AfterValidator(_sorted_or_none),
    ]
    | None,
    Field(
        description="At most 50 texts of at most 500 characters, with keys of at most 40. Only Stripe is given "
        "them, with an authorization, charge or refund: at most 46; the others, and those whose key holds [ or ] or is "
        "one of our own (`payment_id`, `operation_number`, `order_id`, `last_capture`), are left out there. "
        f"{_NO_CARD}",
        examples=[{"channel": "web"}],
    ),
]
OffSession = Annotated[
    Annotated[bool, AfterValidator(_true_or_none)] | None,
    Field(
        description="The payer is not there to consent: charge a saved method, and decline where they would have to "
        "act. Only with gateways that can.",
        examples=[True],
    ),
]
OrderId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        description=f"The order that is paid for, in your words. {_NO_CARD}",
        examples=["order-1001"],
    ),
]
PaymentId = Annotated[
    UUID,
    _CanonicalUuid(),
    Field(
        description="Chosen by the sender, one for each payment; the Kafka key, too. Events have it in lower case.",
        examples=["0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00"],
    ),
]
PaymentMethod = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        description="How to pay, by the provider's token. Stripe: a PaymentMethod, `pm_…`. PayPal: `vault:<id>` for a "
        "stored wallet, any other text for one whose payer is asked. VNPay and MoMo: any text; it is not read. A card "
        "number is refused.",
        examples=["pm_card_visa"],
    ),
]


class _WireCommand(BaseModel):
    """Fields stand in alphabetical order, `type` last: dumped as they stand they are the canonical content."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    kind: ClassVar[OperationKind]


class NewPayment(_WireCommand):
    amount_minor: Amount
    currency: Currency
    customer_id: CustomerId = None
    expires_at: ExpiresAt = None
    gateway: GatewayName = None
    idempotency_key: IdempotencyKey
    metadata: Metadata = None
    off_session: OffSession = None
    order_id: OrderId
    payment_id: PaymentId
    payment_method: PaymentMethod

    def command(self, content: str, fingerprint: bytes, traceparent: str | None) -> Command:
        return Command(
            kind=self.kind,
            idempotency_key=self.idempotency_key,
            payment_id=self.payment_id,
            content=content,
            fingerprint=fingerprint,
            amount_minor=self.amount_minor,
            currency=self.currency,
            order_id=self.order_id,
            customer_id=self.customer_id,
            payment_method=self.payment_method,
            gateway=self.gateway,
            expires_at=self.expires_at,
            metadata=self.metadata or NO_METADATA,
            off_session=self.off_session or False,
            traceparent=traceparent,
        )


class PartOfPayment(_WireCommand):
    amount_minor: AmountOrRest = None
    currency: OptionalCurrency = None
    expires_at: ExpiresAt = None
    idempotency_key: IdempotencyKey
    metadata: Metadata = None
    payment_id: PaymentId

    def command(self, content: str, fingerprint: bytes, traceparent: str | None) -> Command:
        return Command(
            kind=self.kind,
            idempotency_key=self.idempotency_key,
            payment_id=self.payment_id,
            content=content,
            fingerprint=fingerprint,
            amount_minor=self.amount_minor,
            currency=self.currency,
            expires_at=self.expires_at,
            metadata=self.metadata or NO_METADATA,
            traceparent=traceparent,
        )


class ChargePayment(NewPayment):
    """Authorize and capture in one step. Ends in
    `payment.captured.v1`, `payment.declined.v1`, `payment.expired.v1` or `payment.command_rejected.v1`.
    """

    kind: ClassVar = OperationKind.CHARGE
    type: Literal["payment.charge.v1"]


class AuthorizePayment(NewPayment):
    """Reserve an amount for a later capture. Ends in
    `payment.authorized.v1`, `payment.declined.v1`, `payment.expired.v1` or `payment.command_rejected.v1`.
    """

    kind: ClassVar = OperationKind.AUTHORIZE
    type: Literal["payment.authorize.v1"]


class CapturePayment(PartOfPayment):
    """Collect what was authorized, or a part of it. Ends in
    `payment.captured.v1`, `payment.declined.v1` or `payment.command_rejected.v1`.
    """

    kind: ClassVar = OperationKind.CAPTURE
    type: Literal["payment.capture.v1"]


class VoidPayment(_WireCommand):
    """Release what was authorized and not captured, or end what waits for its payer, where the provider can. A charge
    that its payer pays all the same stays captured: the void is then rejected, and the charge must be refunded. It is
    always of all: with an amount it is refused. Ends in
    `payment.voided.v1`, `payment.declined.v1` or `payment.command_rejected.v1`.
    """

    kind: ClassVar = OperationKind.VOID
    expires_at: ExpiresAt = None
    idempotency_key: IdempotencyKey
    metadata: Metadata = None
    payment_id: PaymentId
    type: Literal["payment.void.v1"]

    def command(self, content: str, fingerprint: bytes, traceparent: str | None) -> Command:
        return Command(
            kind=self.kind,
            idempotency_key=self.idempotency_key,
            payment_id=self.payment_id,
            content=content,
            fingerprint=fingerprint,
            expires_at=self.expires_at,
            metadata=self.metadata or NO_METADATA,
            traceparent=traceparent,
        )


class RefundPayment(PartOfPayment):
    """Return captured money, or a part of it. Ends in
    `payment.refunded.v1`, `payment.declined.v1` or `payment.command_rejected.v1`.
    """

    kind: ClassVar = OperationKind.REFUND
    type: Literal["payment.refund.v1"]


WireCommand = ChargePayment | AuthorizePayment | CapturePayment | VoidPayment | RefundPayment

COMMAND_MODELS: Final[Mapping[str, type[WireCommand]]] = {
    "payment.charge.v1": ChargePayment,
    "payment.authorize.v1": AuthorizePayment,
    "payment.capture.v1": CapturePayment,
    "payment.void.v1": VoidPayment,
    "payment.refund.v1": RefundPayment,
}
"""Every command that this service reads, by its `type`."""
