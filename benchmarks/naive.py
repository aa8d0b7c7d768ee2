"""A naive service for comparison, as most teams would write it first: one message at a time, correct if nothing fails.

FastStream hands over one command. A SQLAlchemy ORM session looks for its idempotency key. The gateway is called inside
the handler (and inside the transaction). The ORM flushes payment, operation and outbox row. A loop polls the outbox.
Run by `python -m benchmarks.naive`; the environment names the servers and topics as for the real service.
"""

import asyncio
import os
import uuid
from typing import Any

from aiokafka import AIOKafkaProducer
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from pydantic import BaseModel
from sqlalchemy import BigInteger, ForeignKey, String, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

POLL_SECONDS = 0.1
GATEWAY_SECONDS = float(os.environ.get("PAYMENTS_INSTANT_GATEWAY_LATENCY_MS", "0")) / 1000


class Base(DeclarativeBase):
    """The three tables of the naive service."""


class NaivePayment(Base):
    """A payment."""

    __tablename__ = "naive_payments"
    payment_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(String, index=True)
    currency: Mapped[str]
    captured_minor: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(String, index=True)


class NaiveOperation(Base):
    """One command and its result."""

    __tablename__ = "naive_operations"
    idempotency_key: Mapped[str] = mapped_column(primary_key=True)
    payment_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("naive_payments.payment_id"))
    state: Mapped[str]


class NaiveOutbox(Base):
    """An event to publish."""

    __tablename__ = "naive_outbox"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    payment_id: Mapped[str]
    payload: Mapped[str]
    is_sent: Mapped[bool] = mapped_column(default=False, index=True)


class ChargeCommand(BaseModel):
    """The charge command, as far as the naive service reads it."""

    type: str
    idempotency_key: str
    payment_id: uuid.UUID
    order_id: str
    amount_minor: int
    currency: str


async def call_gateway(command: ChargeCommand) -> str:
    """Succeed after the same latency as the `instant` gateway in the real benchmark."""
    if GATEWAY_SECONDS:
        await asyncio.sleep(GATEWAY_SECONDS)
    return f"instant_{command.idempotency_key}"


async def handle(command: ChargeCommand, sessions: async_sessionmaker[AsyncSession]) -> None:
    """One message, one session, one transaction with the gateway call in it."""
    async with sessions() as session, session.begin():
        known = await session.scalar(
            select(NaiveOperation).where(NaiveOperation.idempotency_key == command.idempotency_key)
        )
        if known is not None:
            return
        await call_gateway(command)
        session.add(
            NaivePayment(
                payment_id=command.payment_id,
                order_id=command.order_id,
                currency=command.currency,
                captured_minor=command.amount_minor,
                status="captured",
            )
        )
        await session.flush()
        session.add(
            NaiveOperation(idempotency_key=command.idempotency_key, payment_id=command.payment_id, state="succeeded")
        )
        payload = f'{{"type":"payment.captured.v1","idempotency_key":"{command.idempotency_key}"}}'
        session.add(NaiveOutbox(payment_id=str(command.payment_id), payload=payload))


async def poll_outbox(sessions: async_sessionmaker[AsyncSession], producer: AIOKafkaProducer, topic: str) -> None:
    """Publish what is not marked as sent, then mark it."""
    while True:
        async with sessions() as session, session.begin():
            unsent = select(NaiveOutbox).where(NaiveOutbox.is_sent.is_(False)).order_by(NaiveOutbox.id).limit(500)
            rows = (await session.scalars(unsent)).all()
            for row in rows:
                await producer.send(topic, row.payload.encode(), key=row.payment_id.encode())
                row.is_sent = True
            await producer.flush()
        if not rows:
            await asyncio.sleep(POLL_SECONDS)


async def main() -> None:
    """Run until killed."""
    environment: dict[str, Any] = dict(os.environ)
    url = environment["PAYMENTS_POSTGRES_URL"].replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = create_async_engine(url, pool_size=5)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    broker = KafkaBroker(environment["PAYMENTS_KAFKA_BOOTSTRAP"], logger=None)

    @broker.subscriber(
        environment["PAYMENTS_COMMANDS_TOPIC"], group_id="naive", auto_offset_reset="earliest", ack_policy=AckPolicy.ACK
    )
    async def on_command(command: ChargeCommand) -> None:
        await handle(command, sessions)

    producer = AIOKafkaProducer(bootstrap_servers=environment["PAYMENTS_KAFKA_BOOTSTRAP"])
    await producer.start()
    await broker.start()
    await poll_outbox(sessions, producer, environment["PAYMENTS_EVENTS_TOPIC"])


if __name__ == "__main__":
    asyncio.run(main())
