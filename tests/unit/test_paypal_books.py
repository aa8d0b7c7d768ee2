"""The books of the PayPal simulator conserve money under any sequence of requests."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from infra.sandbox.paypal_books import PayPalBooks, Refusal

MINOR = st.integers(min_value=1, max_value=1500)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["capture", "final", "void", "refund", "dispute", "lose", "settle", "approve", "execute", "deny"]
        ),
        MINOR,
        st.integers(min_value=0, max_value=3),
    ),
    max_size=25,
)
WALLETS = st.sampled_from([None, "good", "pending", "pending-refund", "refused"])


def amount(minor: int) -> dict[str, Any]:
    return {"amount": {"currency_code": "USD", "value": f"{minor / 100:.2f}"}}


def pick(books: PayPalBooks, kind: str, which: int) -> str:
    ids = list(books.tables[kind])
    return ids[which % len(ids)] if ids else "none"


def actions(books: PayPalBooks, order_id: str, minor: int, which: int) -> dict[str, Callable[[], object]]:
    hold, capture, refund = (pick(books, kind, which) for kind in ("authorizations", "captures", "refunds"))
    return {
        "capture": lambda: books.capture(hold, amount(minor)),
        "final": lambda: books.capture(hold, amount(minor) | {"final_capture": True}),
        "void": lambda: books.void(hold),
        "refund": lambda: books.refund(capture, amount(minor)),
        "dispute": lambda: books.dispute(capture),
        "lose": lambda: books.resolve(pick(books, "disputes", which), is_won=False),
        "settle": lambda: books.settle("refunds", refund, "FAILED" if which else "COMPLETED"),
        "approve": lambda: books.approve(order_id, "good"),
        "execute": lambda: books.execute(order_id, "authorize" if which % 2 else "capture"),
        "deny": lambda: books.deny(order_id),
    }


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["AUTHORIZE", "CAPTURE"]), WALLETS, STEPS)
def test_no_sequence_of_requests_moves_more_than_the_order_is_worth(
    intent: str, wallet: str | None, steps: list[tuple[str, int, int]]
) -> None:
    books = PayPalBooks()
    source = {"vault_id": wallet} if wallet else {}
    unit = {"custom_id": "p1.1", **amount(1000)}
    order = books.create({"intent": intent, "purchase_units": [unit], "payment_source": {"paypal": source}})

    for name, minor, which in steps:
        with suppress(Refusal):
            actions(books, order["id"], minor, which)[name]()
        effect = books.effects("p1")
        assert effect["held"] + effect["captured"] <= 1000
        assert min(effect.values()) >= 0
        assert effect["refunded"] + effect["lost"] <= effect["captured"]
        assert effect["executed"] <= 1
    assert books.totals()["usd"]["captured"] == books.effects("p1")["captured"]
