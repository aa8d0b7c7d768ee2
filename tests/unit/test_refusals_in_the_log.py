"""The log names an input that cannot be saved, but not its content: that may be a payer's, or a link to their page."""

from unittest.mock import create_autospec
from uuid import UUID

from structlog.testing import capture_logs

from domain.decision import Answer, Input, Notified
from domain.errors import InputRefusedByStore
from domain.notices import Notice
from domain.operations import RequiresAction
from domain.ports import Inbox
from handlers.apply_notices import NoticeApplier
from handlers.leases import Leases
from handlers.settle import Settler
from handlers.write_path import Applied, Refused, WritePath

PAYMENT = UUID(int=7)
WAITS = RequiresAction("pi_3", "redirect", "https://hooks.stripe.com/3ds?client_secret=seti_1")


def refusing(given: Input) -> WritePath:
    path: WritePath = create_autospec(WritePath, instance=True)
    path.apply.return_value = Applied(refused=[Refused(given, InputRefusedByStore("a constraint"))])  # type: ignore[attr-defined]
    return path


async def test_an_answer() -> None:
    given = Answer(PAYMENT, 3, 1, WAITS)
    leases = create_autospec(Leases, instance=True)
    settler = Settler(write_path=refusing(given), submit=lambda requests: None, leases=leases)
    settler.add(given)
    with capture_logs() as told:
        await settler.settle_some()
    (line,) = told
    assert (line["payment"], line["operation"], line["error"]) == (str(PAYMENT), 3, "a constraint")
    assert line["answer"] == "requires action (reference pi_3, action_type redirect)"
    assert "client_secret" not in str(told)


async def test_a_webhook() -> None:
    notice = Notice("stripe", "evt_1", "payment_intent.requires_action", PAYMENT, 3, outcome=WAITS)
    inbox = create_autospec(Inbox, instance=True)
    inbox.claim.return_value = []
    applier = NoticeApplier(
        inbox=inbox, write_path=refusing(Notified(1, PAYMENT, notice)), submit=lambda requests: None
    )
    with capture_logs() as told:
        await applier.apply_once()
    (line,) = told
    assert (line["payment"], line["gateway"], line["event_id"]) == (str(PAYMENT), "stripe", "evt_1")
    assert "client_secret" not in str(told)
