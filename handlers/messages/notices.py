"""A notice as it is kept in the inbox: JSON that later releases can still read.

It holds only what `decide` needs; the provider's own text is stored beside it, byte for byte.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from domain.notices import Dispute, External, Notice
from domain.operations import Declined, Expired, Pending, RequiresAction, Succeeded

_OUTCOMES: Final[Mapping[str, TypeAdapter[Any]]] = {
    each.__name__: TypeAdapter(each) for each in (Succeeded, Declined, Expired, Pending, RequiresAction)
}
_DISPUTE: Final = TypeAdapter(Dispute)
_EXTERNAL: Final = TypeAdapter(External)


def write_notice(notice: Notice) -> str:
    """The notice's content, without the fields that are columns of the inbox."""
    outcome = notice.outcome
    assert outcome is None or type(outcome).__name__ in _OUTCOMES, "a webhook reports only what a provider can know"
    body: dict[str, Any] = {
        "outcome": None if outcome is None else {"is": type(outcome).__name__, **asdict(outcome)},
        "currency": notice.currency,
        "dispute": None if notice.dispute is None else notice.dispute._asdict(),
        "is_ripe": notice.is_ripe,
    }
    if notice.external is not None:
        body |= {"external": notice.external._asdict(), "gateway_payment_id": notice.gateway_payment_id}
    if notice.captured_minor is not None:
        body |= {"captured_minor": notice.captured_minor, "gateway_payment_id": notice.gateway_payment_id}
    return to_json(body).decode()


def read_notice(content: str, *, gateway: str, event_id: str, type_: str, operation_number: int | None) -> Notice:
    """The notice that `write_notice` wrote.

    Raises:
        ValueError: the content is not a notice.
    """
    body = from_json(content)
    outcome, dispute, external = body["outcome"], body["dispute"], body.get("external")
    return Notice(
        gateway,
        event_id,
        type_,
        operation_number=operation_number,
        gateway_payment_id=body.get("gateway_payment_id"),
        outcome=None if outcome is None else _OUTCOMES[outcome.pop("is")].validate_python(outcome),
        currency=body["currency"],
        dispute=None if dispute is None else _DISPUTE.validate_python(dispute),
        is_ripe=body["is_ripe"],
        external=None if external is None else _EXTERNAL.validate_python(external),
        captured_minor=body.get("captured_minor"),
    )
