"""Error answers of the Stripe simulator, in the shape of Stripe's error body."""

from collections.abc import Mapping
from typing import Any


class StripeError(Exception):
    """An error answer. `is_stored` is False if Stripe decides it before its idempotency layer.

    Source: https://docs.stripe.com/api/errors, https://docs.stripe.com/api/idempotent_requests.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 - the provider's own field name
        is_stored: bool = True,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.is_stored = is_stored
        self.error: Mapping[str, Any] = {
            "type": type,
            "message": message,
            **{name: value for name, value in details.items() if value is not None},
        }


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> StripeError:
    """An error for a parameter that Stripe refuses before execution."""
    return StripeError(400, message, is_stored=False, param=param, code=code)


def missing(kind: str, reference: str, *, param: str, status: int = 404) -> StripeError:
    """An error for an object that does not exist: 404 if a path names it, 400 if a parameter does."""
    message = f"No such {kind}: '{reference}'"
    return StripeError(status, message, is_stored=False, param=param, code="resource_missing")
