"""A local MoMo simulator: create, pay page, IPN, query, confirm and refund, with its own books and faults on demand.

It verifies requests and signs messages by the rules that MoMo publishes, with no code shared with our gateway. Besides
MoMo's paths it answers under `/_sandbox/momo`: `books`, `configure`, `faults`, `manners`, `latency`, `reset`,
`payments/…`.
Sources: as in infra/gateways/momo.py.
"""

import asyncio
import copy
import hashlib
import hmac
import html
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from infra.sandbox.connections import NoAnswer
from infra.sandbox.controls import GARBLED, asking_to_rest, control_routes, hold_up, known_to_reads, spoiled
from infra.sandbox.faults import Action, Call, Fault, Faults
from infra.sandbox.journal import Journal
from infra.sandbox.webhooks import Outgoing, WebhookSender

SIGNED: Final = {
    "create": "amount extraData ipnUrl orderId orderInfo partnerCode redirectUrl requestId requestType",
    "query": "orderId partnerCode requestId",
    "confirm": "amount description orderId partnerCode requestId requestType",
    "refund": "amount description orderId partnerCode requestId transId",
}
IPN: Final = (
    "amount extraData message orderId orderInfo orderType partnerCode payType requestId responseTime resultCode transId"
)
WAITING, PAID, HELD, CANCELED, EXPIRED, REFUND_FAILED = 1000, 0, 9000, 1003, 1005, 1080
MINIMUM, MAXIMUM = 1_000, 50_000_000
PARTNER: Final = "MOMOSANDBOX"
ACCESS: Final = "sandbox-access"
SECRET: Final = "sandbox-secret"  # noqa: S105 - valid for this simulator only

Order = dict[str, Any]


class MoMoSimulator:
    """One partner and its orders. IPNs go to the address in each order."""

    name = "momo"

    def __init__(self, *, state_file: Path | None = None) -> None:
        self.latency_seconds = 0.0
        self.refunds_wait = False
        self.sender = WebhookSender()
        self.faults = Faults()
        self._journal = Journal(state_file)
        self.sender.journal = self._journal.beside("webhooks")
        self._orders: dict[str, Order] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._running: set[str] = set()
        self._numbers = 4_000_000_000

    # --- memory -----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load what an earlier run wrote, and compact the journal."""
        for line in self._journal.read():
            if "order" in line:
                self._orders[line["order"]["orderId"]] = line["order"]
            else:
                self._answers[line["key"]] = line["answer"]
        numbers = [int(each["transId"]) for order in self._orders.values() for each in (order, *order["refunds"])]
        self._numbers = max([self._numbers, *numbers])
        kept: list[dict[str, Any]] = [{"order": each} for each in self._orders.values()]
        kept += [{"key": key, "answer": answer} for key, answer in self._answers.items()]
        self._journal.rewrite(iter(kept))
        self.sender.load()

    async def close(self) -> None:
        await self.sender.close()
        self._journal.close()

    def reset(self) -> None:
        """Forget everything but the latency."""
        self._orders.clear()
        self._answers.clear()
        self.faults = Faults()
        self._journal.rewrite(iter(()))

    def snapshot(self) -> dict[str, Order]:
        return copy.deepcopy(self._orders)

    def totals(self) -> dict[str, dict[str, int]]:
        """In dong: amounts captured, refunded and held; and the number of payments."""
        sums: Counter[str] = Counter(captured=0, refunded=0, authorized_open=0, disputed=0, count_refunds=0)
        for order in self._orders.values():
            held, captured, refunded = _effect(order)
            sums.update(payments=1, captured=captured, refunded=refunded, authorized_open=held)
        return {"vnd": dict(sums)} if self._orders else {}

    def effect(self, payment_id: str) -> tuple[int, int, int]:
        """The amounts held, captured and refunded for our payment id, over all its attempts."""
        own = [_effect(order) for order_id, order in self._orders.items() if order_id.startswith(payment_id)]
        return sum(e[0] for e in own), sum(e[1] for e in own), sum(e[2] for e in own)

    def _keep(self, order: Order) -> None:
        self._orders[order["orderId"]] = order
        self._journal.append({"order": order})

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    # --- the partner's API ------------------------------------------------------------------------------------------

    async def _call(self, request: Request) -> Response:
        """Handle any POST: faults, signature, idempotency by requestId, execution."""
        if self.latency_seconds:
            await asyncio.sleep(self.latency_seconds)
        verb = request.url.path.rsplit("/", 1)[1]
        body = json.loads(await request.body())
        operation = "read" if verb == "query" else str(body.get("requestType", verb)) if verb == "confirm" else verb
        call = Call(operation, request.url.path, str(body.get("requestId")), payment_id=str(body.get("orderId"))[:36])
        fault, key = self.faults.pick(call), f"{verb}:{body['requestId']}"
        before = self._before(fault, body)
        if before is None and key in self._running:
            before = _in_progress(body)
        if before is not None:
            return before
        self._running.add(key)
        try:
            await hold_up(fault)
        finally:
            self._running.discard(key)
        return spoiled(fault, self._once(verb, body, request, fault), self.sender, garbled=GARBLED)

    def _before(self, fault: Fault | None, body: Mapping[str, Any]) -> Response | None:
        match fault.action if fault else None:
            case Action.CUT_BEFORE:
                return NoAnswer()
            case Action.RATE_LIMIT:
                return _answer(body, 10, "maintenance")
            case Action.UNAVAILABLE | Action.ERROR_BEFORE:
                return asking_to_rest(fault, Response("<html>unavailable</html>", 503))
            case Action.CONFLICT:
                return _in_progress(body)
            case _:
                return None

    def _once(self, verb: str, body: dict[str, Any], request: Request, fault: Fault | None) -> Response:
        if body.get("partnerCode") != PARTNER or not _is_signed(body, SIGNED[verb]):
            return _answer(body, 13, "authentication failed")
        key = f"{verb}:{body['requestId']}"
        if verb != "query" and key in self._answers:
            return JSONResponse(self._answers[key])
        response = self._execute(verb, body, request, fault)
        answer = json.loads(bytes(response.body))
        if verb != "query" and answer["resultCode"] in (PAID, REFUND_FAILED):
            self._answers[key] = answer
            self._journal.append({"key": key, "answer": answer})
        return response

    def _execute(self, verb: str, body: dict[str, Any], request: Request, fault: Fault | None) -> Response:
        match verb:
            case "create":
                return self._create(body, request)
            case "query":
                return self._query(body, known_to_reads(fault, self._orders))
            case "confirm":
                return self._confirm(body)
            case _:
                return self._refund(body, fails=fault is not None and fault.action is Action.DECLINE)

    def _create(self, body: dict[str, Any], request: Request) -> Response:
        if body["orderId"] in self._orders:
            return _answer(body, 41, "duplicate orderId")
        if not MINIMUM <= int(body["amount"]) <= MAXIMUM:
            return _answer(body, 22, "amount out of range")
        order = {
            name: body[name]
            for name in ("orderId", "requestId", "amount", "orderInfo", "ipnUrl", "redirectUrl", "extraData")
        } | {"captures": body.get("autoCapture", True), "code": WAITING, "transId": 0, "refunds": []}
        self._keep(order)
        url = f"{str(request.base_url).rstrip('/')}/v2/gateway/pay?t={body['orderId']}"
        return _answer(body, 0, "Successful.", amount=body["amount"], payUrl=url)

    def _query(self, body: dict[str, Any], orders: Mapping[str, Order]) -> Response:
        order = orders.get(body["orderId"])
        if order is None:
            return _answer(body, 42, "order not found")
        shown = {"amount": order["amount"], "transId": order["transId"], "refundTrans": order["refunds"]}
        return _answer(body, order["code"], "", **shown)

    def _confirm(self, body: dict[str, Any]) -> Response:
        order = self._orders.get(body["orderId"])
        if order is None:
            return _answer(body, 42, "order not found")
        if order["code"] != HELD:
            return _answer(body, 43 if order["code"] == WAITING else 1017, "not authorised")
        if int(body["amount"]) != order["amount"]:
            return _answer(body, 22, "differs from the authorised amount")
        order["code"] = PAID if body["requestType"] == "capture" else CANCELED
        self._keep(order)
        return _answer(body, 0, "", amount=order["amount"], transId=order["transId"], requestType=body["requestType"])

    def _refund(self, body: dict[str, Any], *, fails: bool) -> Response:
        order = next((each for each in self._orders.values() if each["transId"] == int(body["transId"])), None)
        if order is None or order["code"] != PAID:
            return _answer(body, 1088, "not refundable")
        if any(each["orderId"] == body["orderId"] for each in order["refunds"]):
            return _answer(body, 41, "duplicate orderId")
        if not MINIMUM <= int(body["amount"]) <= MAXIMUM:
            return _answer(body, 22, "amount out of range")
        if int(body["amount"]) > order["amount"] - _refunded(order):
            return _answer(body, 1081, "more than was paid")
        code = REFUND_FAILED if fails else 7002 if self.refunds_wait else PAID
        refund = {
            "orderId": body["orderId"],
            "amount": int(body["amount"]),
            "resultCode": code,
            "transId": self._next_number(),
            "createdTime": _now(),
        }
        order["refunds"].append(refund)
        self._keep(order)
        return _answer(body, code, "", amount=refund["amount"], transId=refund["transId"])

    # --- the payer --------------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        """The page for the payer's browser. A POST with `success` (and `code`) pays or declines."""
        order = self._orders.get(request.query_params.get("t", ""))
        if order is None:
            return HTMLResponse("no such order", 404)
        if request.method == "POST":
            is_paid = request.query_params.get("success") == "true"
            answer = self._decide(order, int(request.query_params.get("code", 0 if is_paid else 1006)))
            is_browser = request.query_params.get("redirect") == "true"
            return RedirectResponse(self._way_back(order), 303) if is_browser else answer
        name = html.escape(order["orderId"])
        buttons = "".join(
            f'<form method="post" action="?t={name}&amp;redirect=true&amp;success={value}">'
            f"<button>{label}</button></form>"
            for value, label in (("true", "Pay"), ("false", "Refuse"))
        )
        return HTMLResponse(f"<!doctype html><title>MoMo sandbox</title><h1>{name}</h1>{buttons}")

    def _decide(self, order: Order, code: int) -> Response:
        """The payer pays (0), or the payer or issuer declines. A decision is final."""
        if order["code"] == WAITING:
            declined = self.faults.decline(Call("confirm", "/v2/gateway/pay", payment_id=order["orderId"][:36]))
            code = _declined_as(declined) if declined is not None and code == PAID else code
            is_paid = code == PAID
            order["code"] = (PAID if order["captures"] else HELD) if is_paid else code
            order["transId"] = self._next_number()
            self._keep(order)
            self._send_ipn(order)
        return JSONResponse(order)

    def _way_back(self, order: Order) -> str:
        """The address that the payer's browser returns to, with the fields of the IPN."""
        return f"{order['redirectUrl']}?{urlencode(self._signed(order))}"

    def _send_ipn(self, order: Order) -> None:
        body = json.dumps(self._signed(order), ensure_ascii=False).encode()
        if order["ipnUrl"].startswith("http://"):  # never send to a real merchant, whose address is https
            self.sender.send(Outgoing(order["ipnUrl"], body, {"content-type": "application/json"}))

    def _signed(self, order: Order) -> dict[str, Any]:
        fields = {
            "partnerCode": PARTNER,
            "orderId": order["orderId"],
            "requestId": order["requestId"],
            "amount": order["amount"] + self.sender.manners.amount_off_by,
            "orderInfo": order["orderInfo"],
            "orderType": "momo_wallet",
            "transId": order["transId"],
            "resultCode": order["code"],
            "message": "Thành công." if order["code"] in (PAID, HELD) else "Giao dịch bị từ chối.",
            "payType": "qr",
            "responseTime": _now(),
            "extraData": order["extraData"],
        }
        return fields | {"signature": _sign(fields, IPN)}

    # --- its own pages ----------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """MoMo's paths, and the simulator's own."""
        own, api = "/_sandbox/momo", "/v2/gateway/api"
        return [
            *(Route(f"{api}/{verb}", self._call, methods=["POST"]) for verb in SIGNED),
            Route("/v2/gateway/pay", self._page, methods=["GET", "POST"]),
            Route(f"{own}/books", self._books),
            Route(f"{own}/payments/{{order}}/decide", self._decide_by_hand, methods=["POST"]),
            Route(f"{own}/payments/{{order}}/settle_refund", self._settle_refund, methods=["POST"]),
            Route(f"{own}/configure", self._configure, methods=["POST"]),
            *control_routes(own, lambda _: self),
        ]

    async def _books(self, request: Request) -> Response:
        payment_id = request.query_params.get("payment_id")
        if payment_id is not None:
            return JSONResponse({"effect": self.effect(payment_id)})
        return JSONResponse({"currencies": self.totals(), "orders": list(self._orders.values())})

    async def _decide_by_hand(self, request: Request) -> Response:
        return self._decide(self._orders[request.path_params["order"]], int(request.query_params.get("code", 0)))

    async def _settle_refund(self, request: Request) -> Response:
        order = self._orders[request.path_params["order"]]
        order["refunds"][-1]["resultCode"] = int(request.query_params.get("code", 0))
        self._keep(order)
        return JSONResponse(order)

    async def _configure(self, request: Request) -> Response:
        """`latency_ms`, `refunds_wait`, and the sender's manners."""
        given = dict(await request.json())
        self.latency_seconds = float(given.pop("latency_ms", self.latency_seconds * 1000)) / 1000
        self.refunds_wait = bool(given.pop("refunds_wait", False))
        self.sender.behave(given)
        return JSONResponse({"latency_ms": self.latency_seconds * 1000})


def _sign(fields: Mapping[str, Any], names: str) -> str:
    text = "&".join([f"accessKey={ACCESS}", *(f"{name}={fields[name]}" for name in names.split())])
    return hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()


def _is_signed(body: Mapping[str, Any], names: str) -> bool:
    try:
        return hmac.compare_digest(_sign(body, names), str(body.get("signature", "")))
    except KeyError:
        return False


def _answer(body: Mapping[str, Any], code: int, message: str, *, status: int = 200, **more: Any) -> Response:
    echo = {name: body.get(name) for name in ("partnerCode", "orderId", "requestId")}
    return JSONResponse(echo | {"resultCode": code, "message": message, "responseTime": _now()} | more, status)


def _in_progress(body: Mapping[str, Any]) -> Response:
    """MoMo's answer to a requestId whose first request is still running."""
    return _answer(body, 7000, "in progress", status=422)


def _declined_as(fault: Fault) -> int:
    """MoMo's code in the rule; if it has none, that the issuer declined."""
    return int(fault.code) if fault.code.isdigit() else 1002


def _effect(order: Order) -> tuple[int, int, int]:
    """The amounts held, captured and refunded, in dong."""
    amount = int(order["amount"])
    return (
        amount if order["code"] == HELD else 0,
        amount if order["code"] == PAID else 0,
        _refunded(order),
    )


def _refunded(order: Order) -> int:
    return sum(int(each["amount"]) for each in order["refunds"] if each["resultCode"] in (PAID, 7000, 7002))


def _now() -> int:
    return int(time.time() * 1000)
