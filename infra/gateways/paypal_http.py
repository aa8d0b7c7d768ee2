"""The connection to PayPal: addresses and currencies, our configuration, the access token, and HTTP.

Promise: a call returns PayPal's JSON, or raises an exception that says what it proves: `PayPalRefused` is PayPal's own
refusal, `GatewayUnreachable` proves that this attempt was not executed, `OutcomeUnknown` proves nothing. Their messages
never contain a secret or a body.

Plain httpx and not PayPal's SDK: `paypal-server-sdk` 2.4.0 blocks its thread, has no webhooks, and its base address is
an enum that a simulator's address does not fit.

Sources: https://developer.paypal.com/api/rest/authentication/,
https://developer.paypal.com/reference/guidelines/idempotency/.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple, Self
from urllib.parse import quote, urlencode, urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, SecretStr, field_validator, model_validator

from domain.errors import GatewayContractBroken, GatewayError, GatewayUnreachable, OutcomeUnknown
from infra.gateways.transport import ProviderHttp
from infra.loopback import LOOPBACK

NAME: Final = "paypal"
SANDBOX: Final = "https://api-m.sandbox.paypal.com"

WHOLE: Final = frozenset({"HUF", "JPY", "TWD"})
"""Currencies that PayPal takes without decimals. Source: https://developer.paypal.com/reference/currency-codes/."""

CURRENCIES: Final = frozenset(
    "AUD CAD CHF CZK DKK EUR GBP HKD HUF ILS JPY MXN NOK NZD PHP PLN SEK SGD THB TWD USD".split()  # noqa: SIM905
)
IN_COUNTRY_CURRENCIES: Final = frozenset({"BRL", "CNY", "INR", "MYR"})
"""Only for accounts in that country, so not enabled by default. Source: as above."""

TOKEN_MARGIN_SECONDS: Final = 300.0

SEARCH_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
SEARCH_PAGE: Final = 500
"""The largest page that Transaction Search returns."""

REFUSED_AT_THE_DOOR: Final = frozenset({401, 403, 429})
"""Authentication, permissions and rate limits are checked before execution: proof for this attempt only."""

Json = dict[str, Any]


class PayPalConfig(BaseModel):
    """How to reach PayPal. `api_base` is the sandbox, https://api-m.paypal.com for live payments, or a simulator.

    `webhook_id` is from PayPal's developer pages; without it no webhook can be verified. `cert_hosts` are the hosts
    that may serve PayPal's signing certificates; None means those of the environment that `api_base` names.
    """

    model_config = ConfigDict(frozen=True)

    client_id: str
    client_secret: SecretStr
    api_base: str = SANDBOX
    webhook_id: str = ""
    return_url: str = "https://example.invalid/return"
    cancel_url: str = "https://example.invalid/cancel"
    timeout_seconds: float = 12.0
    """For one whole exchange, from waiting for a connection to the last byte read. An operation may need four (a token,
    the order, the request itself, a status query): keep their sum below the lease."""
    connect_timeout_seconds: float = 5.0
    max_connections: int = 64
    cert_hosts: frozenset[str] | None = None
    allows_plain_http: bool = False
    """For a simulator that is not on a loopback address, say in the same Docker network."""
    currencies: frozenset[str] = CURRENCIES

    @field_validator("api_base")
    @classmethod
    def _is_bare(cls, value: str) -> str:
        return value.rstrip("/")

    @model_validator(mode="after")
    def _keeps_secrets(self) -> Self:
        if not self.api_base.startswith("https://") and not self.is_simulated:
            raise ValueError("api_base must be https; only a simulator may be http, on a loopback address")
        return self

    @property
    def is_simulated(self) -> bool:
        """Whether `api_base` is plain http: on a loopback address, or anywhere if `allows_plain_http`."""
        parts = urlsplit(self.api_base)
        is_near = self.allows_plain_http or parts.hostname in LOOPBACK
        return parts.scheme == "http" and is_near

    @field_validator("currencies")
    @classmethod
    def _are_known(cls, value: frozenset[str]) -> frozenset[str]:
        unknown = value - CURRENCIES - IN_COUNTRY_CURRENCIES
        if unknown:
            raise ValueError(f"not currencies of PayPal: {sorted(unknown)}")
        return value


class PayPalRefused(Exception):
    """A 4xx in PayPal's error format. Its message has only ids and codes, never PayPal's texts or our body."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        details = body.get("details") or ()
        self.status = status
        self.name = code_of(body.get("name"))
        self.issues = tuple(
            code_of(each.get("issue")) for each in details if isinstance(each, dict) and each.get("issue")
        )
        self.debug_id = code_of(body.get("debug_id"))
        super().__init__(f"status {status}, {self.name}, {'/'.join(self.issues) or 'no issue'}, debug {self.debug_id}")

    @property
    def code(self) -> str:
        """The most specific code: the first issue, or else the name."""
        return self.issues[0] if self.issues else self.name

    def names(self, issues: frozenset[str] | Mapping[str, Any]) -> str | None:
        """The first of these issues that the refusal names."""
        return next((each for each in (*self.issues, self.name) if each in issues), None)


def code_of(value: object) -> str:
    """`value` if it looks like a code, else "unreadable": nothing else of a body may get into our logs."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", text) else "unreadable"


class _Token(NamedTuple):
    value: SecretStr
    refresh_at: float
    """By the monotonic clock."""


class PayPalHttp:
    """PayPal's REST API as JSON in and out: bounded connections, one access token for all calls.

    One fetch of a token, some minutes before the old one expires, serves all waiting calls: fetching many is a
    documented cause of rate limits. If that fetch fails, it fails for all of them, so that no call waits for a second.
    https://developer.paypal.com/api/rest/authentication/
    """

    def __init__(self, config: PayPalConfig) -> None:
        self._config = config
        self._token: _Token | None = None
        self._fetching: asyncio.Task[_Token] | None = None
        self._http = ProviderHttp(
            NAME,
            max_connections=config.max_connections,
            timeout_seconds=config.timeout_seconds,
            connect_timeout_seconds=config.connect_timeout_seconds,
            base_url=config.api_base,
        )
        self.rests_seconds, self.connections = self._http.rest.seconds, self._http.connections

    async def get(self, path: str) -> Json | None:
        """The answer to a GET; None if PayPal answers that the object does not exist.

        Raises:
            GatewayUnreachable: the query did not reach PayPal, or was refused before execution.
            OutcomeUnknown: there was no readable answer.
        """
        try:
            return await self._call("GET", path)
        except PayPalRefused as refused:
            if refused.status == 404:
                return None
            raise _unanswered(refused) from refused

    async def search(self, since: datetime, until: datetime, page: int) -> Json | None:
        """One page of the transactions in this time; None if they are more than one search returns.

        Raises:
            GatewayUnreachable, OutcomeUnknown: as for `get`.
        """
        query = {
            "start_date": since.strftime(SEARCH_TIME),
            "end_date": until.strftime(SEARCH_TIME),
            "page_size": str(SEARCH_PAGE),
            "page": str(page),
        }
        try:
            return await self._call("GET", f"/v1/reporting/transactions?{urlencode(query)}")
        except PayPalRefused as refused:
            if refused.names(frozenset({"RESULTSET_TOO_LARGE"})):
                return None
            raise _unanswered(refused) from refused

    async def post(self, path: str, body: Json | None, *, request_id: str) -> Json:
        """The answer to a POST, executed at most once per `request_id`; an empty answer is an empty object.

        Raises:
            PayPalRefused: PayPal refused the request.
            GatewayUnreachable: proof that this attempt was not executed.
            OutcomeUnknown: no readable answer.
        """
        assert len(request_id) <= 108, "PayPal's limit for request ids"
        return await self._call("POST", path, body, {"PayPal-Request-Id": request_id})

    async def close(self) -> None:
        await self._http.close()

    async def _call(
        self, method: str, path: str, body: Json | None = None, headers: Mapping[str, str] | None = None
    ) -> Json:
        """If PayPal refuses the token, it is dropped and the same request is sent once more with a new one."""
        token = await self._access_token()
        response = await self._send(method, path, body, headers, token)
        if response.status_code == 401:
            self._drop(token)
            response = await self._send(method, path, body, headers, await self._access_token())
        return _read(response)

    async def _send(
        self, method: str, path: str, body: Json | None, headers: Mapping[str, str] | None, token: _Token
    ) -> httpx.Response:
        sent = {
            "Authorization": f"Bearer {token.value.get_secret_value()}",
            "Content-Type": "application/json",
            "Prefer": "return=representation",
            **(headers or {}),
        }
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        return await self._http.request(method, path, content=content, headers=sent)

    async def _access_token(self) -> _Token:
        """Raises GatewayUnreachable if the fetch of a token failed, even one that another call began."""
        if self._token is not None and time.monotonic() < self._token.refresh_at:
            return self._token
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._renew())
            # If all waiting calls are cancelled, nothing else retrieves its exception, and asyncio would log that.
            self._fetching.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Shielded, so that cancelling one call does not cancel the fetch for the others.
        return await asyncio.shield(self._fetching)

    async def _renew(self) -> _Token:
        self._token = await self._fetch_token()
        return self._token

    def _drop(self, token: _Token) -> None:
        """Forget the token, unless another call has already replaced it."""
        if self._token is token:
            self._token = None

    async def _fetch_token(self) -> _Token:
        """Raises GatewayUnreachable whatever fails: without a token the request itself is not sent."""
        auth = httpx.BasicAuth(self._config.client_id, self._config.client_secret.get_secret_value())
        form = {"grant_type": "client_credentials"}
        try:
            answer = _read(await self._http.request("POST", "/v1/oauth2/token", data=form, auth=auth))
            value, seconds = SecretStr(answer["access_token"]), float(answer["expires_in"])
        except (GatewayError, PayPalRefused) as error:
            raise GatewayUnreachable(NAME, f"no access token: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise GatewayUnreachable(NAME, "the access token cannot be read") from error
        return _Token(value, time.monotonic() + max(seconds - TOKEN_MARGIN_SECONDS, seconds / 2))


def _unanswered(refused: PayPalRefused) -> GatewayError:
    failure = GatewayUnreachable if refused.status in REFUSED_AT_THE_DOOR else OutcomeUnknown
    return failure(NAME, f"a query was refused: {refused}")


def _read(response: httpx.Response) -> Json:
    """Raises PayPalRefused for a 4xx in PayPal's format, OutcomeUnknown for a 5xx, GatewayContractBroken otherwise."""
    status, body = response.status_code, _json(response.content)
    if response.is_success and (body is not None or not response.content):
        return body or {}
    if status >= 500:
        raise OutcomeUnknown(NAME, f"status {status}, debug {code_of(response.headers.get('paypal-debug-id'))}")
    if response.is_client_error and (status in REFUSED_AT_THE_DOOR or (body and "name" in body)):
        raise PayPalRefused(status, body or {})
    raise GatewayContractBroken(NAME, f"an answer of status {status} cannot be read")


def _json(content: bytes) -> Json | None:
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def quoted(reference: str) -> str:
    return quote(reference, safe="")
