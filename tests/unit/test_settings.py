"""What the environment says is checked at the start, not by the server that it would disturb."""

import pytest
from pydantic import ValidationError

from app.settings import Settings


@pytest.mark.parametrize("name", ["Payments-Relay", "", "a" * 64, "relay\n", "rélay"])
def test_what_cannot_name_a_slot_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="is no name for a slot: lower-case letters"):
        Settings(relay_slot=name)


def test_what_can_name_a_slot_is_taken() -> None:
    assert Settings(relay_slot="payments_relay_2").relay_slot == "payments_relay_2"
