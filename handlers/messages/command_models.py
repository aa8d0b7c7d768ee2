"""The commands on the wire, version 1, as pydantic models: what an order service may send, field by field.

Promises: types are strict (a string is not a number, true is not an integer), unknown fields are ignored, and a dumped
model is canonical: alphabetical fields, sorted metadata, times in UTC. The parser and the AsyncAPI document share them.
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

_NO_CARD: Final = "A string that is or contains a card number (by its form and check digit) is refused."

UUID_PATTERN: Final = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


class _CanonicalUuid:
    """A UUID written as 8-4-4-4-12 hexadecimal digits: the only form of 36 characters among those that Rust parses."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(min_length=36, max_length=36, strict=True)
        return core_schema.chain_schema([text, core_schema.uuid_schema(strict=False)])

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # The pattern is for senders only: checking it while reading would slow every command, and refuse nothing more.
        return handler(schema) | {"format": "uuid", "pattern": UUID_PATTERN}


class _Rfc3339:
    """A point in time with its offset, in RFC 3339; digits beyond microseconds are cut off."""

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
    """Empty metadata means the same as none, so both must be read as the same content."""
    return dict(sorted(metadata.items())) or None


def _true_or_none(value: bool) -> bool | None:
    """False means the same as leaving the field out."""
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
    Field(description=f"{_MINOR_UNITS}: 1250 is USD 12.50. If left out: all that remains.", examples=[1250]),
]
Currency = Annotated[
    str,
    _KnownCurrency(),
    Field(
        description=f"ISO 4217, upper case. Minor units have 0 decimals in {_of_decimals(0)}; 3 in {_of_decimals(3)}; "
        "2 in all others. The service converts to the provider's own scale; an amount that it cannot express is "
        "`gateway_refused`: at Stripe a last decimal other than 0 in BHD, JOD, KWD, OMR or TND; at PayPal a fraction "
        "in HUF or TWD.",
        examples=["USD"],
    ),
]
OptionalCurrency = Annotated[
    Annotated[str, _KnownCurrency()] | None,
    Field(description="If given, it must be the payment's currency.", examples=["USD"]),
]
CustomerId = Annotated[
    Annotated[str, Field(min_length=1, max_length=255)] | None,
    Field(
        description="Your own id of the customer; that of a Stripe customer (`cus_…`) is passed on to Stripe. "
        f"{_NO_CARD}",
        examples=["customer-77"],
    ),
]
ExpiresAt = Annotated[
    Annotated[datetime, _Rfc3339(), AfterValidator(_in_utc)] | None,
    Field(
        description="RFC 3339 with an offset. A command that has not begun by then is refused when its turn comes. "
        "One that may have reached the provider before is repeated there, under the same key, until its outcome is "
        "known, so it can be executed later than this. You get its result: refund it if that is too late for you.",
        examples=["2030-01-01T12:00:00Z"],
    ),
]
GatewayName = Annotated[
    Annotated[str, Field(min_length=1, max_length=64)] | None,
    Field(
        description="Which of the configured gateways to use: `momo`, `paypal`, `stripe`, `vnpay` (`instant`, for "
        "measurements, moves no money). If left out: the service's default.",
        examples=["stripe"],
    ),
]
IdempotencyKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        description="Identifies this request among those of all payments, forever: sending the same key and content "
        f"again moves nothing and repeats the result. Compared code point by code point, not trimmed. {_NO_CARD}",
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
        description="At most 50 strings of at most 500 characters, with keys of at most 40. Only Stripe receives them, "
        "with an authorization, charge or refund: at most 46 of them. The rest is left out there, and so is any whose "
        "key contains [ or ] or is one of our own (`payment_id`, `operation_number`, `order_id`, `last_capture`). "
        f"{_NO_CARD}",
        examples=[{"channel": "web"}],
    ),
]
OffSession = Annotated[
    Annotated[bool, AfterValidator(_true_or_none)] | None,
    Field(
        description="The payer is not present to consent: charge a saved method, and decline if the payer would have "
        "to act. Only for gateways that support it.",
        examples=[True],
    ),
]
OrderId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        description=f"Your own id of the order that is paid for. {_NO_CARD}",
        examples=["order-1001"],
    ),
]
PaymentId = Annotated[
    UUID,
    _CanonicalUuid(),
    Field(
        description="Chosen by the sender, one for each payment; also the Kafka key. Events have it in lower case.",
        examples=["0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00"],
    ),
]
PaymentMethod = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        description="How to pay: the provider's token. Stripe: a PaymentMethod, `pm_…`. PayPal: `vault:<id>` for a "
        "stored wallet; with any other string the payer is asked to approve. VNPay and MoMo: any string; it is not "
        "used. A card number is refused.",
        examples=["pm_card_visa"],
    ),
]


class _WireCommand(BaseModel):
    """Fields are declared in alphabetical order, `type` last: dumped in this order they are the canonical content."""

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
    """Collect the authorized amount, or a part of it. Ends in
    `payment.captured.v1`, `payment.declined.v1` or `payment.command_rejected.v1`.
    """

    kind: ClassVar = OperationKind.CAPTURE
    type: Literal["payment.capture.v1"]


class VoidPayment(_WireCommand):
    """Release the authorized amount that was not captured, or cancel what waits for its payer, if the provider can. A
    charge that the payer pays all the same stays captured: the void is then rejected, and the charge must be refunded.
    A void always releases everything: with an amount it is refused. Ends in
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
