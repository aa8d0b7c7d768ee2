"""Refusals of the simulators, in the shape of Stripe's error body."""

from collections.abc import Mapping
from typing import Any


class StripeError(Exception):
    """An answer that is an error. `is_stored` is False for what Stripe decides before its idempotency layer.

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
    """A parameter that Stripe refuses before execution."""
    return StripeError(400, message, is_stored=False, param=param, code=code)


def missing(kind: str, reference: str, *, param: str, status: int = 404) -> StripeError:
    """An object that does not exist: 404 in a path, 400 in a parameter."""
    message = f"No such {kind}: '{reference}'"
    return StripeError(status, message, is_stored=False, param=param, code="resource_missing")
