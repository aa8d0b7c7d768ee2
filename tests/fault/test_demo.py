"""The demo as a test: it kills the worker while faults happen, and its exit code shows whether every promise held."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.client import Heard
from app.demo.books import Books, Comparison, Sums
from app.demo.orders import STORIES, Planned, stream
from app.demo.run import check_told
from app.demo.tally import DemoTally
from app.stack_file import StackFile
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
ORDERS = 40


@contextmanager
def demo(data_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "demo", "--orders", str(ORDERS), "--seed", "7"],
        cwd=ROOT,
        env=os.environ | {"PAYMENTS_DATA_DIR": str(data_dir), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def test_the_demo_keeps_every_promise(tmp_data_dir: Path) -> None:
    with demo(tmp_data_dir) as process:
        output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert "the worker is killed" in output
    assert "✗" not in output
    assert "difference 0 with 4 providers" in output


def test_money_that_only_the_provider_knows_is_found(tmp_data_dir: Path) -> None:
    """Somebody charges a card at the provider without a command of ours: the books differ, and the demo fails."""
    with demo(tmp_data_dir) as process:
        note = StackFile(tmp_data_dir / "demo")
        wait_until(lambda: note.read() is not None or process.poll() is not None)
        stack = note.read()
        assert stack is not None, process.communicate()[0]
        charge_behind_our_back(stack.urls["simulator"])
        output, _ = process.communicate(timeout=150)
    assert process.returncode == 1, output
    assert "✗ our ledger and the providers' books agree: not for stripe CHF" in output
    assert "77.00" in output


def charge_behind_our_back(simulator: str) -> None:
    answer = httpx.post(
        f"{simulator}/v1/payment_intents",
        headers={"authorization": "Bearer sk_test_somebody"},
        data={"amount": "7700", "currency": "chf", "payment_method": "pm_card_visa", "confirm": "true"},
        trust_env=False,
    )
    assert answer.json()["status"] == "succeeded", answer.text


def test_a_small_demo_tells_every_story() -> None:
    stories = {each.planned.story for each in stream(len(STORIES), 1) if each.planned is not None}
    assert stories == STORIES.keys() - {"unreadable message"}


def test_a_seed_repeats_the_orders() -> None:
    def shape(seed: int) -> list[tuple[str, str]]:
        return [(each.planned.story, each.planned.kind) for each in stream(60, seed) if each.planned is not None]

    assert shape(3) == shape(3)
    assert shape(3) != shape(4)


def test_the_tally_accepts_one_result_for_each_command() -> None:
    tally, events = answered()
    for event in events:
        tally.note_heard(Heard(event, 1.0))
    assert not tally.missing
    assert [check.promise for check in tally.checks() if not check.held] == []


def test_an_event_that_kafka_delivers_again_counts_once() -> None:
    tally, events = answered()
    for event in (*events, *events):
        tally.note_heard(Heard(event, 1.0))
    assert all(check.held for check in tally.checks())


def test_a_second_result_for_a_command_is_found() -> None:
    tally, events = answered()
    for event in (*events, events[0] | {"event_id": "another", "payment_seq": 2}):
        tally.note_heard(Heard(event, 1.0))
    assert broken(tally) == {"every accepted command has exactly one final result"}


def test_a_missing_answer_is_found() -> None:
    tally, events = answered()
    for event in events[1:]:
        tally.note_heard(Heard(event, 1.0))
    assert len(tally.missing) == 1
    assert "every delivery of a command is answered" in broken(tally)


def test_a_gap_in_a_payments_numbers_is_found() -> None:
    tally, events = answered()
    for event in (events[0] | {"payment_seq": 2}, *events[1:]):
        tally.note_heard(Heard(event, 1.0))
    assert broken(tally) == {"each payment's events are in order without a gap"}


def test_a_wrong_result_is_found() -> None:
    tally, events = answered()
    for event in (events[0] | {"type": "payment.declined.v1"}, *events[1:]):
        tally.note_heard(Heard(event, 1.0))
    assert broken(tally) == {"every command has the expected result"}


@pytest.mark.parametrize(
    ("lie", "held"),
    [({}, True), ({"amount_minor": 1001}, False), ({"payment": {"currency": "USD", "captured_minor": 2000}}, False)],
    ids=["the truth", "a wrong amount", "a wrong state"],
)
def test_amounts_that_do_not_add_up_to_the_ledger_are_found(lie: dict[str, object], held: bool) -> None:
    tally, events = answered()
    for event in (events[0] | lie, *events[1:]):
        tally.note_heard(Heard(event, 1.0))
    sums = Sums(captured=3000)
    books = Books([Comparison("stripe", "USD", sums, sums)], [])
    for _, state in tally.states.values():
        state.setdefault("refunded_minor", 0)
    assert check_told(tally, books).held is held


def broken(tally: DemoTally) -> set[str]:
    return {check.promise for check in tally.checks() if not check.held}


def answered() -> tuple[DemoTally, list[dict[str, object]]]:
    """A tally of three charges that were sent once each, and their results."""
    sendings = [each for each in stream(300, 5) if each.planned is not None and each.planned.story == "charged"][:3]
    tally = DemoTally(sendings)
    for sending in sendings:
        tally.note_sent(sending, 0.0)
    return tally, [captured(each.planned) for each in sendings if each.planned is not None]


def captured(planned: Planned) -> dict[str, object]:
    return {
        "type": "payment.captured.v1",
        "event_id": f"event of {planned.command_id}",
        "command_id": str(planned.command_id),
        "payment_id": str(planned.payment_id),
        "payment_seq": 1,
        "operation_number": 1,
        "replayed": False,
        "currency": "USD",
        "amount_minor": 1000,
        "payment": {"currency": "USD", "captured_minor": 1000, "refunded_minor": 0},
    }
