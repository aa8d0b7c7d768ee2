"""Amounts of money: integer minor units beside an ISO 4217 currency, never floats.

A provider's own scale (Stripe's ISK in hundredths, PayPal's HUF without decimals) stays in its gateway.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Final

_TWO_DECIMALS = (
    "AED AUD BGN BRL CAD CHF CNY CZK DKK EUR GBP HKD HUF IDR ILS INR MXN MYR NOK NZD PHP PLN RON SAR SEK SGD THB TRY"
    " TWD UAH USD ZAR"
)
MINOR_UNITS: Final[dict[str, int]] = {
    **dict.fromkeys(_TWO_DECIMALS.split(), 2),
    **dict.fromkeys("CLP ISK JPY KRW PYG UGX VND XAF XOF XPF".split(), 0),  # noqa: SIM905 - a row of codes reads better
    **dict.fromkeys("BHD JOD KWD OMR TND".split(), 3),  # noqa: SIM905 - as above
}
"""Decimals of each currency that this service knows. Source: ISO 4217 list one."""

AMOUNT_MAX_MINOR: Final = 10**15
"""No single amount may exceed this; sums of many stay far inside a signed 64-bit column."""


@dataclass(frozen=True, slots=True)
class Money:
    """`minor` minor units of `currency`: `Money(1250, "USD")` is USD 12.50."""

    minor: int
    currency: str

    def __str__(self) -> str:
        decimals = MINOR_UNITS.get(self.currency, 2)
        return f"{self.currency} {Decimal(self.minor).scaleb(-decimals):,.{decimals}f}"
