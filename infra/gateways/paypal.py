"""PayPal's gateway: its capabilities, and the requests and answers of each operation.

`paypal_http.py` has the configuration and the connection, `paypal_objects.py` the amounts, our marks and the status
tables, `paypal_errors.py` the error table, `paypal_webhooks.py` the webhooks.

Promise: a success or a refusal is reported only if PayPal reports it for this very operation. An order that is
COMPLETED need not be paid; only the payments inside it show that. Whatever we cannot read is `Pending` or an
`OutcomeUnknown`. Every POST carries a `PayPal-Request-Id` made of `request.provider_key` and the step, and every
payment our marks:
`custom_id` is `payment_id.operation_number` of the operation that opened the order (captures of a hold inherit it), and
`invoice_id`, which PayPal takes once per account, is `payment_id.operation_number.kind` of the operation itself.

Sources: https://developer.paypal.com/docs/api/orders/v2/, https://developer.paypal.com/docs/api/payments/v2/,
https://developer.paypal.com/reference/guidelines/idempotency/,
https://developer.paypal.com/docs/checkout/advanced/authorization-honor/. What they leave open is called
unconfirmed here and fails safe.
"""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, assert_never

from domain.capabilities import AmountLimits, Capabilities, Listing
from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError, GatewayUnreachable, OutcomeUnknown
from domain.money import MINOR_UNITS
from domain.operations import (
    Expired,
    GatewayRequest,
    NotExecuted,
    OperationState,
    Outcome,
    Pending,
    Succeeded,
    Unknown,
)
from domain.ports import Clock, Movement
from infra.gateways.evidence import conclude, understood
from infra.gateways.paypal_errors import translate_refusal
from infra.gateways.paypal_http import NAME, WHOLE, Json, PayPalHttp, PayPalRefused, quoted
from infra.gateways.paypal_http import PayPalConfig as PayPalConfig  # noqa: PLC0414 - how mypy re-exports
from infra.gateways.paypal_objects import (
    CAPTURES,
    AmountNotRepresentable,
    amount_json,
    hold_of,
    invoice_of,
    left_of_hold,
    mark_of,
    minor_of,
    open_hold,
    payments_of,
    read_capture,
    read_captures,
    read_mark,
    read_opening,
    read_refund,
    read_refunds,
    read_release,
    read_void_of,
    refundable,
    time_of,
    without_effect,
)

VAULT: Final = "vault:"
"""A payment method `vault:<id>` is a PayPal wallet that the payer stored; any other means a redirect."""

EXPIRY_SHOWS_AFTER: Final = timedelta(hours=3)
"""The shortest approval window that is reported for PayPal. An order that is gone sooner has not expired."""

EXPIRY_SHOWS_WITHIN: Final = timedelta(days=3)
"""The longest approval window that PayPal grants. An order that is gone later is gone for another reason."""


class PayPalGateway:
    """PayPal's orders and the payments in them. Create it inside the event loop that uses it.

    The provider's payment (`gateway_payment_id`) is the order, which contains the ids of its holds and captures.
    Exception messages never contain a secret or a body.
    """

    name = NAME

    def __init__(self, config: PayPalConfig, clock: Clock = lambda: datetime.now(UTC)) -> None:
        self._config = config
        self._clock = clock
        self._api = PayPalHttp(config)
        self.rests_seconds, self.connections = self._api.rests_seconds, self._api.connections
        self.capabilities = Capabilities(
            operations=frozenset(OperationKind),
            currencies=config.currencies,
            partial_capture=True,
            multi_capture=True,
            partial_refund=True,
            off_session=False,  # a stored wallet (`vault:`) never asks for the payer
            cancel_waiting=True,
            idempotency_retention=timedelta(hours=5),  # PayPal promises 6 for orders, 45 days for later requests
            listing=Listing.MOVEMENTS,
            limits={code: AmountLimits(minimum_minor=10 ** MINOR_UNITS[code]) for code in WHOLE & config.currencies},
        )

    async def authorize(self, request: GatewayRequest) -> Outcome:
        """Hold `request.amount` for a later capture; `RequiresAction` if the payer must consent first."""
        return await self._open(request)

    async def charge(self, request: GatewayRequest) -> Outcome:
        """Capture `request.amount` at once; `RequiresAction` if the payer must consent first."""
        return await self._open(request)

    async def capture(self, request: GatewayRequest) -> Outcome:
        """Capture `request.amount` of the hold; `request.is_final` releases the rest.

        Source: https://developer.paypal.com/docs/api/payments/v2/#authorizations_capture
        """
        try:
            amount = amount_json(request.amount)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        order = await self._order_before(request)
        found = understood(NAME, read_captures, order, request)
        if not isinstance(found, Unknown):
            return found
        authorization = understood(NAME, open_hold, order)
        if authorization is None:
            return without_effect(request, f"order {order['id']} has no hold to capture from", "NO_AUTHORIZATION")
        body = {"amount": amount, "final_capture": request.is_final, "invoice_id": invoice_of(request)}
        path = f"/v2/payments/authorizations/{quoted(authorization['id'])}/capture"
        return await self._post(request, path, body, "capture", read_capture)

    async def void(self, request: GatewayRequest) -> Outcome:
        """Release the rest of the hold, or cancel an order that the payer has not paid yet.

        Nothing is sent if less is left than is to be released: somebody captured in PayPal's pages, which our books do
        not have yet.

        To cancel an order nothing is sent: only our own call executes an order, and none is made after this.

        Source: https://developer.paypal.com/docs/api/payments/v2/#authorizations_void
        """
        order = await self._order_before(request)
        found = understood(NAME, read_void_of, order, request)
        authorization = hold_of(order)
        if authorization is None or isinstance(found, Succeeded):
            return found
        if understood(NAME, left_of_hold, authorization, order, request) < request.amount.minor:
            return found
        path = f"/v2/payments/authorizations/{quoted(authorization['id'])}/void"
        return await self._post(request, path, None, "void", partial(read_release, authorization["id"]))

    async def refund(self, request: GatewayRequest) -> Outcome:
        """Return `request.amount` of one capture, the one with the least left that suffices.

        `Pending` while PayPal processes it, which may take days. A repeated attempt looks for its own refund first. If
        somebody refunds in PayPal's pages between two attempts, so that the second chooses another capture, the request
        id and the invoice id are still those of the first.

        Source: https://developer.paypal.com/docs/api/payments/v2/#captures_refund
        """
        try:
            amount = amount_json(request.amount)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        order = await self._order_before(request)
        found = understood(NAME, read_refunds, order, request)
        if not isinstance(found, Unknown):
            return found
        capture = understood(NAME, refundable, order, request)
        if not isinstance(capture, dict):
            return capture
        body = {"amount": amount, "custom_id": mark_of(request), "invoice_id": invoice_of(request)}
        return await self._post(
            request, f"/v2/payments/captures/{quoted(capture['id'])}/refund", body, "refund", read_refund
        )

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Execute an order once the payer has approved it, at most once however often this is called.

        A capture, void or refund is only queried, as by `status`: PayPal goes on with these by itself.
        """
        if request.kind not in (OperationKind.AUTHORIZE, OperationKind.CHARGE) or request.reference is None:
            return await self.status(request)
        order = await self._order(request.reference)
        return self._gone(request) if order is None else await self._proceed(order, request)

    async def status(self, request: GatewayRequest) -> Outcome:
        """Query the operation's outcome. Changes nothing at PayPal.

        PayPal cannot be searched by our marks, so an order whose id we never learnt is `Unknown`. Such an order moves
        no money unless its payment method is vaulted; then repeating the POST with the same request id, while PayPal
        remembers it, returns the order.

        Raises:
            GatewayUnreachable: the query did not reach PayPal.
            OutcomeUnknown: there was no readable answer.
        """
        reference = request.gateway_payment_id or request.reference
        if reference is None:
            return Unknown("the order's id is not known")
        order = await self._order(reference)
        if order is None:
            return self._gone(request)
        match request.kind:
            case OperationKind.AUTHORIZE | OperationKind.CHARGE:
                return understood(NAME, read_opening, order, request)
            case OperationKind.CAPTURE:
                return understood(NAME, read_captures, order, request)
            case OperationKind.VOID:
                return understood(NAME, read_void_of, order, request)
            case OperationKind.REFUND:
                return await self._refund_status(order, request)
            case _:
                assert_never(request.kind)

    async def movements(self, since: datetime, until: datetime) -> AsyncIterator[Movement]:
        """Every capture and refund from `since` to before `until`, from Transaction Search; it lags up to 3 hours.

        The app at PayPal needs permission to search transactions.

        Raises:
            GatewayError: the list could not be read to its end.

        Source: https://developer.paypal.com/docs/api/transaction-search/v1/
        """
        seen: set[str] = set()
        begin, end = (each.astimezone(UTC).replace(microsecond=0) for each in (since, until))
        while begin < end:
            stop = min(begin + SEARCH_RANGE, end)
            async for transaction in self._transactions(begin, stop):
                movement = understood(NAME, _movement, transaction)
                # A transaction may be on two pages, if new ones arrive while we read.
                if movement is not None and movement.reference not in seen and begin <= movement.moved_at < stop:
                    seen.add(movement.reference)
                    yield movement
            begin = stop

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    # --- opening ----------------------------------------------------------------------------------------------------

    async def _open(self, request: GatewayRequest) -> Outcome:
        """Create the order, or resume the one that an earlier attempt created."""
        if request.reference is not None:
            return await self.resume(request)
        try:
            body = self._order_body(request)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        try:
            order = await self._api.post("/v2/checkout/orders", body, request_id=f"{request.provider_key}:order")
        except PayPalRefused as refused:
            return await self._conclude(refused, request)
        return await self._proceed(order, request)

    def _order_body(self, request: GatewayRequest) -> Json:
        unit = {
            "custom_id": mark_of(request),
            "invoice_id": invoice_of(request),
            "amount": amount_json(request.amount),
        }
        return {
            "intent": "AUTHORIZE" if request.kind is OperationKind.AUTHORIZE else "CAPTURE",
            "purchase_units": [unit],
            "payment_source": {"paypal": self._wallet(request.payment_method)},
        }

    def _wallet(self, payment_method: str | None) -> Json:
        if payment_method is not None and payment_method.startswith(VAULT):
            stored = {
                "payment_initiator": "MERCHANT",
                "usage": "SUBSEQUENT",
                "usage_pattern": "UNSCHEDULED_POSTPAID",
            }
            return {"vault_id": payment_method.removeprefix(VAULT), "stored_credential": stored}
        experience = {
            "return_url": self._config.return_url,
            "cancel_url": self._config.cancel_url,
            "user_action": "PAY_NOW",
            "shipping_preference": "NO_SHIPPING",
        }
        return {"experience_context": experience}

    async def _proceed(self, order: Json, request: GatewayRequest) -> Outcome:
        """Execute an approved order; otherwise read its outcome."""
        found = understood(NAME, read_opening, order, request)
        if not isinstance(found, Pending) or order["status"] != "APPROVED" or any(payments_of(order).values()):
            return found
        try:
            return await self._execute(order["id"], request._replace(reference=order["id"]))
        except GatewayContractBroken:
            raise
        except OutcomeUnknown:
            return Pending(order["id"])

    async def _execute(self, order_id: str, request: GatewayRequest) -> Outcome:
        """Authorize or capture an order that the payer approved.

        If the answer is lost, the caller reports `Pending`: PayPal has the order, and it is queried later. Repeating
        this after PayPal forgot the request id does no harm: an order is authorized or captured only once.
        """
        step = "authorize" if request.kind is OperationKind.AUTHORIZE else "capture"
        path = f"/v2/checkout/orders/{quoted(order_id)}/{step}"
        try:
            order = await self._api.post(path, {}, request_id=f"{request.provider_key}:{step}")
            return understood(NAME, read_opening, order, request)
        except PayPalRefused as refused:
            # It proves nothing about an earlier call to execute the same order, whose answer may have been lost.
            return await self._conclude(refused, request._replace(state=OperationState.PENDING))

    async def _refund_status(self, order: Json, request: GatewayRequest) -> Outcome:
        """From the order; or, if the order does not list the refund, by its id from an earlier answer."""
        found = understood(NAME, read_refunds, order, request)
        if request.reference is None or not isinstance(found, Unknown):
            return found
        refund = await self._api.get(f"/v2/payments/refunds/{quoted(request.reference)}")
        return understood(NAME, read_refund, refund, request) if refund is not None else found

    def _gone(self, request: GatewayRequest) -> Outcome:
        """The outcome when PayPal answers that the order does not exist: expired, unless it may have been executed.

        It counts as expired only once its time can be over, because a new order may not be visible everywhere at PayPal
        yet. PayPal keeps paid orders, but for how long is unconfirmed. So an order that is first found gone after days
        is `Unknown`, for a person to look at.
        """
        began = request.first_dispatched_at
        is_in_window = began is not None and EXPIRY_SHOWS_AFTER <= self._clock() - began < EXPIRY_SHOWS_WITHIN
        if request.state is OperationState.REQUIRES_ACTION and request.reference is not None and is_in_window:
            return Expired(request.reference, "RESOURCE_NOT_FOUND")
        return Unknown("PayPal shows no such order")

    # --- lists ------------------------------------------------------------------------------------------------------

    async def _transactions(self, since: datetime, until: datetime) -> AsyncIterator[Json]:
        """The transactions of this time; it is halved for as long as a part has more than one search returns."""
        page, pages = 1, 1
        while page <= pages:
            answer = await self._api.search(since, until, page)
            if answer is None and page == 1:
                async for transaction in self._halves(since, until):
                    yield transaction
                return
            if answer is None:
                raise OutcomeUnknown(NAME, "the list grew too long while it was being read")
            for transaction in understood(NAME, _listed, answer):
                yield transaction
            page, pages = page + 1, understood(NAME, _pages, answer)

    async def _halves(self, since: datetime, until: datetime) -> AsyncIterator[Json]:
        middle = (since + (until - since) / 2).replace(microsecond=0)
        if middle <= since:
            raise GatewayContractBroken(NAME, "a single second has more transactions than one search returns")
        for begin, end in ((since, middle), (middle, until)):
            async for transaction in self._transactions(begin, end):
                yield transaction

    # --- shared steps -----------------------------------------------------------------------------------------------

    async def _order(self, reference: str) -> Json | None:
        return await self._api.get(f"/v2/checkout/orders/{quoted(reference)}")

    async def _order_before(self, request: GatewayRequest) -> Json:
        """The order that a capture, void or refund acts on. If this raises, this attempt has sent nothing else.

        Raises:
            GatewayUnreachable: the order could not be queried, or PayPal does not show it.
        """
        assert request.gateway_payment_id is not None, "a capture, void or refund acts on a payment known to PayPal"
        try:
            order = await self._order(request.gateway_payment_id)
        except GatewayError as error:
            raise GatewayUnreachable(NAME, f"nothing was executed: {error.message}") from error
        if order is None:
            raise GatewayUnreachable(NAME, "nothing was executed: PayPal shows no such order")
        return order

    async def _post(
        self,
        request: GatewayRequest,
        path: str,
        body: Json | None,
        step: str,
        read: Callable[[Json, GatewayRequest], Outcome],
    ) -> Outcome:
        """Send with the operation's key; return the outcome of the answer, or what a refusal proves."""
        try:
            answer = await self._api.post(path, body, request_id=f"{request.provider_key}:{step}")
        except PayPalRefused as refused:
            return await self._conclude(refused, request)
        return understood(NAME, read, answer, request)

    async def _conclude(self, refused: PayPalRefused, request: GatewayRequest) -> Outcome:
        translation = translate_refusal(refused, request)
        return await conclude(translation, request, status=self.status, refused=refused, facts=str(refused))


# --- lists ----------------------------------------------------------------------------------------------------------

SEARCH_RANGE: Final = timedelta(days=31)
"""The longest time that one search may span."""

RECEIVED: Final = "T00"
REFUNDED: Final = "T1107"
"""Event codes: a payment between accounts, which is listed in both directions, and a refund by the merchant.

Others are fees, disputes, reversals by PayPal, and holds. Source:
https://developer.paypal.com/docs/transaction-search/transaction-event-codes/.
"""
EXECUTED: Final = frozenset({"S", "V"})
"""Transaction statuses: successful, and successful but later refunded in full. Pending and denied moved no money."""


def _listed(answer: Json) -> list[Json]:
    return [each["transaction_info"] for each in answer.get("transaction_details") or ()]


def _pages(answer: Json) -> int:
    return int(answer.get("total_pages") or 0)


def _movement(transaction: Json) -> Movement | None:
    """A capture or refund; None if it is neither, or was not executed.

    A refund may be listed with the marks of its capture. So the kind in the mark must agree, or `operation_number` is
    None; the movement is then identified by its id, which is the refund's as well.
    """
    code, amount = str(transaction["transaction_event_code"]), transaction["transaction_amount"]
    is_refund, is_negative = code == REFUNDED, str(amount["value"]).startswith("-")
    if transaction["transaction_status"] not in EXECUTED or not (is_refund or code.startswith(RECEIVED)):
        return None
    if is_refund != is_negative:
        return None  # a payment that we sent, or a refund that we received
    own, inherited = read_mark(transaction.get("invoice_id")), read_mark(transaction.get("custom_field"))
    marks, kinds = own or inherited, (OperationKind.REFUND,) if is_refund else CAPTURES
    moved_at = time_of(transaction["transaction_initiation_date"])
    if moved_at is None:
        raise GatewayContractBroken(NAME, "a transaction without a time")
    return Movement(
        reference=str(transaction["transaction_id"]),
        moved_at=moved_at,
        is_refund=is_refund,
        currency=str(amount["currency_code"]),
        amount_minor=minor_of({**amount, "value": str(amount["value"]).removeprefix("-")}),
        payment_id=marks.payment_id if marks else None,
        operation_number=own.operation_number if own is not None and own.kind in kinds else None,
    )
