"""What each process of the service runs, and the one-time work before them: schema, topics, partitions."""

# ruff: noqa: PLC0415 - each process imports what it runs and nothing else: start-up is part of every recovery

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from app.settings import Settings
from infra.observability.logs import configure_logs

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from app.health import Checks
    from infra.relay import RelayConfig


def run_worker(settings: Settings) -> None:
    """Commands in, gateway calls, results out, until SIGTERM."""
    from app.process import run
    from app.worker import Worker

    configure_logs("worker", as_json=settings.log_json)
    worker = Worker(settings)
    create_app = partial(_create_process_app, worker.checks())
    run(worker.run, create_app=create_app, host=settings.http_host, port=settings.worker_port)


def run_relay(settings: Settings) -> None:
    """The outbox to Kafka, until SIGTERM."""
    from app.process import run
    from infra.relay import Relay

    configure_logs("relay", as_json=settings.log_json)
    config = relay_config(settings)
    relay = Relay(config)

    async def check() -> str | None:
        return relay.trouble

    create_app = partial(_create_process_app, {"relay": check})
    host, port = settings.http_host, settings.relay_port
    run(relay.run, create_app=create_app, host=host, port=port, end_seconds=config.end_seconds)


def _create_process_app(checks: "Checks") -> "Starlette":
    from app.health import create_process_app

    return create_process_app(checks=checks)


def relay_config(settings: Settings) -> "RelayConfig":
    """The relay's part of the settings."""
    from infra.relay import RelayConfig

    return RelayConfig(
        postgres_url=settings.postgres_url,
        kafka=settings.kafka,
        topic=settings.events_topic,
        slot=settings.relay_slot,
        source=settings.relay_source,
        is_native=settings.relay_native,
    )


def run_http(settings: Settings) -> None:
    """Webhooks, health, all processes' metrics, the AsyncAPI page, and the outbox's partitions, until SIGTERM."""
    from app.http import create_http_app
    from app.maintenance import Maintenance
    from app.process import run
    from app.slots import watch_slots
    from app.webhooks import WebhookService

    configure_logs("http", as_json=settings.log_json)
    maintenance, webhooks = Maintenance(settings), WebhookService(settings)
    checks = {**maintenance.checks(), **webhooks.checks()}
    create_app = partial(create_http_app, checks=checks, peers=settings.metrics_peers, more_routes=webhooks.routes())

    async def main(stop: asyncio.Event) -> None:
        receiving = asyncio.create_task(webhooks.run())
        maintaining = asyncio.create_task(maintenance.run(stop))
        watching = asyncio.create_task(watch_slots(settings.postgres_url))
        stopping = asyncio.create_task(stop.wait())  # Maintenance may be waiting for that of another process.
        tasks: tuple[asyncio.Task[object], ...] = (receiving, maintaining, watching, stopping)
        # The others end only with an error, which ends the process.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    run(main, create_app=create_app, host=settings.http_host, port=settings.http_port)


def run_sandbox(settings: Settings, host: str, port: int, *, state_file: Path | None, webhooks_to: str | None) -> None:
    """The provider simulators, until SIGTERM."""
    from infra.sandbox.app import Sandbox, create_server

    configure_logs("sandbox", as_json=True)
    sandbox = Sandbox(state_file)
    if webhooks_to is not None:
        secret = settings.stripe_webhook_secrets[0].get_secret_value() if settings.stripe_webhook_secrets else ""
        sandbox.send_webhooks_to(webhooks_to, stripe_secret=secret, paypal_webhook_id=settings.paypal_webhook_id)
    create_server(host, port, sandbox).run()


async def prepare(settings: Settings) -> None:
    """Bring schema, topics and partitions to what this version needs; changes nothing that is so already.

    Raises:
        SQLAlchemyError, KafkaError, StoreUnavailable: a server is away or refuses.
        LeftUndone: schema and topics are there, but Postgres refused some of the maintenance.
    """
    from app.maintenance import LeftUndone, maintain_once
    from infra.kafka.topics import ensure_topics
    from infra.postgres.migrate import upgrade

    kept = {settings.dead_letter_topic}
    topics = asyncio.create_task(ensure_topics(settings.kafka, settings.topics, kept=kept))
    try:
        await asyncio.to_thread(upgrade, settings.postgres_url)
        report = await maintain_once(settings)
        if report.failed:
            raise LeftUndone("; ".join(report.failed))
    finally:
        await topics


def preload() -> None:
    """Import, in the background, the libraries that `prepare` will need: saves half a second."""

    def load() -> None:

        import infra.kafka.topics
        import infra.postgres.migrate  # noqa: F401 - imported for the side effect

    threading.Thread(target=load, name="preload", daemon=True).start()
