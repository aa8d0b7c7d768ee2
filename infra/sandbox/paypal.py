"""A local PayPal simulator: the real paths, fields, errors and idempotency, its own books, webhooks, and faults.

It keeps its state across requests and, with a state file, across restarts. It is for tests, demos and benchmarks: it
accepts any client id that does not begin with `bad`, so it belongs on a loopback address. Not modelled: cards, fees,
reauthorization, the vault's own API, several purchase units.

A `PayPal-Request-Id` stands for one execution, whatever its path and body (the documentation leaves that open). A
repeated id is answered with the present state of the object that it created. In fault rules, `confirm` is the execution
of an approved order, `cancel` a release, `token` a request for an access token; `payment_method` is the wallet's name.

Besides PayPal's paths it answers under `/_sandbox/paypal`: `books`, `payments/{our payment id}`, `checkoutnow` (the
payer's page), `orders/{id}/approve|deny|expire`, `authorizations/{id}/expire`, `captures/{id}/dispute|reverse`,
`disputes/{id}/won|lost`, `{authorizations|captures|refunds}/{id}/settle`, `refunds/{id}/unlist`, `tokens`, `faults`,
`manners`, `latency`, `webhooks`, `reset`; and what a person can do in PayPal's pages, for `?amount=` or the rest:
`authorizations/{id}/capture|void` (a capture with `?final=true` releases the rest), `captures/{id}/refund`.
"""

import asyncio
import base64
import copy
import html
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, Final
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from domain.money import MINOR_UNITS
from infra.sandbox.connections import NoAnswer
from infra.sandbox.controls import asking_to_rest, control_routes, hold_up, known_to_reads, spoiled
from infra.sandbox.faults import Action, Call, Fault, Faults
from infra.sandbox.journal import Journal
from infra.sandbox.paypal_books import (
    Event,
    PayPalBooks,
    PayPalObject,
    Refusal,
    invalid,
    missing,
    new_id,
    unprocessable,
    value_of,
)
from infra.sandbox.paypal_signing import CERTIFICATES, Signer
from infra.sandbox.webhooks import Outgoing, WebhookSender

Execution = Callable[[Request, PayPalObject], tuple[str, PayPalObject]]
"""Changes the books; returns the kind and the object to show."""

OWN: Final = "/_sandbox/paypal"
TOKEN_SECONDS: Final = 31_668
SEARCH_RANGE: Final = timedelta(days=31)
SEARCH_PAGE: Final = 500
SEARCH_ITEMS: Final = 10_000
"""Limits of one search: the longest time, the largest page, and the most items over all pages."""
WEBHOOK_ID: Final = "1JE4291016473214C"
TRANSMISSION: Final = "transmission_id"
CERTIFICATE_BASE: Final = "certificate_base"
"""Inputs of the signature, kept with the unsigned webhook: an id for all attempts, and the certificates' address."""


@dataclass(slots=True)
class Done:
    """The result of a request id: an object or an error; neither while its first request is running."""

    kind: str | None = None
    reference: str | None = None
    status: int = 0
    error: PayPalObject | None = None

    @property
    def is_running(self) -> bool:
        return self.kind is None and self.error is None


class PayPalSimulator:
    """The simulator's state and routes. `load` it once in the event loop that serves them."""

    def __init__(
        self,
        *,
        state_file: Path | None = None,
        faults: Faults | None = None,
        latency_seconds: float = 0.0,
        webhook_url: str | None = None,
        webhook_id: str = WEBHOOK_ID,
    ) -> None:
        self.books = PayPalBooks()
        self.sender = WebhookSender(sign=self._signed)
        self.faults = faults or Faults()
        self.latency_seconds = latency_seconds
        self.webhook_url = webhook_url
        self.webhook_id = webhook_id
        self.tokens: dict[str, float] = {}
        self.tokens_issued = 0
        self._merchant_url = ""
        self._done: dict[str, Done] = {}
        self._signer = Signer()
        self._journal = Journal(state_file)
        self.sender.journal = self._journal.beside("webhooks")

    def load(self) -> None:
        """Load what an earlier run wrote, and compact the journal. Tokens are not kept."""
        for line in self._journal.read():
            for stored in line.get("objects", ()):
                kind = stored.pop("_kind")
                self.books.keep(kind, stored)
            if "key" in line:
                self._done[line["key"]] = Done(**line["done"])
        self.books.touched.clear()
        self._journal.rewrite(self._lines())
        self.sender.load()

    def reset(self) -> None:
        """Forget everything but the latency and where webhooks go."""
        self.books, self._done = PayPalBooks(), {}
        self.faults.rules.clear()
        self.faults.seen.clear()
        self._journal.rewrite(self._lines())

    def snapshot(self) -> PayPalBooks:
        return copy.deepcopy(self.books)

    def totals(self) -> dict[str, dict[str, int]]:
        """Sums per currency, in minor units of ISO 4217."""
        return self.books.totals()

    def close(self) -> None:
        self._journal.close()

    def routes(self) -> list[Route]:
        """PayPal's paths, and the simulator's own."""
        return [*self._paypal_routes(), *self._own_routes()]

    def _paypal_routes(self) -> list[Route]:
        books = self.books_now
        return [
            Route("/v1/oauth2/token", self._issue_token, methods=["POST"]),
            self._changing("/v2/checkout/orders", "create", self._create),
            self._reading("/v2/checkout/orders/{id}", "orders"),
            self._changing("/v2/checkout/orders/{id}/authorize", "confirm", partial(self._execute, "authorize")),
            self._changing("/v2/checkout/orders/{id}/capture", "confirm", partial(self._execute, "capture")),
            self._reading("/v2/payments/authorizations/{id}", "authorizations"),
            self._changing(
                "/v2/payments/authorizations/{id}/capture",
                "capture",
                lambda request, given: ("captures", books().capture(request.path_params["id"], given)),
            ),
            self._changing(
                "/v2/payments/authorizations/{id}/void",
                "cancel",
                lambda request, _: ("authorizations", books().void(request.path_params["id"])),
            ),
            self._reading("/v2/payments/captures/{id}", "captures"),
            self._changing(
                "/v2/payments/captures/{id}/refund",
                "refund",
                lambda request, given: ("refunds", books().refund(request.path_params["id"], given)),
            ),
            self._reading("/v2/payments/refunds/{id}", "refunds"),
            Route("/v1/reporting/transactions", self._search, methods=["GET"]),
            Route(CERTIFICATES + "{id}", self._certificate, methods=["GET"]),
            Route("/v1/notifications/verify-webhook-signature", self._verify, methods=["POST"]),
        ]

    def _own_routes(self) -> list[Route]:
        books = self.books_now
        own: dict[str, Callable[[Request], tuple[str, PayPalObject]]] = {
            "authorizations/{id}/expire": lambda r: ("authorizations", books().void(r.path_params["id"])),
            "authorizations/{id}/void": lambda r: ("authorizations", books().void(r.path_params["id"])),
            "authorizations/{id}/capture": lambda r: (
                "captures",
                books().capture(
                    r.path_params["id"],
                    self._of_amount(r, "authorizations") | {"final_capture": r.query_params.get("final") == "true"},
                ),
            ),
            "captures/{id}/refund": lambda r: (
                "refunds",
                books().refund(r.path_params["id"], self._of_amount(r, "captures")),
            ),
            "captures/{id}/reverse": lambda r: (
                "refunds",
                books().reverse(r.path_params["id"], self._of_amount(r, "captures")),
            ),
            "orders/{id}/expire": lambda r: ("orders", books().expire(r.path_params["id"])),
            "captures/{id}/dispute": lambda r: ("disputes", books().dispute(r.path_params["id"])),
            "refunds/{id}/unlist": lambda r: ("refunds", books().unlist(r.path_params["id"])),
            "disputes/{id}/won": lambda r: ("disputes", books().resolve(r.path_params["id"], is_won=True)),
            "disputes/{id}/lost": lambda r: ("disputes", books().resolve(r.path_params["id"], is_won=False)),
            "{kind}/{id}/settle": self._settle,
        }
        return [
            Route(f"{OWN}/books", self._show_books, methods=["GET"]),
            Route(f"{OWN}/payments/{{id}}", self._show_payment, methods=["GET"]),
            Route(f"{OWN}/checkoutnow", self._payer_page, methods=["GET"]),
            Route(f"{OWN}/orders/{{id}}/approve", partial(self._payer_answers, "approve"), methods=["POST"]),
            Route(f"{OWN}/orders/{{id}}/deny", partial(self._payer_answers, "deny"), methods=["POST"]),
            *(Route(f"{OWN}/{path}", self._outside(change), methods=["POST"]) for path, change in own.items()),
            Route(f"{OWN}/tokens", self._forget_tokens, methods=["DELETE"]),
            *control_routes(OWN, lambda _: self),
            Route(f"{OWN}/webhooks", self._set_webhooks, methods=["POST"]),
        ]

    def books_now(self) -> PayPalBooks:
        """The present books; a reset replaces them."""
        return self.books

    def _lines(self) -> Iterator[dict[str, Any]]:
        for kind, table in self.books.tables.items():
            for stored in table.values():
                yield {"objects": [{"_kind": kind, **stored}]}
        for key, done in self._done.items():
            if not done.is_running:
                yield {"key": key, "done": _json_of(done)}

    def _save(self, key: str | None, request: Request) -> None:
        """Write what the request changed and the result of its id, and send the webhooks that it causes."""
        line: dict[str, Any] = {"objects": list(self.books.touched.values())}
        self.books.touched.clear()
        if key is not None and key in self._done:
            line |= {"key": key, "done": _json_of(self._done[key])}
        self._journal.append(line)
        events, self.books.events = self.books.events, []
        for event in events:
            self._send(event, self._merchant_url or _base(request))

    # --- tokens -----------------------------------------------------------------------------------------------------

    async def _issue_token(self, request: Request) -> Response:
        await asyncio.sleep(self.latency_seconds)
        fault = self.faults.pick(Call("token", request.url.path))
        broken = _before(fault)
        if broken is not None:
            return broken
        client_id = _basic_user(request)
        if client_id is None or client_id.startswith("bad"):
            return JSONResponse({"error": "invalid_client", "error_description": "Client Authentication failed"}, 401)
        token = f"A21{token_urlsafe(32)}"
        self.tokens[token] = time.monotonic() + TOKEN_SECONDS
        self.tokens_issued += 1
        answer = {"access_token": token, "token_type": "Bearer", "expires_in": TOKEN_SECONDS, "app_id": "APP-SANDBOX"}
        return spoiled(fault, JSONResponse(answer), self.sender)

    def _authenticate(self, request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or self.tokens.get(token, 0) < time.monotonic():
            raise Refusal(401, "AUTHENTICATION_FAILURE")
        self._merchant_url = _base(request)  # webhooks name certificates by the address that the merchant trusts

    async def _forget_tokens(self, request: Request) -> Response:
        self.tokens.clear()
        return JSONResponse({"tokens_issued": self.tokens_issued})

    # --- requests that change something -----------------------------------------------------------------------------

    def _changing(self, path: str, operation: str, execute: Execution) -> Route:
        """An endpoint for POST: authentication, faults, idempotency, execution."""

        async def endpoint(request: Request) -> Response:
            await asyncio.sleep(self.latency_seconds)
            try:
                self._authenticate(request)
                given = _body_of(await request.body())
            except Refusal as refusal:
                return _error(refusal)
            fault = self.faults.pick(self._call(request, operation, given))
            response = _before(fault)
            if response is None:
                executed = partial(_executed, operation, fault, partial(execute, request, given))
                response = await self._once(request, fault, executed)
            return spoiled(fault, response, self.sender)

        return Route(path, endpoint, methods=["POST"])

    async def _once(
        self, request: Request, fault: Fault | None, execute: Callable[[], tuple[str, PayPalObject]]
    ) -> Response:
        """Execute the request, or answer with the result that its id already has."""
        key = request.headers.get("paypal-request-id")
        known = self._done.get(key) if key is not None else None
        if known is not None:
            return self._replay(request, known)
        if key is not None:
            self._done[key] = Done()
        await hold_up(fault)
        try:
            kind, made = execute()
            done, response = Done(kind, made["id"]), self._respond(request, kind, made, 201)
        except Refusal as refusal:
            done, response = Done(status=refusal.status, error=refusal.body), _error(refusal)
            if not refusal.is_remembered:
                done = Done()
        self._remember(key, done, request)
        return _internal_error() if fault is not None and fault.action is Action.ERROR_AFTER else response

    def _remember(self, key: str | None, done: Done, request: Request) -> None:
        if key is not None:
            self._done[key] = done
            if done.is_running:
                del self._done[key]
        self._save(key, request)

    def _replay(self, request: Request, known: Done) -> Response:
        if known.is_running:
            return _error(Refusal(409, "RESOURCE_CONFLICT", "PREVIOUS_REQUEST_IN_PROGRESS"))
        if known.error is not None:
            return JSONResponse(known.error, known.status)
        assert known.kind is not None, "a finished request without an error has created an object"
        assert known.reference is not None, "as above"
        try:
            return self._respond(request, known.kind, self.books.find(known.kind, known.reference), 200)
        except Refusal as refusal:
            return _error(refusal)

    def _respond(self, request: Request, kind: str, made: PayPalObject, status: int) -> Response:
        """The object, whole or only id, status and links, as `Prefer` asks; 200 if its payer must act."""
        shown = self.books.shown(kind, made, _base(request))
        if request.headers.get("prefer") != "return=representation":
            if request.url.path.endswith("/void"):
                return Response(status_code=204)
            shown = {name: shown[name] for name in ("id", "status", "links")}
        is_new = status == 201 and made["status"] != "PAYER_ACTION_REQUIRED" and kind != "authorizations"
        return JSONResponse(shown, 201 if is_new else 200, headers={"PayPal-Debug-Id": new_id(13).lower()})

    def _create(self, request: Request, given: PayPalObject) -> tuple[str, PayPalObject]:
        vaulted = ((given.get("payment_source") or {}).get("paypal") or {}).get("vault_id")
        if vaulted is not None and "paypal-request-id" not in request.headers:
            raise invalid("PAYPAL_REQUEST_ID_REQUIRED")
        return "orders", self.books.create(given)

    def _execute(self, step: str, request: Request, given: PayPalObject) -> tuple[str, PayPalObject]:
        return "orders", self.books.execute(request.path_params["id"], step)

    def _call(self, request: Request, operation: str, given: PayPalObject) -> Call:
        """The request as fault rules match it; `payment_method` is the wallet's name."""
        order = self._order_of(request, given)
        wallet = ((order.get("payment_source") or {}).get("paypal") or {}).get("vault_id")
        unit = (order.get("purchase_units") or [{}])[0]
        payment_id = str(unit.get("custom_id") or "").partition(".")[0] or None
        key = request.headers.get("paypal-request-id")
        return Call(operation, request.url.path, key, order.get("_wallet") or wallet, payment_id)

    def _order_of(self, request: Request, given: PayPalObject) -> PayPalObject:
        reference = str(request.path_params.get("id"))
        for table in self.books.tables.values():
            if reference in table:
                found = table[reference]
                return self.books.tables["orders"][str(found.get("_order") or found["id"])]
        return given

    # --- requests that only read ------------------------------------------------------------------------------------

    def _reading(self, path: str, kind: str) -> Route:
        """An endpoint for GET: authentication and faults."""

        async def endpoint(request: Request) -> Response:
            await asyncio.sleep(self.latency_seconds)
            fault = self.faults.pick(self._call(request, "read", {}))
            response = _before(fault) or _unread(fault)
            await hold_up(fault)
            books = known_to_reads(fault, self.books)
            try:
                self._authenticate(request)
                found = books.find(kind, request.path_params["id"])
            except Refusal as refusal:
                return response or _error(refusal)
            return response or spoiled(fault, JSONResponse(books.shown_alone(kind, found, _base(request))), self.sender)

        return Route(path, endpoint, methods=["GET"])

    # --- Transaction Search -----------------------------------------------------------------------------------------

    async def _search(self, request: Request) -> Response:
        """A page of the transactions in a time; here without delay."""
        await asyncio.sleep(self.latency_seconds)
        fault = self.faults.pick(Call("search", request.url.path))
        broken = _before(fault)
        if broken is not None:
            return broken
        try:
            self._authenticate(request)
            return spoiled(fault, JSONResponse(self._found(request)), self.sender)
        except Refusal as refusal:
            return _error(refusal)

    def _found(self, request: Request) -> PayPalObject:
        since, until = (_moment(request.query_params.get(name)) for name in ("start_date", "end_date"))
        size, page = _whole(request.query_params.get("page_size", "100")), _whole(request.query_params.get("page", "1"))
        if not since <= until <= since + SEARCH_RANGE or not 1 <= size <= SEARCH_PAGE or page < 1:
            raise invalid("INVALID_PARAMETER_VALUE")
        found = self.books.transactions(since, until)
        if len(found) > SEARCH_ITEMS:
            raise Refusal(400, "RESULTSET_TOO_LARGE")
        shown = found[(page - 1) * size : page * size]
        answer = {
            "account_number": "SANDBOX1",
            "start_date": request.query_params["start_date"],
            "end_date": request.query_params["end_date"],
            "last_refreshed_datetime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "page": page,
            "total_items": len(found),
            "total_pages": -(-len(found) // size),
            "links": [{"href": str(request.url), "rel": "self", "method": "GET"}],
        }
        return answer | ({"transaction_details": [{"transaction_info": each} for each in shown]} if shown else {})

    # --- webhooks ---------------------------------------------------------------------------------------------------

    def _send(self, event: Event, base_url: str) -> None:
        if self.webhook_url is None:
            return
        envelope = {
            "id": f"WH-{new_id(17)}-{new_id(17)}",
            "event_version": "1.0",
            "create_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "resource_type": event.resource_type,
            "event_type": event.type,
            "summary": event.type.replace(".", " ").capitalize(),
            "resource": _off_by(event.resource, self.sender.manners.amount_off_by),
        }
        body = json.dumps(envelope, separators=(",", ":")).encode()
        self.sender.send(Outgoing(self.webhook_url, body, {TRANSMISSION: str(uuid4()), CERTIFICATE_BASE: base_url}))

    def _signed(self, outgoing: Outgoing) -> Outgoing:
        headers = self._signer.headers(
            outgoing.body,
            transmission_id=outgoing.headers[TRANSMISSION],
            webhook_id=self.webhook_id,
            base_url=outgoing.headers[CERTIFICATE_BASE],
        )
        return outgoing._replace(headers=headers)

    async def _certificate(self, request: Request) -> Response:
        if request.path_params["id"] != self._signer.cert_id:
            return _error(missing())
        return Response(self._signer.pem(), media_type="application/x-pem-file")

    async def _verify(self, request: Request) -> Response:
        """PayPal's online verification. It takes the event as `json.dumps` writes it without spaces."""
        try:
            self._authenticate(request)
            given = _body_of(await request.body())
        except Refusal as refusal:
            return _error(refusal)
        body = json.dumps(given.get("webhook_event"), separators=(",", ":")).encode()
        is_signed = self._signer.is_signed(
            transmission_id=str(given.get("transmission_id")),
            sent_at=str(given.get("transmission_time")),
            webhook_id=str(given.get("webhook_id")),
            body=body,
            signature=str(given.get("transmission_sig")),
        )
        return JSONResponse({"verification_status": "SUCCESS" if is_signed else "FAILURE"})

    # --- the simulator's own pages ----------------------------------------------------------------------------------

    async def _show_books(self, request: Request) -> Response:
        """Sums per currency, webhooks, tokens, and every payment's effects unless `?details=false`."""
        answer: dict[str, Any] = {
            "currencies": self.books.totals(),
            "webhooks": {"sent": self.sender.sent, "accepted": self.sender.accepted},
            "tokens_issued": self.tokens_issued,
        }
        if request.query_params.get("details") != "false":
            answer["payments"] = {each: self.books.effects(each) for each in self.books.payment_ids()}
        return JSONResponse(answer)

    async def _show_payment(self, request: Request) -> Response:
        """The totals of one of our payments, in minor units of ISO 4217."""
        return JSONResponse(self.books.effects(request.path_params["id"]))

    async def _payer_page(self, request: Request) -> Response:
        """The page where a demo's payer approves or denies."""
        reference = request.query_params.get("token", "")
        order = self.books.tables["orders"].get(reference)
        if order is None:
            return HTMLResponse("<!doctype html><title>PayPal sandbox</title><h1>No such order</h1>", 404)
        amount = order["purchase_units"][0]["amount"]
        buttons = "".join(
            f'<form method="post" action="orders/{reference}/{answer}?redirect=true"><button>{label}</button></form>'
            for answer, label in (("approve", "Pay"), ("deny", "Cancel"))
        )
        price = html.escape(f"{amount['value']} {amount['currency_code']}")
        return HTMLResponse(f"<!doctype html><title>PayPal sandbox</title><h1>{price}</h1>{buttons}")

    async def _payer_answers(self, answer: str, request: Request) -> Response:
        """The payer approves or denies; `?wallet=` names the wallet that pays."""
        reference = request.path_params["id"]
        try:
            if answer == "approve":
                order = self.books.approve(reference, request.query_params.get("wallet"))
            else:
                order = self.books.deny(reference)
        except Refusal as refusal:
            return _error(refusal)
        self._save(None, request)
        context = order["payment_source"]["paypal"].get("experience_context", {})
        url = context.get("return_url" if answer == "approve" else "cancel_url")
        if request.query_params.get("redirect") == "true" and url:
            return RedirectResponse(f"{url}?token={reference}&PayerID=SANDBOXPAYER1", 303)
        return JSONResponse(self.books.shown("orders", order, _base(request)))

    def _outside(self, change: Callable[[Request], tuple[str, PayPalObject]]) -> Callable[[Request], Any]:
        """An endpoint that changes the books from outside the API, as a person in PayPal's pages would."""

        async def endpoint(request: Request) -> Response:
            try:
                kind, changed = change(request)
            except Refusal as refusal:
                return _error(refusal)
            self._save(None, request)
            return JSONResponse(self.books.shown(kind, changed, _base(request)))

        return endpoint

    def _of_amount(self, request: Request, kind: str) -> PayPalObject:
        """The amount of a person's request: `?amount=`, such as 5.00, in the object's currency; may be absent."""
        value = request.query_params.get("amount")
        whole = self.books.find(kind, request.path_params["id"])["amount"]
        return {} if value is None else {"amount": {**whole, "value": value}}

    def _settle(self, request: Request) -> tuple[str, PayPalObject]:
        """Give a pending authorization, capture or refund its `?status=`."""
        kind, status = request.path_params["kind"], request.query_params.get("status", "COMPLETED")
        if kind not in ("authorizations", "captures", "refunds"):
            raise missing()
        if not status.isupper():
            raise unprocessable("INVALID_PARAMETER_VALUE")
        return kind, self.books.settle(kind, request.path_params["id"], status)

    async def _set_webhooks(self, request: Request) -> Response:
        """Set `url` (null: send none), `webhook_id`, and the sender's `manners`."""
        given = await request.json()
        try:
            self.sender.behave(given.get("manners", {}))
        except (TypeError, ValueError, AttributeError) as error:
            return JSONResponse({"error": str(error)}, 400)
        self.webhook_url = given.get("url")
        self.webhook_id = given.get("webhook_id", self.webhook_id)
        return JSONResponse({"url": self.webhook_url, "webhook_id": self.webhook_id})


DECLINED_AS: Final = {"capture": "TRANSACTION_REFUSED", "refund": "REFUND_NOT_ALLOWED"}
"""The issue if a rule names none; INSTRUMENT_DECLINED for other operations."""


def _executed(
    operation: str, fault: Fault | None, execute: Callable[[], tuple[str, PayPalObject]]
) -> tuple[str, PayPalObject]:
    """The created object and its kind. Every refusal, injected by a fault or not, is raised."""
    if fault is not None and fault.action is Action.ERROR_BEFORE:
        raise Refusal(500, "INTERNAL_SERVER_ERROR", is_remembered=True)
    if fault is not None and fault.action is Action.DECLINE:
        usual = DECLINED_AS.get(operation, "INSTRUMENT_DECLINED")
        issue = usual if fault.code == "generic_decline" else fault.code
        raise Refusal(422, "UNPROCESSABLE_ENTITY", issue, is_remembered=True)
    return execute()


def _before(fault: Fault | None) -> Response | None:
    match fault.action if fault else None:
        case Action.CUT_BEFORE:
            return NoAnswer()
        case Action.RATE_LIMIT:
            return asking_to_rest(fault, _error(Refusal(429, "RATE_LIMIT_REACHED")))
        case Action.CONFLICT:
            return _error(Refusal(409, "RESOURCE_CONFLICT", "PREVIOUS_REQUEST_IN_PROGRESS"))
        case Action.UNAVAILABLE:
            return asking_to_rest(fault, _error(Refusal(503, "SERVICE_UNAVAILABLE")))
        case _:
            return None


def _unread(fault: Fault | None) -> Response | None:
    """A 500 for a read. It executes nothing, so before or after execution is the same."""
    is_broken = fault is not None and fault.action in (Action.ERROR_BEFORE, Action.ERROR_AFTER)
    return _internal_error() if is_broken else None


def _off_by(resource: PayPalObject, minor: int) -> PayPalObject:
    """The resource with its amount, if it has one, off by `minor`."""
    amount = resource.get("amount")
    if not minor or not amount:
        return resource
    value = value_of(amount) + Decimal(minor).scaleb(-MINOR_UNITS[amount["currency_code"]])
    return {**resource, "amount": {**amount, "value": str(value)}}


def _internal_error() -> Response:
    return _error(Refusal(500, "INTERNAL_SERVER_ERROR"))


def _error(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, headers={"PayPal-Debug-Id": refusal.body["debug_id"]})


def _moment(text: str | None) -> datetime:
    try:
        read = datetime.fromisoformat(text or "")
    except ValueError as error:
        raise invalid("INVALID_PARAMETER_SYNTAX" if text else "MISSING_REQUIRED_PARAMETER") from error
    if read.tzinfo is None:
        raise invalid("INVALID_PARAMETER_SYNTAX")
    return read


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise invalid("INVALID_PARAMETER_SYNTAX")
    return int(text)


def _json_of(done: Done) -> dict[str, Any]:
    return {"kind": done.kind, "reference": done.reference, "status": done.status, "error": done.error}


def _base(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def _body_of(text: bytes) -> PayPalObject:
    try:
        given = json.loads(text or b"{}")
    except ValueError as error:
        raise invalid("MALFORMED_REQUEST_JSON") from error
    if not isinstance(given, dict):
        raise invalid("MALFORMED_REQUEST_JSON")
    return given


def _basic_user(request: Request) -> str | None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    try:
        user, _, secret = base64.b64decode(given).decode().partition(":")
    except ValueError:
        return None
    return user if scheme == "Basic" and user and secret else None
