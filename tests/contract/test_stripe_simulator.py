"""The Stripe simulator itself: it does what Stripe documents about keys, refusals and lists, and what it adds works."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.conftest import Simulator

CHARGE = {
    "amount": "1250",
    "currency": "usd",
    "confirm": "true",
    "capture_method": "automatic",
    "payment_method": "pm_card_visa",
    "metadata[payment_id]": "p1",
}


@pytest.fixture
def http(simulator: Simulator) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=simulator.url, headers={"Authorization": "Bearer sk_test_x"}) as client:
        yield client


def post(http: httpx.Client, path: str, data: dict[str, str], key: str | None = None) -> httpx.Response:
    return http.post(f"/v1/{path}", data=data, headers={"Idempotency-Key": key} if key else {})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    return dict(answer.json()["error"])


def test_a_key_returns_the_first_answer_again(http: httpx.Client, simulator: Simulator) -> None:
    first, second = (post(http, "payment_intents", CHARGE, "k") for _ in range(2))

    assert first.content == second.content
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert second.headers["Original-Request"] == first.headers["Request-Id"]
    assert simulator.executed_charges("p1") == 1


def test_a_key_with_other_parameters_is_an_idempotency_error(http: httpx.Client) -> None:
    post(http, "payment_intents", CHARGE, "k")

    answer = post(http, "payment_intents", CHARGE | {"amount": "1300"}, "k")

    assert (answer.status_code, error_of(answer)["type"]) == (400, "idempotency_error")


def test_a_server_error_is_remembered_and_a_refused_parameter_is_not(http: httpx.Client, simulator: Simulator) -> None:
    simulator.fault("500_before", times=1)
    failed = [post(http, "payment_intents", CHARGE, "k1") for _ in range(2)]
    unknown = [post(http, "payment_intents", CHARGE | {"amout": "1"}, "k2") for _ in range(2)]

    assert [answer.status_code for answer in failed] == [500, 500]
    assert failed[1].headers["Idempotent-Replayed"] == "true"
    assert failed[0].headers["Stripe-Should-Retry"] == "false"
    assert [error_of(answer)["code"] for answer in unknown] == ["parameter_unknown"] * 2
    assert post(http, "payment_intents", CHARGE, "k2").status_code == 200


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"amount": "0"}, "parameter_invalid_integer"),
        ({"amount": "49"}, "amount_too_small"),
        ({"amount": "1.5"}, "parameter_invalid_integer"),
        ({"currency": "xxz"}, None),
        ({"currency": "isk", "amount": "550"}, None),
        ({"currency": "kwd", "amount": "5123"}, None),
        ({"payment_method": "pm_none"}, "resource_missing"),
        ({"payment_method_types[0]": "card"}, "payment_method_types_no_longer_supported"),
        ({"capture_method": "later"}, None),
        ({"confirm": "yes"}, None),
    ],
)
def test_a_wrong_parameter_is_refused_and_leaves_nothing(
    http: httpx.Client, simulator: Simulator, change: dict[str, str], code: str | None
) -> None:
    answer = post(http, "payment_intents", CHARGE | change)

    assert (answer.status_code, error_of(answer).get("code")) == (400, code)
    assert simulator.books()["payment_intents"] == []


def test_without_a_key_of_stripe_nothing_is_answered(http: httpx.Client) -> None:
    answer = http.get("/v1/payment_intents", headers={"Authorization": "Bearer nonsense"})

    assert answer.status_code == 401


def test_a_decline_keeps_its_payment_intent(http: httpx.Client) -> None:
    answer = post(http, "payment_intents", CHARGE | {"payment_method": "pm_card_visa_chargeDeclinedLostCard"})

    error = error_of(answer)
    assert (answer.status_code, error["type"], error["decline_code"]) == (402, "card_error", "lost_card")
    kept = http.get(f"/v1/payment_intents/{error['payment_intent']['id']}").json()
    assert (kept["status"], kept["last_payment_error"]["code"]) == ("requires_payment_method", "card_declined")
    assert http.get(f"/v1/charges/{error['charge']}").json()["status"] == "failed"


def test_lists_are_newest_first_and_paged(http: httpx.Client) -> None:
    ids = [post(http, "payment_intents", CHARGE).json()["id"] for _ in range(5)]

    first = http.get("/v1/payment_intents", params={"limit": 3, "created[gte]": 1}).json()
    rest = http.get("/v1/payment_intents", params={"limit": 3, "starting_after": first["data"][-1]["id"]}).json()

    assert [each["id"] for each in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert http.get("/v1/payment_intents", params={"created[gte]": 2**40}).json()["data"] == []
    created = first["data"][0]["created"]
    for bound, is_listed in (("lt", False), ("lte", True), ("gt", False), ("gte", True)):
        listed = http.get("/v1/payment_intents", params={f"created[{bound}]": created}).json()["data"]
        assert (created in [each["created"] for each in listed]) == is_listed


def test_the_books_add_up(http: httpx.Client, simulator: Simulator) -> None:
    charged = post(http, "payment_intents", CHARGE).json()["id"]
    held = post(http, "payment_intents", CHARGE | {"capture_method": "manual"}).json()["id"]
    post(http, "refunds", {"payment_intent": charged, "amount": "250"})
    post(http, f"payment_intents/{held}/capture", {"amount_to_capture": "1000"})

    books = simulator.books()

    usd = books["currencies"]["usd"]
    assert (usd["captured"], usd["refunded"], usd["authorized_open"], usd["payment_intents"]) == (2250, 250, 0, 2)
    assert books["executed_charges"] == {"p1": 2}


def test_latency_is_added_to_every_request(http: httpx.Client, simulator: Simulator) -> None:
    simulator.http.post("/_sandbox/latency", json={"latency_ms": 60})
    elapsed = post(http, "payment_intents", CHARGE).elapsed.total_seconds()
    simulator.http.post("/_sandbox/latency", json={"latency_ms": 0})

    assert elapsed >= 0.06


def test_a_rule_that_is_none_is_refused(simulator: Simulator) -> None:
    answer = simulator.http.post("/_sandbox/faults", json={"action": "explode"})

    assert answer.status_code == 400
    assert "cut_after" in answer.json()["actions"]
