"""How PayPal is reached: its addresses and currencies, our configuration, the access token, and HTTP.

Promise: a call brings PayPal's JSON, or an exception that says what it proves: `PayPalRefused` is PayPal's own no,
`GatewayUnreachable` that this attempt was not executed, `OutcomeUnknown` nothing. No text of any of them contains a
secret or a body.

Plain httpx and not PayPal's SDK: `paypal-server-sdk` 2.4.0 blocks its thread, knows no webhooks, and its base address
is an enum that no simulator fits.

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
LIVE: Final = "https://api-m.paypal.com"

WHOLE: Final = frozenset({"HUF", "JPY", "TWD"})
"""Currencies that PayPal takes without decimals. Source: https://developer.paypal.com/reference/currency-codes/."""

CURRENCIES: Final = frozenset(
    "AUD CAD CHF CZK DKK EUR GBP HKD HUF ILS JPY MXN NOK NZD PHP PLN SEK SGD THB TWD USD".split()  # noqa: SIM905
)
IN_COUNTRY_CURRENCIES: Final = frozenset({"BRL", "CNY", "INR", "MYR"})
"""Only for accounts of that country, so they are not on by default. Source: as above."""

TOKEN_MARGIN_SECONDS: Final = 300.0

SEARCH_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
SEARCH_PAGE: Final = 500
"""The largest page of a list."""

REFUSED_AT_THE_DOOR: Final = frozenset({401, 403, 429})
"""Authentication, permissions and limits come before execution: proof for this attempt only."""

Json = dict[str, Any]


class PayPalConfig(BaseModel):
    """How to reach PayPal. `api_base` decides between live and sandbox, or is a simulator's address.

    `webhook_id` is ours from PayPal's developer pages; without it no webhook can be verified. `cert_hosts` are those
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
    """For one answer, from the first byte sent to the last byte read, waiting for a connection included. An operation
    may need four of them (a token, the order, the request itself, a look for evidence): keep that below the lease."""
    connect_timeout_seconds: float = 5.0
    max_connections: int = 64
    cert_hosts: frozenset[str] | None = None
    allows_plain_http: bool = False
    """For a simulator that is not on a loopback address but, say, in the same Docker network."""
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
        """Whether this is plain http, to the machine itself unless that is allowed elsewhere."""
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
    """A 4xx in PayPal's own form. Its text is made of ids and codes only, never of PayPal's sentences or our body."""

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
        """The most telling word: the first issue, else the name."""
        return self.issues[0] if self.issues else self.name

    def names(self, issues: frozenset[str] | Mapping[str, Any]) -> str | None:
        """The first of these issues that the refusal names."""
        return next((each for each in (*self.issues, self.name) if each in issues), None)


def code_of(value: object) -> str:
    """A code as far as it looks like one: nothing else of a body is repeated in our logs."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", text) else "unreadable"


class _Token(NamedTuple):
    value: SecretStr
    refresh_at: float
    """By the monotonic clock."""


class PayPalHttp:
    """PayPal's REST API as JSON in and out: bounded connections, one access token for all calls.

    A token is fetched once for everybody who waits, some minutes before the old one ends; many of them are a documented
    cause of rate limits. Nobody waits for longer than that one attempt: if it fails, it fails for all of them.
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
        """The answer to a question, None where PayPal says that there is no such thing.

        Raises:
            GatewayUnreachable: the question did not arrive, or was not admitted.
            OutcomeUnknown: there was no readable answer to it.
        """
        try:
            return await self._call("GET", path)
        except PayPalRefused as refused:
            if refused.status == 404:
                return None
            raise _unanswered(refused) from refused

    async def search(self, since: datetime, until: datetime, page: int) -> Json | None:
        """A page of what PayPal executed in this time, None where that is more than it tells at once.

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
        """The answer to a request that is executed at most once per `request_id`; an empty answer is an empty object.

        Raises:
            PayPalRefused: PayPal said no.
            GatewayUnreachable: proof that this attempt was not executed.
            OutcomeUnknown: no readable answer.
        """
        assert len(request_id) <= 108, "PayPal takes no longer request ids"
        return await self._call("POST", path, body, {"PayPal-Request-Id": request_id})

    async def close(self) -> None:
        await self._http.close()

    async def _call(
        self, method: str, path: str, body: Json | None = None, headers: Mapping[str, str] | None = None
    ) -> Json:
        """A token that is refused is dropped, and the same request goes once more with a new one."""
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
        """Raises GatewayUnreachable: the attempt to fetch one failed, whoever of those who wait began it."""
        if self._token is not None and time.monotonic() < self._token.refresh_at:
            return self._token
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._renew())
            # If all who wait are cancelled, nobody else asks how it ended, and asyncio would log that.
            self._fetching.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Whoever is cancelled takes it from nobody else.
        return await asyncio.shield(self._fetching)

    async def _renew(self) -> _Token:
        self._token = await self._fetch_token()
        return self._token

    def _drop(self, token: _Token) -> None:
        """Unless somebody else has replaced it already."""
        if self._token is token:
            self._token = None

    async def _fetch_token(self) -> _Token:
        """Raises GatewayUnreachable whatever goes wrong: without a token the request itself was not sent."""
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
    return failure(NAME, f"no answer to a question: {refused}")


def _read(response: httpx.Response) -> Json:
    """Raises PayPalRefused for a 4xx in PayPal's form, OutcomeUnknown for a 5xx, GatewayContractBroken for the rest."""
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
