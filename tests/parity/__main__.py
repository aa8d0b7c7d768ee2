"""`make parity`: publishes the same rows with the real Debezium and with our relay; every message must be equal.

Shows the first difference and exits with 1 if there is one.
"""

import argparse
import asyncio
import json
import shutil
import sys
import uuid
from pathlib import Path

from rich.console import Console

from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local import DEFAULT_DATA_DIR, LocalStack
from infra.local.postgres import create_database, drop_database
from infra.postgres.migrate import upgrade
from infra.relay import RelayConfig
from tests.support.outbox import Row, commit
from tests.support.parity import (
    Message,
    create_slot,
    debezium,
    debeziums,
    first_difference,
    messages_on,
    our_relay,
    varied_transactions,
)

GOLDENS = Path(__file__).resolve().parents[1] / "contract" / "goldens" / "debezium" / "messages.json"
GOLDEN_ROWS = 60
console = Console()


Published = dict[int, list[Message]]
"""The messages of each partition, in order."""


async def compare(stack: LocalStack, postgres_url: str, transactions: list[list[Row]]) -> Published | None:
    """The messages that both published; None if they differ."""
    run = uuid.uuid4().hex[:8]
    ours = RelayConfig(
        postgres_url=postgres_url,
        kafka=KafkaAccess(stack.urls.kafka_bootstrap),
        topic=f"parity.{run}.ours",
        slot=f"parity_{run}",
        feedback_seconds=0.1,
    )
    theirs = debeziums(ours, f"parity.{run}.debezium")
    await ensure_topics(ours.kafka, {ours.topic: 8, theirs.topic: 8})
    await create_slot(theirs)
    rows = [row for rows in transactions for row in rows]
    console.print("starting Kafka Connect with Debezium …")
    # Offsets of an earlier run point to WAL that no longer exists.
    shutil.rmtree(DEFAULT_DATA_DIR / "parity" / "connect", ignore_errors=True)
    async with debezium(theirs, DEFAULT_DATA_DIR / "parity"), our_relay(ours):
        console.print(f"writing {len(rows)} rows in {len(transactions)} transactions …")
        await commit(postgres_url, *transactions)
        console.print("reading both topics …")
        left, right = await messages_on(theirs, rows), await messages_on(ours, rows)
    difference = first_difference(left, right)
    if difference is not None:
        console.print(f"[bold red]they differ[/]\n{difference}", soft_wrap=True, highlight=False)
        return None
    console.print(f"[green]{sum(map(len, left.values()))} messages are equal[/]: partition, key, value, headers, order")
    return left


def write_goldens(transactions: list[list[Row]], published: Published) -> None:
    """Write the first rows and the messages that the real Debezium made of them to the goldens."""
    by_id = {dict(message.headers)["id"]: message for messages in published.values() for message in messages}
    rows = [row for rows in transactions for row in rows][:GOLDEN_ROWS]
    goldens = [
        {"row": row._replace(id=str(row.id))._asdict(), "message": by_id[str(row.id).encode().hex()]._asdict()}  # type: ignore[arg-type]
        for row in rows
    ]
    GOLDENS.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n")
    console.print(f"{len(goldens)} goldens written to {GOLDENS.name}")


def main() -> int:
    """Run the comparison on servers of its own; 0 if the messages are equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--rows", type=int, default=1000, help="how many rows (default: 1000)")
    parser.add_argument("--write-goldens", action="store_true", help="keep what Debezium made of the first rows")
    arguments = parser.parse_args()
    transactions = varied_transactions(arguments.rows)
    with LocalStack(DEFAULT_DATA_DIR / "parity", on_progress=console.print) as stack:
        postgres_url = create_database(stack.urls.postgres_url, f"parity_{uuid.uuid4().hex[:8]}")
        try:
            upgrade(postgres_url)
            published = asyncio.run(compare(stack, postgres_url, transactions))
        finally:
            drop_database(postgres_url)
    if published is not None and arguments.write_goldens:
        write_goldens(transactions, published)
    return 0 if published is not None else 1


if __name__ == "__main__":
    sys.exit(main())
