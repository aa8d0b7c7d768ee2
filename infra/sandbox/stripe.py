"""A local Stripe simulator: the real paths, forms, fields, errors and idempotency, its own books, faults on demand.

It keeps its state across requests and, with a state file, across restarts. It is for tests, demos and benchmarks: it
accepts any key that begins with `sk_`, so it belongs on a loopback address. Not modelled: customers, fees.

Besides `/v1` it answers under `/_sandbox`: `books`, `payment_intents`, `disputes`, `faults`, `manners`, `latency`,
`webhooks`, `reset`.
"""

import asyncio
import copy
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from infra.sandbox import stripe_forms
from infra.sandbox.connections import NoAnswer
from infra.sandbox.controls import asking_to_rest, control_routes, hold_up, known_to_reads, spoiled
from infra.sandbox.faults import Action, Call, Fault, Faults
from infra.sandbox.journal import Journal
from infra.sandbox.stripe_books import Books, StripeObject, newest
from infra.sandbox.stripe_errors import StripeError, invalid
from infra.sandbox.stripe_events import Events
from infra.sandbox.stripe_forms import Params
from infra.sandbox.webhooks import WebhookSender

Execution = Callable[[Books, Request, Params], StripeObject]

SHOULD_RETRY: Final = {409: "true", 503: "true", 500: "false"}


@dataclass(slots=True)
class Stored:
    """The stored answer of an idempotency key; `body` is None while its first request is running."""

    fingerprint: str
    status: int = 0
    body: bytes | None = None
    request_id: str = ""


@dataclass(slots=True)
class SandboxState:
    """The simulator's state. `latency_seconds` is added to every request."""

    state_file: Path | None = None
    latency_seconds: float = 0.0
    books: Books = field(default_factory=Books)
    faults: Faults = field(default_factory=Faults)
    answers: dict[str, Stored] = field(default_factory=dict)
    requests: Iterator[int] = field(default_factory=lambda: count(1))
    events: Events = field(default_factory=Events)
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.state_file)
        self.sender.journal = self.journal.beside("webhooks")

    @property
    def sender(self) -> WebhookSender:
        return self.events.sender

    def snapshot(self) -> Books:
        return copy.deepcopy(self.books)

    def load(self) -> None:
        """Load what an earlier run wrote, and compact the journal."""
        for line in self.journal.read():
            for stored in line.get("objects", ()):
                self.books.keep(stored)
                self.events.note(stored)
            if "key" in line:
                body = line["body"].encode()
                self.answers[line["key"]] = Stored(line["fingerprint"], line["status"], body, line["request_id"])
        self.journal.rewrite(self._lines())
        self.sender.load()

    def save(self, key: str | None) -> None:
        """Write what the request with `key` changed, and its answer if that is stored; send the events."""
        line: dict[str, Any] = {"objects": list(self.books.touched.values())}
        for changed in self.books.touched.values():
            self.events.send(changed, key)
        self.books.touched.clear()
        if key is not None:
            line |= _line_of(key, self.answers[key])
        self.journal.append(line)

    def reset(self) -> None:
        """Forget everything but the latency."""
        self.books, self.faults, self.answers = Books(), Faults(), {}
        self.events.forget()
        self.journal.rewrite(self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
        books = self.books
        for table in (books.payment_intents, books.charges, books.refunds, books.disputes):
            for stored in table.values():
                yield {"objects": [stored]}
        for key, answer in self.answers.items():
            yield _line_of(key, answer)
        books.touched.clear()


def _line_of(key: str, answer: Stored) -> dict[str, Any]:
    assert answer.body is not None, "only finished requests are written"
    return {
        "key": key,
        "fingerprint": answer.fingerprint,
        "status": answer.status,
        "body": answer.body.decode(),
        "request_id": answer.request_id,
    }


# --- requests that change something ---------------------------------------------------------------------------------


def _mutation(operation: str, execute: Execution) -> Callable[[Request], Any]:
    """An endpoint for POST: authentication, faults, idempotency, execution, in Stripe's order."""

    async def endpoint(request: Request) -> Response:
        state: SandboxState = request.app.state.sandbox
        if state.latency_seconds:
            await asyncio.sleep(state.latency_seconds)
        text = (await request.body()).decode()
        try:
            _authenticate(request)
            params = stripe_forms.parse(text)
        except StripeError as error:
            return _error(state, error)
        fault = state.faults.pick(_call(state.books, request, operation, params))
        response = _before(state, fault)
        if response is None:
            executed = partial(_executed, state, request, params, fault=fault, execute=execute)
            response = await _once(state, request, text, fault, executed)
        return spoiled(fault, response, state.sender)

    return endpoint


async def _once(
    state: SandboxState, request: Request, text: str, fault: Fault | None, executed: Callable[[], bytes]
) -> Response:
    """Execute the request, or repeat the stored answer if its key was used before."""
    key, fingerprint = request.headers.get("idempotency-key"), f"{request.url.path}?{text}"
    known = state.answers.get(key) if key is not None else None
    if known is not None:
        return _replay(state, known, fingerprint)
    if key is not None:
        state.answers[key] = Stored(fingerprint)
    await hold_up(fault)
    request_id, is_stored = _request_id(state), True
    try:
        status, body = 200, executed()
    except StripeError as error:
        status, body, is_stored = error.status, _dump({"error": error.error}), error.is_stored
    if key is not None and not is_stored:
        del state.answers[key]
    _remember(state, key if is_stored else None, Stored(fingerprint, status, body, request_id))
    return _respond(body, status, request_id)


def _executed(
    state: SandboxState, request: Request, params: Params, *, fault: Fault | None, execute: Execution
) -> bytes:
    """The body of a success. Every refusal, injected by a fault or not, is raised."""
    match fault.action if fault else None:
        case Action.ERROR_BEFORE:
            raise _internal_error()
        case Action.ERROR_AFTER:
            execute(state.books, request, params)
            raise _internal_error()
        case Action.DECLINE if request.url.path == "/v1/payment_intents":
            assert fault is not None, "the action is the fault's"
            return _dump(state.books.decline(params, fault.code))
        case Action.DECLINE if request.url.path == "/v1/refunds":
            return _dump(state.books.settle_refund(execute(state.books, request, params)["id"], "failed"))
        case _:
            return _body(execute(state.books, request, params), params, state.books)


def _remember(state: SandboxState, key: str | None, answer: Stored) -> None:
    if key is not None:
        state.answers[key] = answer
    if key is not None or state.books.touched:
        state.save(key)


def _replay(state: SandboxState, known: Stored, fingerprint: str) -> Response:
    if known.fingerprint != fingerprint:
        message = "Keys for idempotent requests can only be used with the same parameters they were first used with."
        return _error(state, StripeError(400, message, type="idempotency_error"))
    if known.body is None:
        message = "There is currently another in-progress request using this idempotency key."
        return _error(state, StripeError(409, message, code="idempotency_key_in_use"))
    response = _respond(known.body, known.status, _request_id(state))
    response.headers["Idempotent-Replayed"] = "true"
    response.headers["Original-Request"] = known.request_id
    return response


def _call(books: Books, request: Request, operation: str, params: Params) -> Call:
    """The request as fault rules match it; a later operation has the method and metadata of its PaymentIntent."""
    intent = books.payment_intents.get(str(request.path_params.get("intent", params.get("payment_intent"))))
    metadata = intent["metadata"] if intent else params.get("metadata")
    payment_method = params.get("payment_method") or (intent["payment_method"] if intent else None)
    payment_id = metadata.get("payment_id") if isinstance(metadata, dict) else None
    return Call(operation, request.url.path, request.headers.get("idempotency-key"), payment_method, payment_id)


def _before(state: SandboxState, fault: Fault | None) -> Response | None:
    match fault.action if fault else None:
        case Action.CUT_BEFORE:
            return NoAnswer()
        case Action.RATE_LIMIT:
            return asking_to_rest(fault, _error(state, StripeError(429, "Too many requests.", code="rate_limit")))
        case Action.CONFLICT:
            message = "There is currently another in-progress request using this idempotency key."
            return _error(state, StripeError(409, message, code="idempotency_key_in_use"))
        case Action.UNAVAILABLE:
            page = "<html>503 Service Unavailable</html>"
            return asking_to_rest(fault, Response(page, 503, media_type="text/html"))
        case _:
            return None


def _internal_error() -> StripeError:
    return StripeError(500, "An unknown error occurred.", type="api_error")


def _authenticate(request: Request) -> None:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    is_known = scheme == "Basic" or (scheme == "Bearer" and credentials.startswith(("sk_", "rk_")))
    if not is_known:
        raise StripeError(401, "Invalid API Key provided.", is_stored=False)


# --- requests that only read ----------------------------------------------------------------------------------------


def _reading(read: Callable[[Books, Request, Params], Any]) -> Callable[[Request], Any]:
    """An endpoint for GET. Faults apply; idempotency keys are ignored."""

    async def endpoint(request: Request) -> Response:
        state: SandboxState = request.app.state.sandbox
        if state.latency_seconds:
            await asyncio.sleep(state.latency_seconds)
        try:
            _authenticate(request)
            params = stripe_forms.parse(request.url.query)
            fault = state.faults.pick(_call(state.books, request, "read", params))
            await hold_up(fault)
            response = _before(state, fault)
            if response is None:
                books = known_to_reads(fault, state.books)
                body = _answered(fault, lambda: _body(read(books, request, params), params, books))
                response = _respond(body, 200, _request_id(state))
        except StripeError as error:
            return _error(state, error)
        return spoiled(fault, response, state.sender)

    return endpoint


def _answered(fault: Fault | None, answer: Callable[[], bytes]) -> bytes:
    """The answer to a read. It executes nothing, so a 500 before or after execution is the same."""
    if fault is not None and fault.action in (Action.ERROR_BEFORE, Action.ERROR_AFTER):
        raise _internal_error()
    return answer()


def _list_payment_intents(books: Books, request: Request, params: Params) -> StripeObject:
    stripe_forms.allow(params, ("created", "customer", "limit", "starting_after", "expand"))
    customer = params.get("customer")
    is_wanted = _created_filter(params)
    found = newest(
        books.payment_intents.values(), lambda each: is_wanted(each) and customer in (None, each["customer"])
    )
    return _page(found, params, "/v1/payment_intents")


def _list_refunds(books: Books, request: Request, params: Params) -> StripeObject:
    stripe_forms.allow(params, ("payment_intent", "charge", "created", "limit", "starting_after", "expand"))
    reference = params.get("payment_intent")
    if "charge" in params:
        reference = books.charge(params["charge"])["payment_intent"]
    refunds = books.refunds.values() if reference is None else books.refunds_of(reference)
    return _page(newest(refunds, _created_filter(params)), params, "/v1/refunds")


def _search(books: Books, request: Request, params: Params) -> StripeObject:
    """Only `metadata['name']:'value'`, joined by AND. Without delay, where the real search lags by a minute."""
    wanted = dict(re.findall(r"""metadata\[["'](\w+)["']\]:["']([^"']*)["']""", params.get("query", "")))
    if not wanted:
        raise invalid("We were unable to parse your search query.", param="query")
    candidates = books.intents_of(wanted["payment_id"]) if "payment_id" in wanted else books.payment_intents.values()
    found = newest(candidates, lambda each: wanted.items() <= each["metadata"].items())
    return {**_page(found, params, "/v1/payment_intents/search"), "object": "search_result"}


def _created_filter(params: Params) -> Callable[[StripeObject], bool]:
    created = params.get("created", {})
    if not isinstance(created, dict):
        created = {"gte": created, "lte": created}
    begin = max(stripe_forms.integer(created, "gte", default=0), stripe_forms.integer(created, "gt", default=-1) + 1)
    end = min(
        stripe_forms.integer(created, "lte", default=2**62) + 1, stripe_forms.integer(created, "lt", default=2**62)
    )
    return lambda each: begin <= each["created"] < end


def _page(found: Iterable[StripeObject], params: Params, url: str) -> StripeObject:
    limit, after = stripe_forms.integer(params, "limit", default=10), params.get("starting_after")
    listed = list(found)
    if after is not None:
        ids = [each["id"] for each in listed]
        if after not in ids:
            raise invalid(f"No such object: '{after}'", param="starting_after", code="resource_missing")
        listed = listed[ids.index(after) + 1 :]
    return {"object": "list", "url": url, "has_more": len(listed) > limit, "data": listed[: min(limit, 100)]}


# --- answers --------------------------------------------------------------------------------------------------------


def _body(answer: StripeObject, params: Params, books: Books) -> bytes:
    expanded = stripe_forms.values(params, "expand")
    if "latest_charge" in expanded:
        answer = _expand(answer, books)
    elif "data.latest_charge" in expanded:
        answer = {**answer, "data": [_expand(each, books) for each in answer["data"]]}
    return _dump(answer)


def _expand(intent: StripeObject, books: Books) -> StripeObject:
    return {**intent, "latest_charge": books.charges.get(intent["latest_charge"] or "")}


def _dump(answer: Any) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


def _request_id(state: SandboxState) -> str:
    return f"req_sandbox{next(state.requests):09d}"


def _respond(body: bytes, status: int, request_id: str) -> Response:
    headers = {"Request-Id": request_id}
    if status in SHOULD_RETRY:
        headers["Stripe-Should-Retry"] = SHOULD_RETRY[status]
    return Response(body, status, headers=headers, media_type="application/json")


def _error(state: SandboxState, error: StripeError) -> Response:
    return _respond(_dump({"error": error.error}), error.status, _request_id(state))


# --- the simulator's own pages --------------------------------------------------------------------------------------


async def _books(request: Request) -> Response:
    """Sums per currency, executed charges per payment id, and every PaymentIntent unless `?details=false`."""
    books: Books = request.app.state.sandbox.books
    answer: dict[str, Any] = {"currencies": books.totals(), "executed_charges": books.executed_charges()}
    if request.query_params.get("details") != "false":
        answer["payment_intents"] = books.details(books.payment_intents.values())
    return JSONResponse(answer)


async def _find(request: Request) -> Response:
    """The PaymentIntents whose metadata has every `?metadata[name]=value`."""
    books: Books = request.app.state.sandbox.books
    wanted = stripe_forms.parse(request.url.query).get("metadata", {})
    candidates = books.intents_of(wanted["payment_id"]) if "payment_id" in wanted else books.payment_intents.values()
    return JSONResponse({"data": books.details(i for i in candidates if wanted.items() <= i["metadata"].items())})


async def _set_webhooks(request: Request) -> Response:
    """Set where webhooks are sent, `{"url": …, "secret": …}`, and their `Manners`."""
    events: Events = request.app.state.sandbox.events
    try:
        events.configure(await request.json())
    except (TypeError, ValueError, AttributeError) as error:
        return JSONResponse({"error": str(error)}, 400)
    return JSONResponse({"url": events.url})


async def _webhooks(request: Request) -> Response:
    events: Events = request.app.state.sandbox.events
    return JSONResponse({"url": events.url, "sent": events.sender.sent, "accepted": events.sender.accepted})


def _own(change: Callable[[Books, Request], StripeObject]) -> Callable[[Request], Any]:
    """An endpoint that changes the books from outside the API, as a bank or the dashboard would."""

    async def endpoint(request: Request) -> Response:
        state: SandboxState = request.app.state.sandbox
        try:
            changed = change(state.books, request)
        except StripeError as error:
            return _error(state, error)
        state.save(None)
        return JSONResponse(changed)

    return endpoint


async def _authentication_page(request: Request) -> Response:
    """The page where a demo's payer passes or fails 3-D Secure."""
    reference = html.escape(request.path_params["intent"])
    buttons = "".join(
        f'<form method="post" action="?success={value}&amp;redirect=true"><button>{label}</button></form>'
        for value, label in (("true", "Authenticate"), ("false", "Fail"))
    )
    return HTMLResponse(f"<!doctype html><title>3-D Secure sandbox</title><h1>{reference}</h1>{buttons}")


async def _authenticate_payer(request: Request) -> Response:
    state: SandboxState = request.app.state.sandbox
    reference, is_successful = request.path_params["intent"], request.query_params.get("success") == "true"
    declined = state.faults.decline(_call(state.books, request, "confirm", {}))
    try:
        action = state.books.payment_intent(reference)["next_action"] or {}
        intent = state.books.authenticate(
            reference, is_successful=is_successful, declined_as=declined.code if declined else None
        )
    except StripeError as error:
        return _error(state, error)
    state.save(None)
    return_url = action.get("redirect_to_url", {}).get("return_url")
    if request.query_params.get("redirect") == "true" and return_url:
        return RedirectResponse(f"{return_url}?payment_intent={reference}", 303)
    return JSONResponse(intent)


def _created(books: Books, request: Request, params: Params) -> StripeObject:
    """A new PaymentIntent, with its 3-D Secure page under the address that the request was sent to."""
    return _with_address(books.create(params), request)


def _with_address(intent: StripeObject, request: Request) -> StripeObject:
    redirect = (intent["next_action"] or {}).get("redirect_to_url")
    if redirect is not None and redirect["url"].startswith("/"):
        redirect["url"] = str(request.base_url).rstrip("/") + redirect["url"]
    return intent


IN_THE_DASHBOARD: Final[Mapping[str, Callable[[Books, Request], StripeObject]]] = {
    "refund": lambda books, request: books.refund(
        {"payment_intent": request.path_params["intent"], **request.query_params}
    ),
    "capture": lambda books, request: books.capture(
        request.path_params["intent"],
        {"amount_to_capture": amount} if (amount := request.query_params.get("amount")) else {},
    ),
    "cancel": lambda books, request: books.cancel(request.path_params["intent"], {}),
}
"""What a person can do in the dashboard, for `?amount=` or the rest; it carries no marks of an API client."""

ROUTES: Final = [
    Route("/v1/payment_intents", _mutation("create", _created), methods=["POST"]),
    Route("/v1/payment_intents", _reading(_list_payment_intents), methods=["GET"]),
    Route("/v1/payment_intents/search", _reading(_search), methods=["GET"]),
    Route(
        "/v1/payment_intents/{intent}",
        _reading(lambda books, request, _: books.payment_intent(request.path_params["intent"])),
        methods=["GET"],
    ),
    Route(
        "/v1/payment_intents/{intent}/confirm",
        _mutation(
            "confirm",
            lambda books, request, params: _with_address(books.confirm(request.path_params["intent"], params), request),
        ),
        methods=["POST"],
    ),
    Route(
        "/v1/payment_intents/{intent}/capture",
        _mutation("capture", lambda books, request, params: books.capture(request.path_params["intent"], params)),
        methods=["POST"],
    ),
    Route(
        "/v1/payment_intents/{intent}/cancel",
        _mutation("cancel", lambda books, request, params: books.cancel(request.path_params["intent"], params)),
        methods=["POST"],
    ),
    Route("/v1/refunds", _mutation("refund", lambda books, _, params: books.refund(params)), methods=["POST"]),
    Route("/v1/refunds", _reading(_list_refunds), methods=["GET"]),
    Route(
        "/v1/refunds/{refund}",
        _reading(lambda books, request, _: books.find_refund(request.path_params["refund"])),
        methods=["GET"],
    ),
    Route(
        "/v1/charges/{charge}",
        _reading(lambda books, request, _: books.charge(request.path_params["charge"])),
        methods=["GET"],
    ),
    Route("/_sandbox/books", _books, methods=["GET"]),
    Route("/_sandbox/payment_intents", _find, methods=["GET"]),
    Route("/_sandbox/payment_intents/{intent}/authenticate", _authentication_page, methods=["GET"]),
    Route("/_sandbox/payment_intents/{intent}/authenticate", _authenticate_payer, methods=["POST"]),
    Route(
        "/_sandbox/payment_intents/{intent}/expire",
        _own(lambda books, request: books.expire(request.path_params["intent"])),
        methods=["POST"],
    ),
    Route(
        "/_sandbox/payment_intents/{intent}/age",
        _own(lambda books, request: books.age(request.path_params["intent"], int(request.query_params["seconds"]))),
        methods=["POST"],
    ),
    *(
        Route(f"/_sandbox/payment_intents/{{intent}}/{path}", _own(change), methods=["POST"])
        for path, change in IN_THE_DASHBOARD.items()
    ),
    Route(
        "/_sandbox/refunds/{refund}/settle",
        _own(
            lambda books, request: books.settle_refund(
                request.path_params["refund"], request.query_params.get("status", "succeeded")
            )
        ),
        methods=["POST"],
    ),
    Route(
        "/_sandbox/payment_intents/{intent}/dispute",
        _own(
            lambda books, request: books.dispute(
                request.path_params["intent"], int(request.query_params.get("amount", "0")) or None
            )
        ),
        methods=["POST"],
    ),
    Route(
        "/_sandbox/disputes/{dispute}/close",
        _own(
            lambda books, request: books.close_dispute(
                request.path_params["dispute"], request.query_params.get("status", "won")
            )
        ),
        methods=["POST"],
    ),
    *control_routes("/_sandbox", lambda request: request.app.state.sandbox),
    Route("/_sandbox/webhooks", _set_webhooks, methods=["POST"]),
    Route("/_sandbox/webhooks", _webhooks, methods=["GET"]),
]
