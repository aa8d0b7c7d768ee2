"""Stripe's gateway: configuration, capabilities, the requests of each operation, and its bounded HTTP client.

`stripe_objects.py` has the amounts, our marks, the status table and the declines; `stripe_errors.py` the error table;
`stripe_webhooks.py` the webhooks.

Promise: a success or a refusal is reported only if Stripe reports it for this very operation. Whatever we cannot read
is `Pending` or an `OutcomeUnknown`. Every POST carries `request.provider_key`, and every object that we create or
capture carries our payment id and operation number in its metadata, so a query can find it if the answer was lost.

Sources: https://docs.stripe.com/api/payment_intents, https://docs.stripe.com/api/refunds,
https://docs.stripe.com/error-low-level, https://docs.stripe.com/payments/multicapture, at the version that
`StripeConfig` pins.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, assert_never

import stripe
from pydantic import BaseModel, ConfigDict, SecretStr
from stripe.params import (
    PaymentIntentCaptureParams,
    PaymentIntentCreateParams,
    PaymentIntentListParams,
    RefundCreateParams,
)

from domain.capabilities import AmountLimits, Capabilities, Listing
from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError, GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.operations import (
    GatewayRequest,
    NotExecuted,
    Outcome,
    RequiresAction,
    Succeeded,
    Unknown,
)
from domain.ports import Clock, Connections, Statement
from infra.gateways.evidence import conclude, understood
from infra.gateways.stripe_errors import facts_of, translate_error
from infra.gateways.stripe_objects import (
    ACTION_WINDOW,
    CURRENCIES,
    HUNDREDTHS_WITHOUT_FRACTIONS,
    LAST_CAPTURE,
    NAME,
    AmountNotRepresentable,
    from_stripe_amount,
    marks_of,
    metadata_of,
    only,
    read_capture,
    read_opening,
    read_refund,
    read_void,
    statement_of,
    to_stripe_amount,
)
from infra.gateways.transport import NOTHING_WAS_SENT, Rest, create_client

MINIMUMS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("AUD", "BRL", "CAD", "CHF", "EUR", "INR", "JPY", "NZD", "SGD", "USD"), 50),
    **dict.fromkeys(("AED", "MYR", "PLN", "RON"), 200),
    **dict.fromkeys(("NOK", "SEK"), 300),
    **dict.fromkeys(("MXN", "THB"), 1_000),
    **{"BGN": 100, "CZK": 1_500, "DKK": 250, "GBP": 30, "HKD": 400, "HUF": 17_500},
}
"""In minor units, for settlement in the same currency. Source: https://docs.stripe.com/currencies."""

MAXIMUMS: Final[Mapping[str, int]] = {"HUF": 9_999_999_999, "IDR": 999_999_999_999, "INR": 999_999_999}
MAXIMUM: Final = 99_999_999
"""Eight digits, in Stripe's units, for every currency not listed above (JPY cards have more). Source: as above."""

LIST_PAGES_MAX: Final = 3

# The SDK logs whole bodies at DEBUG and Stripe's messages at INFO; neither belongs in our logs.
logging.getLogger("stripe").setLevel(logging.WARNING)

T = TypeVar("T")


class StripeConfig(BaseModel):
    """How to reach Stripe. `api_base` None means Stripe itself; the key decides between live and test mode.

    `multi_capture` requests several captures per authorization, which Stripe grants per account and card
    (https://docs.stripe.com/payments/multicapture). If False, the first capture releases the rest of the hold. If
    True, a partial capture is refused for a card without multicapture.
    """

    model_config = ConfigDict(frozen=True)

    api_key: SecretStr
    api_base: str | None = None
    api_version: str = "2026-10-28.endive"
    timeout_seconds: float = 20.0
    """For one whole exchange, from waiting for a connection to the last byte read."""
    connect_timeout_seconds: float = 5.0
    max_connections: int = 64
    return_url: str = "https://example.invalid/return"
    """Where Stripe sends the payer's browser after 3-D Secure."""
    multi_capture: bool = False
    action_window: timedelta = ACTION_WINDOW
    """How long a payer may take for 3-D Secure, from the PaymentIntent's creation. Stripe itself waits forever."""


class StripeGateway:
    """Stripe's PaymentIntents and Refunds, for cards. Create it inside the event loop that uses it.

    `clock` decides whether a payer's time is over. Each method may be called any number of times with the same request:
    while Stripe remembers the key, a repeated call returns the first one's answer. Exception messages never contain a
    secret or a body.
    """

    name = NAME

    def __init__(self, config: StripeConfig, clock: Clock = lambda: datetime.now(UTC)) -> None:
        stripe.enable_telemetry = False  # it sends timings to Stripe and writes an id to the home folder
        self._config = config
        self._clock = clock
        self._http = _BoundedHttpClient(config)
        self.rests_seconds, self.connections = self._http.rest.seconds, self._http.connections
        self._api = stripe.StripeClient(
            config.api_key.get_secret_value(),
            stripe_version=config.api_version,
            base_addresses={"api": config.api_base} if config.api_base else None,
            max_network_retries=0,
            http_client=self._http,
        ).v1
        self.capabilities = Capabilities(
            operations=frozenset(OperationKind),
            currencies=CURRENCIES,
            partial_capture=True,
            multi_capture=config.multi_capture,
            partial_refund=True,
            off_session=True,
            cancel_waiting=True,
            idempotency_retention=timedelta(hours=23),  # Stripe promises 24
            listing=Listing.PAYMENTS,
            limits={
                currency: AmountLimits(
                    MINIMUMS.get(currency, 1), from_stripe_amount(_maximum_in_stripes_units(currency), currency)
                )
                for currency in CURRENCIES
            },
        )

    async def authorize(self, request: GatewayRequest) -> Outcome:
        """Hold `request.amount` for a later capture; `expires_at` is when Stripe releases the hold."""
        return await self._open(request, capture_method="manual")

    async def charge(self, request: GatewayRequest) -> Outcome:
        """Capture `request.amount` at once."""
        return await self._open(request, capture_method="automatic")

    async def capture(self, request: GatewayRequest) -> Outcome:
        """Capture `request.amount` of the hold; `request.is_final` releases the rest."""
        return await self._capture(request, request.amount, is_final=request.is_final, read=read_capture)

    async def void(self, request: GatewayRequest) -> Outcome:
        """Release the rest of the hold.

        An untouched hold is cancelled, a partly captured one closed by a final capture of 0. So with `multi_capture`
        the PaymentIntent is read first; if its hold is already released, nothing is sent.

        Source: https://docs.stripe.com/payments/multicapture, "Release uncaptured funds".
        """
        if not self._config.multi_capture:
            return await self._cancel(request)
        try:
            intent = await self._payment_intent(_payment_of(request))
        except GatewayError as error:
            raise GatewayUnreachable(NAME, f"nothing was released: {error.message}") from error
        if intent is None or intent.status != "requires_capture" or not intent.amount_received:
            is_released = intent is not None and isinstance(read_void(intent, request), Succeeded)
            return Succeeded(_payment_of(request)) if is_released else await self._cancel(request)
        nothing = Money(0, request.amount.currency)
        return await self._capture(request, nothing, is_final=True, read=read_void)

    async def refund(self, request: GatewayRequest) -> Outcome:
        """Return `request.amount` of the captured money; `Pending` while Stripe processes it, which may take days."""
        try:
            params: RefundCreateParams = {
                "payment_intent": _payment_of(request),
                "amount": to_stripe_amount(request.amount),
                "metadata": metadata_of(request),
            }
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        return await self._post(
            request,
            lambda options: self._api.refunds.create_async(params, options),
            read_refund,
        )

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Query the provider, because Stripe goes on by itself once the payer has acted; cancel an abandoned payment.

        Otherwise the payer could still pay at any later time, long after the order service gave up the order.

        Raises:
            GatewayUnreachable: the query or the cancellation did not reach Stripe.
            OutcomeUnknown: there was no readable answer; the next call queries again.
        """
        outcome = await self.status(request)
        if not isinstance(outcome, RequiresAction) or outcome.expires_at is None:
            return outcome
        if self._clock() < outcome.expires_at:
            return outcome
        return await self._abandon(request._replace(reference=outcome.reference))

    async def status(self, request: GatewayRequest) -> Outcome:
        """Query the operation's outcome. Changes nothing at Stripe.

        An authorization or charge without a reference is searched for by our metadata. Stripe's search lags by a minute
        or more, so not finding it proves nothing.

        Raises:
            GatewayUnreachable: the query did not reach Stripe.
            OutcomeUnknown: there was no readable answer.
        """
        match request.kind:
            case OperationKind.AUTHORIZE | OperationKind.CHARGE:
                return _shown(self._read_opening, await self._find_opened(request), request)
            case OperationKind.CAPTURE:
                return _shown(read_capture, await self._payment_intent(_payment_of(request)), request)
            case OperationKind.VOID:
                return _shown(read_void, await self._payment_intent(_payment_of(request)), request)
            case OperationKind.REFUND:
                return _shown(read_refund, await self._find_refund(request), request)
            case _:
                assert_never(request.kind)

    async def statements(self, since: datetime, until: datetime) -> AsyncIterator[Statement]:
        """Every PaymentIntent created from `since` to before `until`, with the amounts received and refunded.

        Raises:
            GatewayError: the list could not be read to its end.
        """
        params: PaymentIntentListParams = {
            "created": {"gte": int(since.timestamp()), "lt": int(until.timestamp())},
            "limit": 100,
            "expand": ["data.latest_charge"],
        }
        while True:
            page = await self._answer(self._api.payment_intents.list_async(params))
            if page is None:
                raise GatewayContractBroken(NAME, "the list was refused")
            for intent in page.data:
                yield statement_of(intent)
            if not page.has_more:
                return
            params["starting_after"] = page.data[-1].id

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close_async()

    # --- mutating calls ---------------------------------------------------------------------------------------------

    async def _open(self, request: GatewayRequest, *, capture_method: str) -> Outcome:
        try:
            params = self._opening_params(request, capture_method)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        return await self._post(
            request,
            lambda options: self._api.payment_intents.create_async(params, options),
            self._read_opening,
        )

    def _read_opening(self, intent: stripe.PaymentIntent, request: GatewayRequest) -> Outcome:
        return read_opening(intent, request, self._config.action_window)

    def _opening_params(self, request: GatewayRequest, capture_method: str) -> PaymentIntentCreateParams:
        params: PaymentIntentCreateParams = {
            "amount": to_stripe_amount(request.amount),
            "currency": request.amount.currency.lower(),
            "capture_method": capture_method,
            "confirm": True,
            "allowed_payment_method_types": ["card"],
            "return_url": self._config.return_url,
            "metadata": metadata_of(request),
            "expand": ["latest_charge"],
        }
        if request.payment_method is not None:
            params["payment_method"] = request.payment_method
        if request.customer_id is not None and request.customer_id.startswith("cus_"):
            params["customer"] = request.customer_id
        if request.off_session:
            params["off_session"] = True
        if capture_method == "manual" and self._config.multi_capture:
            params["payment_method_options"] = {"card": {"request_multicapture": "if_available"}}
        return params

    async def _capture(
        self,
        request: GatewayRequest,
        amount: Money,
        *,
        is_final: bool,
        read: Callable[[stripe.PaymentIntent, GatewayRequest], Outcome],
    ) -> Outcome:
        try:
            params: PaymentIntentCaptureParams = {
                "amount_to_capture": to_stripe_amount(amount),
                "metadata": {LAST_CAPTURE: str(request.operation_number)},
            }
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        if self._config.multi_capture and not is_final:
            params["final_capture"] = False  # Stripe's default is True; without multicapture it refuses the parameter
        return await self._post(
            request,
            lambda options: self._api.payment_intents.capture_async(_payment_of(request), params, options),
            read,
        )

    async def _cancel(self, request: GatewayRequest) -> Outcome:
        return await self._post(
            request,
            lambda options: self._api.payment_intents.cancel_async(
                _payment_of(request), {"cancellation_reason": "requested_by_customer"}, options
            ),
            read_void,
        )

    async def _abandon(self, request: GatewayRequest) -> Outcome:
        """Cancel a PaymentIntent whose payer did not act in time, and return the outcome that Stripe then shows.

        Only `canceled` is evidence that nothing was or will be paid. If Stripe refuses to cancel, the payer may have
        been faster: the refusal itself proves nothing, so the status is queried. If the payer authorizes a hold just
        before, the cancellation releases it. It needs a key of its own: with the operation's key, Stripe would repeat
        its answer to the creation of the PaymentIntent.

        Source: https://docs.stripe.com/api/payment_intents/cancel.
        """
        assert request.reference is not None, "only a PaymentIntent that Stripe has shown is abandoned"
        key = f"{request.provider_key}:abandoned"
        intent = await self._answer(
            self._api.payment_intents.cancel_async(
                request.reference, {"cancellation_reason": "abandoned"}, {"idempotency_key": key}
            )
        )
        return await self.status(request) if intent is None else understood(NAME, self._read_opening, intent, request)

    async def _post(
        self,
        request: GatewayRequest,
        call: Callable[[stripe.RequestOptions], Awaitable[T]],
        read: Callable[[T, GatewayRequest], Outcome],
    ) -> Outcome:
        """Send with the operation's key; return the outcome of the answer, or what an error proves."""
        try:
            answer = await self._in_time(call({"idempotency_key": request.provider_key}))
        except stripe.StripeError as error:
            translation, facts = translate_error(error, request), facts_of(error)
            return await conclude(translation, request, status=self.status, refused=error, facts=facts)
        return understood(NAME, read, answer, request)

    # --- queries ----------------------------------------------------------------------------------------------------

    async def _payment_intent(self, reference: str) -> stripe.PaymentIntent | None:
        return await self._answer(self._api.payment_intents.retrieve_async(reference, {"expand": ["latest_charge"]}))

    async def _find_opened(self, request: GatewayRequest) -> stripe.PaymentIntent | None:
        if request.reference is not None:
            return await self._payment_intent(request.reference)
        marks = marks_of(request)
        query = " AND ".join(f"metadata['{key}']:'{value}'" for key, value in marks.items())
        found = await self._answer(
            self._api.payment_intents.search_async({"query": query, "expand": ["data.latest_charge"]})
        )
        if found is not None and found.data:
            return only(found.data, marks)
        return await self._find_recent(request, marks)

    async def _find_recent(self, request: GatewayRequest, marks: Mapping[str, str]) -> stripe.PaymentIntent | None:
        """Look through the newest PaymentIntents, which the search may not show yet."""
        if request.first_dispatched_at is None:
            return None
        params: PaymentIntentListParams = {
            "created": {"gte": int(request.first_dispatched_at.timestamp()) - 60},
            "limit": 100,
            "expand": ["data.latest_charge"],
        }
        for _ in range(LIST_PAGES_MAX):
            page = await self._answer(self._api.payment_intents.list_async(params))
            found = only(page.data, marks) if page is not None else None
            if found is not None or page is None or not page.has_more:
                return found
            params["starting_after"] = page.data[-1].id
        return None

    async def _find_refund(self, request: GatewayRequest) -> stripe.Refund | None:
        if request.reference is not None:
            return await self._answer(self._api.refunds.retrieve_async(request.reference))
        page = await self._answer(self._api.refunds.list_async({"payment_intent": _payment_of(request), "limit": 100}))
        return only(page.data, marks_of(request)) if page is not None else None

    async def _answer(self, call: Awaitable[T]) -> T | None:
        """Stripe's answer to a query; None if it refuses, as it does for an object that does not exist."""
        try:
            return await self._in_time(call)
        except stripe.InvalidRequestError:
            return None
        except (stripe.RateLimitError, stripe.AuthenticationError, stripe.PermissionError) as error:
            raise GatewayUnreachable(NAME, facts_of(error)) from error
        except stripe.APIConnectionError as error:
            is_sent = not isinstance(error.__cause__, NOTHING_WAS_SENT)
            failure = OutcomeUnknown if is_sent else GatewayUnreachable
            raise failure(NAME, f"no answer ({type(error.__cause__).__name__})") from error
        except stripe.StripeError as error:
            raise OutcomeUnknown(NAME, facts_of(error)) from error

    async def _in_time(self, call: Awaitable[T]) -> T:
        """Await the call, within the timeout. Cancelling our own task passes through.

        Raises:
            StripeError: as the SDK raised it.
            OutcomeUnknown: the call timed out.
            GatewayContractBroken: the SDK failed to read the answer (any other exception).
        """
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                return await call
        except stripe.StripeError:
            raise
        except TimeoutError as error:
            raise OutcomeUnknown(NAME, f"no answer within {self._config.timeout_seconds} s") from error
        except Exception as error:
            raise GatewayContractBroken(NAME, f"{type(error).__name__} while reading an answer") from error


def _maximum_in_stripes_units(currency: str) -> int:
    maximum = MAXIMUMS.get(currency, MAXIMUM)
    return maximum - maximum % 100 if currency in HUNDREDTHS_WITHOUT_FRACTIONS else maximum


def _shown(read: Callable[[T, GatewayRequest], Outcome], found: T | None, request: GatewayRequest) -> Outcome:
    return Unknown("Stripe shows no such object") if found is None else understood(NAME, read, found, request)


def _payment_of(request: GatewayRequest) -> str:
    assert request.gateway_payment_id is not None, "a capture, void or refund acts on a payment known to Stripe"
    return request.gateway_payment_id


class _BoundedHttpClient(stripe.HTTPXClient):
    """Stripe's httpx client with bounded connections.

    The SDK's own client takes no limits, and passes the body in a form that httpx has deprecated.
    """

    def __init__(self, config: StripeConfig) -> None:
        super().__init__(timeout=None)
        self.rest = Rest()
        self._bounded = create_client(
            max_connections=config.max_connections,
            timeout_seconds=config.timeout_seconds,
            connect_timeout_seconds=config.connect_timeout_seconds,
            verify=ssl.create_default_context(cafile=stripe.ca_bundle_path),
        )

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        try:
            response = await self._bounded.request(method, url, headers=dict(headers), content=post_data)
        except Exception as error:
            raise _connection_failed(error) from error
        self.rest.note(response)
        return response.content, response.status_code, response.headers

    def connections(self) -> Connections:
        return self._bounded.pools.connections()

    async def close_async(self) -> None:
        await self._bounded.aclose()
        await self._client_async.aclose()


def _connection_failed(error: Exception) -> Exception:
    return stripe.APIConnectionError(f"{type(error).__name__} was raised")  # type: ignore[no-untyped-call]
