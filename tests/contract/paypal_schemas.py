"""Checks what our gateway and our simulator send each other against PayPal's own OpenAPI documents.

The documents are PayPal's, unchanged: https://github.com/paypal/paypal-rest-api-specifications at ec4d8f3. `_corrected`
lists the few rules that are not applied, and why.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import pytest
from openapi_core import OpenAPI
from openapi_core.exceptions import OpenAPIError
from openapi_core.testing import MockRequest, MockResponse
from werkzeug.datastructures import ImmutableMultiDict

from infra.gateways.transport import SmallPools

DIRECTORY: Final = Path(__file__).parent / "paypal_openapi"
DOCUMENTS: Final = {
    "/v2/checkout/": "checkout_orders_v2",
    "/v2/payments/": "payments_payment_v2",
    "/v1/notifications/": "notifications_webhooks_v1",
    "/v1/reporting/": "reporting_transactions_v1",
}
OF_TOMORROW: Final = "A_STATUS_OF_TOMORROW"
"""A value that PayPal may use one day. No document has it; tests make the simulator send it on purpose."""


class Exchange(NamedTuple):
    """One request, and the answer if there was any."""

    request: httpx.Request
    response: httpx.Response | None


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[list[Exchange]]:
    """Every request and answer of gateways until the block ends."""
    exchanges: list[Exchange] = []
    send = SmallPools.handle_async_request

    async def record(pools: SmallPools, request: httpx.Request) -> httpx.Response:
        await request.aread()
        response = None
        try:
            given = await send(pools, request)
            await given.aread()
            response = given
        finally:
            exchanges.append(Exchange(request, response))
        return response

    patch.setattr(SmallPools, "handle_async_request", record)
    yield exchanges


def as_answer(path: str, body: Mapping[str, Any]) -> Exchange:
    """A body that PayPal sends unasked, wrapped as an answer, since its documents describe only answers."""
    request = httpx.Request("GET", f"http://paypal.invalid{path}", headers={"Authorization": "Bearer t"})
    return Exchange(request, httpx.Response(200, json=body))


def violations(exchange: Exchange) -> list[str]:
    """Everything in the exchange that PayPal's documents do not allow or do not have."""
    found = next((name for path, name in DOCUMENTS.items() if exchange.request.url.path.startswith(path)), None)
    if found is None:
        return []
    told = [f"request: {each}" for each in _of_request(found, exchange.request)]
    if exchange.response is not None and _is_meant(exchange.response):
        told += [f"answer: {each}" for each in _of_response(found, exchange.request, exchange.response)]
    return [f"{exchange.request.method} {exchange.request.url.path} {each}" for each in told if OF_TOMORROW not in each]


def _of_request(name: str, request: httpx.Request) -> list[str]:
    try:
        _document(name).validate_request(_request(request))
    except OpenAPIError as error:
        return _words(error)
    return _strange(name, request.content)


def _of_response(name: str, request: httpx.Request, response: httpx.Response) -> list[str]:
    given = MockResponse(
        response.content, response.status_code, dict(response.headers), response.headers.get("content-type", "")
    )
    try:
        _document(name).validate_response(_request(request), given)
    except OpenAPIError as error:
        return [f"{response.status_code} {each}" for each in _words(error)]
    return _strange(name, response.content)


def _is_meant(response: httpx.Response) -> bool:
    """Whether it is meant as PayPal's own answer, rather than a fault that the test asked for."""
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.status_code >= 500:
        return False
    try:
        response.json()
    except ValueError:
        return not response.content
    return True


def _request(request: httpx.Request) -> MockRequest:
    return MockRequest(
        host_url=str(request.url.copy_with(path="/", query=None)),
        method=request.method,
        path=request.url.path,
        args=ImmutableMultiDict(request.url.params.multi_items()),
        headers=dict(request.headers),
        data=request.content,
        content_type=request.headers.get("content-type", "application/json"),
    )


def _words(error: BaseException) -> list[str]:
    causes = getattr(error.__cause__, "schema_errors", ())
    return [f"{each.json_path}: {each.message[:300]}" for each in causes] or [f"{error} ({error.__cause__})"]


# --- the documents ----------------------------------------------------------------------------------------------------


@cache
def _given(name: str) -> dict[str, Any]:
    given = json.loads((DIRECTORY / f"{name}.json").read_text())
    assert isinstance(given, dict)
    return given


@cache
def _document(name: str) -> OpenAPI:
    given = _given(name)
    # The library supports bearer tokens, but not the flow by which one is obtained.
    schemes = {each: {"type": "http", "scheme": "bearer"} for each in given["components"]["securitySchemes"]}
    components = {**given["components"], "securitySchemes": schemes}
    return OpenAPI.from_dict(_corrected({**given, "servers": [{"url": "/"}], "components": components}))


def _corrected(given: Any) -> Any:
    """The document without rules that PayPal cannot mean.

    - The wording of an issue is for people, and PayPal's own documents differ in it (ORDER_ALREADY_AUTHORIZED).
    - `readOnly` fields of an event that is sent for verification: PayPal's own example has all of them.
    - That a signature begins with a letter or digit: it is base64, so one in 32 begins with a plus or slash.
    """
    if isinstance(given, list):
        return [_corrected(each) for each in given]
    if not isinstance(given, dict):
        return given
    if given.keys() >= {"issue", "description"}:
        given = {**given, "description": {"type": "string"}}
    if given.get("title") == "Event":
        given = {**given, "properties": {name: _writable(each) for name, each in given["properties"].items()}}
    if "transmission_sig" in given:
        given = {**given, "transmission_sig": {"type": "string", "maxLength": 500}}
    return {name: _corrected(each) for name, each in given.items()}


def _writable(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in schema.items() if name != "readOnly"}


# --- names ------------------------------------------------------------------------------------------------------------


def _strange(name: str, content: bytes) -> list[str]:
    """Fields that the document has nowhere. Its schemas allow additional fields, so a misspelt name would be valid."""
    try:
        said = _fields_of(json.loads(content)) if content else set()
    except ValueError:
        said = set()
    return [f"{each} is no field" for each in sorted(said - _known_fields(name))]


def _fields_of(body: Any) -> set[str]:
    """The names of all fields, except inside an event's `resource`, which another document describes."""
    if isinstance(body, list):
        return {name for each in body for name in _fields_of(each)}
    if not isinstance(body, dict):
        return set()
    return set(body) | _fields_of([each for name, each in body.items() if name != "resource"])


@cache
def _known_fields(name: str) -> frozenset[str]:
    found: set[str] = set()
    waiting: list[Any] = [_given(name)["components"]["schemas"]]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            found.update(each["properties"] if isinstance(each.get("properties"), dict) else ())
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
    return frozenset(found)
