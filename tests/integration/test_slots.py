"""The WAL that each slot retains, as `payments http` reports it, including slots that nobody reads."""

from uuid import uuid4

from app.slots import RETAINED_BYTES, note_slots
from tests.support.outbox import fetch_value
from tests.support.relays import CREATE, DROP


def retained() -> dict[str, float]:
    """Bytes by slot, as Prometheus would scrape them."""
    (metric,) = RETAINED_BYTES.collect()
    return {sample.labels["slot"]: sample.value for sample in metric.samples}


async def test_a_slot_without_a_reader_is_told_with_what_it_keeps_until_it_is_dropped(postgres_url: str) -> None:
    slot = f"test_{uuid4().hex[:12]}"
    await fetch_value(postgres_url, CREATE, slot)
    await fetch_value(postgres_url, "SELECT pg_logical_emit_message(true, 'test', repeat('x', 100000))")
    await note_slots(postgres_url)
    assert retained().keys() == {slot}
    assert retained()[slot] > 100_000
    await fetch_value(postgres_url, DROP, slot)
    await note_slots(postgres_url)
    assert retained() == {}
