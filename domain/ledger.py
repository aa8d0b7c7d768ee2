"""The journal of money that moved: one row is one transfer, so every row is balanced by construction.

A transfer debits one account and credits another by the same amount; read as postings, `+amount` and `-amount`
of one currency always sum to zero (docs/decisions/0003).
"""

from enum import StrEnum
from typing import NamedTuple
from uuid import UUID


class Account(StrEnum):
    """The accounts of a payment. `gateway_clearing` is what the provider owes us."""

    GATEWAY_CLEARING = "gateway_clearing"
    CUSTOMER_SALES = "customer_sales"
    CUSTOMER_REFUNDS = "customer_refunds"
    CUSTOMER_DISPUTES = "customer_disputes"


class Transfer(NamedTuple):
    """`amount_minor` (> 0) of `currency` from `credit` to `debit`, booked by the event `(payment_id, payment_seq)`."""

    payment_id: UUID
    payment_seq: int
    debit: Account
    credit: Account
    amount_minor: int
    currency: str
