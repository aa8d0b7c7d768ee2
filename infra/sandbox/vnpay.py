"""A local VNPay simulator: the payment page, IPNs, querydr and refunds, with its own books and faults on demand.

It verifies requests and signs messages by the rules that VNPay publishes, with no code shared with our gateway. Besides
VNPay's paths it answers under `/_sandbox/vnpay`: `books`, `configure`, `faults`, `manners`, `latency`, `reset`,
`payments/…`.
Sources: as in infra/gateways/vnpay.py.
"""

import asyncio
import copy
import hashlib
import hmac
import html
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote_plus

import httpx
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from infra.sandbox.connections import NoAnswer
from infra.sandbox.controls import GARBLED, asking_to_rest, control_routes, hold_up, known_to_reads, spoiled
from infra.sandbox.faults import Action, Call, Fault, Faults
from infra.sandbox.journal import Journal
from infra.sandbox.webhooks import Outgoing, WebhookSender

HANOI: Final = timezone(timedelta(hours=7))
TIME: Final = "%Y%m%d%H%M%S"
PAID: Final = "00"
OPEN: Final = "01"
FAILED: Final = "02"
SUSPECTED: Final = "07"
"""As a status and as a code: the payer was debited, and somebody at the merchant must look at it."""

TMN_CODE: Final = "SANDBOX1"
SECRET: Final = "sandbox-secret"  # noqa: S105 - valid for this simulator only

QUERY_FIELDS: Final = [
    "RequestId",
    "Version",
    "Command",
    "TmnCode",
    "TxnRef",
    "TransactionDate",
    "CreateDate",
    "IpAddr",
    "OrderInfo",
]
REFUND_FIELDS: Final = [
    "RequestId",
    "Version",
    "Command",
    "TmnCode",
    "TransactionType",
    "TxnRef",
    "Amount",
    "TransactionNo",
    "TransactionDate",
    "CreateBy",
    "CreateDate",
    "IpAddr",
    "OrderInfo",
]
ANSWER_FIELDS: Final = [
    "ResponseId",
    "Command",
    "ResponseCode",
    "Message",
    "TmnCode",
    "TxnRef",
    "Amount",
    "BankCode",
    "PayDate",
    "TransactionNo",
    "TransactionType",
    "TransactionStatus",
    "OrderInfo",
]

Payment = dict[str, Any]
Endpoint = Callable[[Request], Awaitable[Response]]


class VNPaySimulator:
    """One terminal, `tmn_code`, and its payments by TxnRef. IPNs go to `ipn_url`, if it is set."""

    name = "vnpay"

    def __init__(self, *, tmn_code: str = TMN_CODE, hash_secret: str = SECRET, state_file: Path | None = None) -> None:
        self.ipn_url: str | None = None
        self.latency_seconds = 0.0
        self.question_interval_seconds = 0.0
        self._asked_at: dict[str, float] = {}
        self.sender = WebhookSender(is_accepted=_is_confirmed)
        self.faults = Faults()
        self._tmn_code = tmn_code
        self._secret = hash_secret.encode()
        self._journal = Journal(state_file)
        self.sender.journal = self._journal.beside("webhooks")
        self._payments: dict[str, Payment] = {}
        self._numbers = 14_000_000

    # --- memory -----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load what an earlier run wrote, and compact the journal."""
        for line in self._journal.read():
            self._payments[line["ref"]] = line
            self._numbers = max([self._numbers, *(int(each["number"]) for each in [line, *line["refunds"]])])
        self._journal.rewrite(iter(self._payments.values()))
        self.sender.load()

    async def close(self) -> None:
        await self.sender.close()
        self._journal.close()

    def reset(self) -> None:
        """Forget everything but the latency."""
        self._payments.clear()
        self._asked_at.clear()
        self.faults = Faults()
        self._journal.rewrite(iter(()))

    def snapshot(self) -> dict[str, Payment]:
        return copy.deepcopy(self._payments)

    def totals(self) -> dict[str, dict[str, int]]:
        """In dong: amounts captured and refunded; and the number of payments."""
        sums: Counter[str] = Counter(captured=0, refunded=0, authorized_open=0, disputed=0, count_refunds=0)
        for payment in self._payments.values():
            held, captured, refunded = _effect(payment)
            sums.update(payments=1, captured=captured, refunded=refunded, authorized_open=held)
        return {"vnd": dict(sums)} if self._payments else {}

    def effect(self, payment_id: str) -> tuple[int, int, int]:
        """The amounts held, captured and refunded for our payment id, over all its attempts."""
        own = [_effect(each) for ref, each in self._payments.items() if ref.startswith(payment_id.replace("-", ""))]
        return (0, sum(each[1] for each in own), sum(each[2] for each in own))

    def _keep(self, payment: Payment) -> None:
        self._payments[payment["ref"]] = payment
        self._journal.append(payment)

    def _next_number(self) -> str:
        self._numbers += 1
        return str(self._numbers)

    # --- signatures -------------------------------------------------------------------------------------------------

    def _sign(self, data: str) -> str:
        return hmac.new(self._secret, data.encode(), hashlib.sha512).hexdigest()

    def _signed_query(self, fields: Mapping[str, str]) -> str:
        data = "&".join(f"{name}={quote_plus(value)}" for name, value in sorted(fields.items()))
        return f"{data}&vnp_SecureHash={self._sign(data)}"

    def _is_signed(self, body: Mapping[str, Any], names: list[str]) -> bool:
        data = "|".join(str(body.get(f"vnp_{name}", "")) for name in names)
        return hmac.compare_digest(self._sign(data), str(body.get("vnp_SecureHash", "")))

    # --- the payment page -------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        """The page for the payer's browser. A POST with `success` (and `code`) pays or declines."""
        fields = {name: value for name, value in parse_qsl(request.url.query) if name.startswith("vnp_")}
        signature = fields.pop("vnp_SecureHash", "")
        data = "&".join(f"{name}={quote_plus(value)}" for name, value in sorted(fields.items()))
        if not hmac.compare_digest(self._sign(data), signature):
            return RedirectResponse("/paymentv2/Payment/Error.html?code=70", 303)
        payment = self._payments.get(fields["vnp_TxnRef"]) or self._open(fields)
        if request.method == "POST":
            is_paid = request.query_params.get("success") == "true"
            return self._decide(payment, request.query_params.get("code") or ("00" if is_paid else "24"))
        action = html.escape(f"{request.url.path}?{request.url.query}")
        buttons = "".join(
            f'<form method="post" action="{action}&amp;success={value}"><button>{label}</button></form>'
            for value, label in (("true", "Pay"), ("false", "Cancel"))
        )
        return HTMLResponse(f"<!doctype html><title>VNPay sandbox</title><h1>{payment['ref']}</h1>{buttons}")

    def _open(self, fields: Mapping[str, str]) -> Payment:
        payment = {
            "ref": fields["vnp_TxnRef"],
            "amount": int(fields["vnp_Amount"]),
            "created": fields["vnp_CreateDate"],
            "ends": fields.get("vnp_ExpireDate"),
            "info": fields["vnp_OrderInfo"],
            "status": OPEN,
            "number": "0",
            "paid_at": "",
            "refunds": [],
        }
        self._keep(payment)
        return payment

    def _decide(self, payment: Payment, code: str) -> Response:
        """The payer pays (`00`), or the payer or bank declines. A decision is final."""
        if payment["ends"] is not None and _now() > payment["ends"] and payment["status"] == OPEN:
            code = "11"
        if payment["status"] == OPEN:
            declined = self.faults.decline(_call("confirm", "/paymentv2/vpcpay.html", payment["ref"]))
            code = _declined_as(declined) if declined is not None and code == PAID else code
            is_paid = code == PAID
            status = code if code in (PAID, SUSPECTED) else FAILED
            payment |= {"status": status, "code": code, "paid_at": _now()}
            payment["number"] = self._next_number() if is_paid else "0"
            self._keep(payment)
            self._send_ipn(payment)
        return JSONResponse(payment)

    def _send_ipn(self, payment: Payment) -> None:
        if self.ipn_url is None:
            return
        fields = {
            "vnp_TmnCode": self._tmn_code,
            "vnp_Amount": str(payment["amount"] + self.sender.manners.amount_off_by * 100),
            "vnp_BankCode": "NCB",
            "vnp_OrderInfo": payment["info"],
            "vnp_PayDate": payment["paid_at"],
            "vnp_ResponseCode": payment["code"],
            "vnp_TransactionNo": payment["number"],
            "vnp_TransactionStatus": payment["status"],
            "vnp_TxnRef": payment["ref"],
        }
        self.sender.send(Outgoing(f"{self.ipn_url}?{self._signed_query(fields)}", method="GET"))

    # --- the merchant's API -----------------------------------------------------------------------------------------

    async def _transaction(self, request: Request) -> Response:
        if self.latency_seconds:
            await asyncio.sleep(self.latency_seconds)
        body = json.loads(await request.body())
        operation = "read" if body.get("vnp_Command") == "querydr" else "refund"
        fault = self.faults.pick(_call(operation, request.url.path, str(body.get("vnp_TxnRef"))))
        match fault.action if fault else None:
            case Action.CUT_BEFORE:
                return NoAnswer()
            case Action.RATE_LIMIT:
                return asking_to_rest(fault, Response("too many requests", 429))
            case Action.UNAVAILABLE | Action.ERROR_BEFORE:
                return asking_to_rest(fault, Response("<html>unavailable</html>", 503))
            case Action.CONFLICT:
                return self._respond(body, {"ResponseCode": "94", "Message": "Duplicate request"})
        await hold_up(fault)
        return spoiled(fault, self._execute(body, fault), self.sender, garbled=GARBLED)

    def _execute(self, body: Mapping[str, Any], fault: Fault | None) -> Response:
        command = body.get("vnp_Command")
        names = QUERY_FIELDS if command == "querydr" else REFUND_FIELDS
        if body.get("vnp_TmnCode") != self._tmn_code:
            return self._respond(body, {"ResponseCode": "02", "Message": "Invalid TmnCode"})
        if not self._is_signed(body, names):
            return self._respond(body, {"ResponseCode": "97", "Message": "Invalid signature"})
        payment = known_to_reads(fault, self._payments).get(str(body["vnp_TxnRef"]))
        if payment is None or payment["created"] != body["vnp_TransactionDate"]:
            return self._respond(body, {"ResponseCode": "91", "Message": "Transaction not found"})
        if command != "querydr":
            return self._refund(body, payment, fault)
        if self._is_too_soon(payment["ref"]):
            return self._respond(body, {"ResponseCode": "94", "Message": "Duplicate request"})
        return self._query(body, payment)

    def _is_too_soon(self, reference: str) -> bool:
        if not self.question_interval_seconds:
            return False
        now, before = time.monotonic(), self._asked_at.get(reference)
        self._asked_at[reference] = now
        return before is not None and now - before < self.question_interval_seconds

    def _query(self, body: Mapping[str, Any], payment: Payment) -> Response:
        """The latest transaction of the payment: its last refund, or the payment itself."""
        latest = payment["refunds"][-1] if payment["refunds"] else payment | {"type": "01"}
        return self._respond(body, _shown(latest))

    def _refund(self, body: Mapping[str, Any], payment: Payment, fault: Fault | None) -> Response:
        amount, type_ = int(body["vnp_Amount"]), str(body["vnp_TransactionType"])
        if payment["status"] != PAID:
            return self._respond(body, {"ResponseCode": "95", "Message": "Not successful"})
        if amount <= 0 or amount > _left(payment) or (type_ == "02" and amount != payment["amount"]):
            return self._respond(body, {"ResponseCode": "93", "Message": "Invalid amount"})
        is_declined = fault is not None and fault.action is Action.DECLINE
        return self._respond(body, _shown(self._take_on(payment, amount, type_, is_declined=is_declined)))

    def _take_on(self, payment: Payment, amount: int, type_: str, *, is_declined: bool = False) -> dict[str, Any]:
        """Enter a refund in VNPay's books."""
        refund = {
            "amount": amount,
            "number": self._next_number(),
            "type": type_,
            "status": "09" if is_declined else "05" if self.refunds_wait else "00",
            "paid_at": _now(),
        }
        payment["refunds"].append(refund)
        self._keep(payment)
        return refund

    refunds_wait = False
    """Whether refunds stay in process (05) until they are settled by hand."""

    def _respond(self, body: Mapping[str, Any], fields: dict[str, str]) -> Response:
        answer = {
            "ResponseId": hashlib.sha256(self._next_number().encode()).hexdigest()[:32],
            "Command": str(body.get("vnp_Command", "")),
            "TmnCode": str(body.get("vnp_TmnCode", "")),
            "TxnRef": str(body.get("vnp_TxnRef", "")),
            "OrderInfo": str(body.get("vnp_OrderInfo", "")),
        } | fields
        data = "|".join(answer.get(name, "") for name in ANSWER_FIELDS)
        # Absent promotion fields are signed as empty texts, so the text of a query's answer ends in two bars.
        data += "||" if body.get("vnp_Command") == "querydr" else ""
        signed = {f"vnp_{name}": value for name, value in answer.items()} | {"vnp_SecureHash": self._sign(data)}
        return JSONResponse(signed)

    # --- its own pages ----------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """VNPay's paths, and the simulator's own."""
        own = "/_sandbox/vnpay"
        return [
            Route("/paymentv2/vpcpay.html", self._page, methods=["GET", "POST"]),
            Route("/merchant_webapi/api/transaction", self._transaction, methods=["POST"]),
            Route(f"{own}/books", self._books),
            Route(f"{own}/payments/{{ref}}/decide", self._decide_by_hand, methods=["POST"]),
            Route(f"{own}/payments/{{ref}}/refund", self._refund_by_hand, methods=["POST"]),
            Route(f"{own}/payments/{{ref}}/settle_refund", self._settle_refund, methods=["POST"]),
            Route(f"{own}/configure", self._configure, methods=["POST"]),
            *control_routes(own, lambda _: self),
        ]

    async def _books(self, request: Request) -> Response:
        payment_id = request.query_params.get("payment_id")
        if payment_id is not None:
            return JSONResponse({"effect": self.effect(payment_id)})
        return JSONResponse({"currencies": self.totals(), "payments": list(self._payments.values())})

    async def _decide_by_hand(self, request: Request) -> Response:
        payment = self._payments.get(request.path_params["ref"])
        if payment is None:
            return JSONResponse({"error": "no payer has opened the payment page"}, 404)
        return self._decide(payment, request.query_params.get("code", "00"))

    async def _refund_by_hand(self, request: Request) -> Response:
        """Somebody refunds `amount` dong, or the rest, in VNPay's portal. VNPay sends no IPN for it."""
        payment = self._payments[request.path_params["ref"]]
        amount = int(request.query_params.get("amount", _left(payment) // 100)) * 100
        if payment["status"] != PAID or not 0 < amount <= _left(payment):
            return JSONResponse({"error": "the payment has less than that left"}, 400)
        return JSONResponse(self._take_on(payment, amount, "02" if amount == payment["amount"] else "03"))

    async def _settle_refund(self, request: Request) -> Response:
        payment = self._payments[request.path_params["ref"]]
        payment["refunds"][-1]["status"] = request.query_params.get("status", "00")
        self._keep(payment)
        return JSONResponse(payment)

    async def _configure(self, request: Request) -> Response:
        """`ipn_url`, `latency_ms`, `refunds_wait`, and the sender's manners.

        Also `question_interval_seconds`: a query repeated sooner is answered with 94; 0 turns that off.
        """
        given = dict(await request.json())
        self.ipn_url = given.pop("ipn_url", self.ipn_url)
        self.latency_seconds = float(given.pop("latency_ms", self.latency_seconds * 1000)) / 1000
        self.question_interval_seconds = float(given.pop("question_interval_seconds", 0))
        self.refunds_wait = bool(given.pop("refunds_wait", False))
        self.sender.behave(given)
        return JSONResponse({"ipn_url": self.ipn_url})


def _effect(payment: Payment) -> tuple[int, int, int]:
    """The amounts held, captured and refunded, in dong."""
    captured = payment["amount"] if payment["status"] == PAID else 0
    return 0, captured // 100, _refunded(payment) // 100


def _refunded(payment: Payment) -> int:
    return sum(int(each["amount"]) for each in payment["refunds"] if each["status"] != "09")


def _left(payment: Payment) -> int:
    return int(payment["amount"]) - _refunded(payment)


def _shown(given: Mapping[str, Any]) -> dict[str, str]:
    return {
        "ResponseCode": "00",
        "Message": "Success",
        "Amount": str(given["amount"]),
        "BankCode": "NCB",
        "PayDate": str(given.get("paid_at", "")),
        "TransactionNo": str(given["number"]),
        "TransactionType": str(given["type"]),
        "TransactionStatus": str(given["status"]),
    }


def _payment_id(ref: str) -> str:
    digits = ref[:32]
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _call(operation: str, path: str, ref: str) -> Call:
    return Call(operation, path, payment_id=_payment_id(ref))


def _declined_as(fault: Fault) -> str:
    """VNPay's code in the rule; if it has none, that the payer's balance is too low."""
    return fault.code if fault.code.isdigit() else "51"


def _is_confirmed(answer: httpx.Response) -> bool:
    return answer.is_success and answer.json().get("RspCode") in ("00", "02")


def _now() -> str:
    return datetime.now(HANOI).strftime(TIME)
