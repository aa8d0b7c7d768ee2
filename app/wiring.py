"""The composition root: which class implements each Protocol. A new gateway is one registration in `GATEWAYS`, and its
name in `app.settings.GATEWAYS_KNOWN`.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import asyncpg
from pydantic import SecretStr
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.settings import NOWHERE, Settings
from domain.capabilities import AmountLimits
from domain.notices import WebhookReader
from domain.operations import GatewayRequest
from domain.ports import Clock, Gateway, PaymentStore
from domain.rules import Rules
from handlers import metrics
from handlers.dispatch import Dispatcher
from handlers.leases import Leases
from handlers.pace import Pace
from handlers.reconcile import Asker, HoldAnswer, Reconciler
from handlers.settle import Settler
from handlers.sweep import Sweep
from handlers.write_path import WritePath
from infra.gateways.instant import InstantGateway
from infra.gateways.momo import MoMoConfig, MoMoGateway
from infra.gateways.momo_webhooks import MoMoWebhooks
from infra.gateways.paypal import PayPalConfig, PayPalGateway
from infra.gateways.paypal_webhooks import PayPalWebhooks
from infra.gateways.stripe import StripeConfig, StripeGateway
from infra.gateways.stripe_webhooks import StripeWebhooks
from infra.gateways.vnpay import VNPayConfig, VNPayGateway
from infra.gateways.vnpay_webhooks import VNPayWebhooks
from infra.postgres.clock import PostgresClock
from infra.postgres.pool import close_pool, create_pool
from infra.postgres.store import PostgresStore
from infra.redis.recent_keys import ValkeyRecentKeys


class Registration(NamedTuple):
    """One gateway: how to create it from the settings, and which of them it requires."""

    create: Callable[[Settings, Clock], Gateway]
    """Takes the clock by which call times are recorded."""
    webhooks: Callable[[Settings], WebhookReader] | None = None
    """Creates the reader of its webhooks; None if it sends none."""
    keys: Sequence[str] = ()
    """Settings that only calls need: without them, each payment would wait for a provider that refuses us."""
    credentials: Sequence[str] = ()
    """Settings that verifying its messages, or asking about them, needs as well."""
    webhook_key: str | None = None
    """The setting that only verifying its webhooks needs: without it they are refused, and payments are asked about."""
    addresses: Sequence[str] = ()
    """Our own addresses, to which the provider sends payers and messages: they have no usable default."""


GATEWAYS: Final[Mapping[str, Registration]] = {
    "stripe": Registration(
        lambda settings, clock: StripeGateway(stripe_config(settings), clock=clock),
        webhooks=lambda settings: StripeWebhooks(settings.stripe_webhook_secrets, settings.stripe_action_window),
        keys=("stripe_api_key",),
        webhook_key="stripe_webhook_secrets",
        addresses=("stripe_return_url",),
    ),
    "paypal": Registration(
        lambda settings, clock: PayPalGateway(paypal_config(settings), clock),
        webhooks=lambda settings: PayPalWebhooks(paypal_config(settings)),
        credentials=("paypal_client_id", "paypal_client_secret"),
        webhook_key="paypal_webhook_id",
        addresses=("paypal_return_url", "paypal_cancel_url"),
    ),
    "vnpay": Registration(
        lambda settings, clock: VNPayGateway(vnpay_config(settings), clock),
        webhooks=lambda settings: VNPayWebhooks(vnpay_config(settings)),
        credentials=("vnpay_tmn_code", "vnpay_hash_secret"),
        addresses=("vnpay_return_url",),
    ),
    "momo": Registration(
        lambda settings, clock: MoMoGateway(momo_config(settings)),
        webhooks=lambda settings: MoMoWebhooks(momo_config(settings)),
        credentials=("momo_partner_code", "momo_access_key", "momo_secret_key"),
        addresses=("momo_redirect_url", "momo_ipn_url"),
    ),
    "instant": Registration(
        lambda settings, clock: InstantGateway(latency_seconds=settings.instant_gateway_latency_ms / 1000)
    ),
}

new_id = uuid7


def now() -> datetime:
    """This machine's clock, timezone-aware UTC; payments use the store's clock."""
    return datetime.now(UTC)


def stripe_config(settings: Settings) -> StripeConfig:
    return StripeConfig(
        api_key=settings.stripe_api_key,
        api_base=settings.stripe_api_base,
        timeout_seconds=settings.stripe_timeout_seconds,
        max_connections=settings.concurrency_of("stripe"),
        return_url=settings.stripe_return_url,
        multi_capture=settings.stripe_multi_capture,
        action_window=settings.stripe_action_window,
    )


def paypal_config(settings: Settings) -> PayPalConfig:
    return PayPalConfig(
        client_id=settings.paypal_client_id,
        client_secret=settings.paypal_client_secret,
        api_base=settings.paypal_api_base,
        webhook_id=settings.paypal_webhook_id,
        return_url=settings.paypal_return_url,
        cancel_url=settings.paypal_cancel_url,
        max_connections=settings.concurrency_of("paypal"),
        allows_plain_http=settings.gateways_allow_plain_http,
    )


def vnpay_config(settings: Settings) -> VNPayConfig:
    return VNPayConfig(
        tmn_code=settings.vnpay_tmn_code,
        hash_secret=settings.vnpay_hash_secret,
        pay_url=settings.vnpay_pay_url,
        api_url=settings.vnpay_api_url,
        return_url=settings.vnpay_return_url,
        question_interval=timedelta(seconds=settings.vnpay_question_interval_seconds),
        max_connections=settings.concurrency_of("vnpay"),
    )


def momo_config(settings: Settings) -> MoMoConfig:
    return MoMoConfig(
        partner_code=settings.momo_partner_code,
        access_key=settings.momo_access_key,
        secret_key=settings.momo_secret_key,
        api_base=settings.momo_api_base,
        redirect_url=settings.momo_redirect_url,
        ipn_url=settings.momo_ipn_url,
        max_connections=settings.concurrency_of("momo"),
    )


def create_gateways(settings: Settings, clock: Clock = now) -> dict[str, Gateway]:
    """The gateways that this installation uses, by name; `clock` records when calls were made.

    Raises:
        ValueError: as `check_gateways`, for calls.
    """
    check_gateways(settings, for_calls=True)
    return {name: GATEWAYS[name].create(settings, clock) for name in settings.gateways}


class Connected(NamedTuple):
    """The gateways of this installation, and the store, whose clock both use for call times."""

    gateways: dict[str, Gateway]
    pool: "asyncpg.Pool[asyncpg.Record]"
    store: PostgresStore


@asynccontextmanager
async def connected(settings: Settings, *, connections: int) -> AsyncIterator[Connected]:
    """Connected, with at most `connections` connections to Postgres, until the end of the block.

    Raises:
        ValueError: as `check_gateways`.
        StoreUnavailable: Postgres cannot be reached.
    """
    async with AsyncExitStack() as stack:
        clock = PostgresClock()
        gateways = create_gateways(settings, clock)
        for gateway in gateways.values():
            stack.push_async_callback(gateway.close)
        pool = await create_pool(settings.postgres_url, size=connections)
        stack.push_async_callback(close_pool, pool)
        store = PostgresStore(pool, clock)
        await store.look_at_clock()
        yield Connected(gateways, pool, store)


def create_write_path(store: PaymentStore, rules: Rules, redis: Redis) -> WritePath:
    """The one write path over this store."""
    recent = ValkeyRecentKeys(redis, on_unavailable=metrics.HINT_UNAVAILABLE.inc)
    return WritePath(store=store, rules=rules, clock=store.now, new_id=new_id, recent=recent)


def connect_redis(settings: Settings) -> Redis:
    """A client with short timeouts: Valkey only gives hints (`infra/redis/recent_keys.py`), so nothing waits for it."""
    return Redis.from_url(settings.redis_url, socket_timeout=0.2, socket_connect_timeout=0.2)


def create_paces(settings: Settings, gateways: Mapping[str, Gateway]) -> dict[str, Pace]:
    """The pace at which each gateway is asked about stuck operations."""
    return {
        name: Pace(time.monotonic, gateway, settings.questions_per_second_of(name))
        for name, gateway in gateways.items()
    }


class Calling(NamedTuple):
    """The parts that call gateways and save answers; `settler.run` and `leases.run` must be running."""

    dispatcher: Dispatcher
    settler: Settler
    leases: Leases

    @property
    def waiting(self) -> int:
        """Operations that are not called yet, or whose answers are not saved yet."""
        return self.dispatcher.waiting + self.settler.waiting


def create_calling(
    store: PaymentStore,
    write_path: WritePath,
    rules: Rules,
    gateways: Mapping[str, Gateway],
    limits: Mapping[str, int],
    *,
    paces: Mapping[str, Pace],
) -> Calling:
    """Calls to `gateways`, at most `limits` at a time each, whose answers go through the write path."""
    leases = Leases(store=store, lease=rules.retry.lease)
    dispatcher = Dispatcher(gateways=gateways, limits=limits, store=store, clock=store.now, leases=leases, paces=paces)
    settler = Settler(write_path=write_path, submit=dispatcher.submit, leases=leases)
    dispatcher.on_answer = settler.add
    return Calling(dispatcher, settler, leases)


def create_sweep(
    settings: Settings,
    store: PaymentStore,
    dispatcher: Dispatcher,
    *,
    submit: Callable[[list[GatewayRequest]], None],
    room: Callable[[], int],
) -> Sweep:
    """The sweep: takes over due operations, as many as the dispatcher has room for at each gateway."""
    return Sweep(
        store=store,
        submit=submit,
        room=room,
        rooms=lambda: dispatcher.rooms,
        lease=settings.retry.lease,
        interval_seconds=settings.sweep_interval_seconds,
    )


def create_reconciler(
    settings: Settings,
    store: PaymentStore,
    write_path: WritePath,
    asker: Asker,
    *,
    on_answer: Callable[[HoldAnswer], None] = lambda answer: None,
) -> Reconciler:
    """The reconciler: asks about holds past their end."""
    return Reconciler(
        store=store,
        asker=asker,
        write_path=write_path,
        interval=timedelta(seconds=settings.reconcile_interval_seconds),
        cut_off=settings.retry.cut_off,
        on_answer=on_answer,
    )


def check_names(settings: Settings) -> None:
    """Check that every configured gateway exists.

    Raises:
        ValueError: one does not.
    """
    unknown = set(settings.gateways) - set(GATEWAYS)
    if unknown:
        raise ValueError(f"PAYMENTS_GATEWAYS names {sorted(unknown)}; known are {sorted(GATEWAYS)}")


def check_gateways(settings: Settings, *, for_calls: bool) -> None:
    """Check that the configured gateways exist, and that what their webhooks (or calls as well) need is set.

    Raises:
        ValueError: one does not exist, its credentials or our own addresses are not set; or one that moves no money is
            used beside others.
    """
    check_names(settings)
    used = [GATEWAYS[name] for name in settings.gateways]
    if InstantGateway.name in settings.gateways and any(each.keys or each.credentials for each in used):
        raise ValueError(
            "PAYMENTS_GATEWAYS: instant reports every payment as paid, so it cannot be used beside real gateways"
        )
    names = [name for each in used for name in (*(each.keys if for_calls else ()), *each.credentials)]
    names += [name for each in used for name in each.addresses]
    unset = [f"PAYMENTS_{name.upper()}" for name in names if not _is_set(_plain(getattr(settings, name)))]
    if unset:
        raise ValueError(f"PAYMENTS_GATEWAYS is {settings.gateways}, so these must be set: {', '.join(unset)}")


def _is_set(value: str) -> bool:
    return bool(value) and not value.startswith(NOWHERE)


def _plain(value: str | SecretStr) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def create_webhook_readers(settings: Settings) -> dict[str, WebhookReader]:
    """The webhook readers of the gateways in use, by name. Some send none, or cannot be verified as configured.

    Raises:
        ValueError: as `check_gateways`. (With an empty secret anybody could sign.)
    """
    check_gateways(settings, for_calls=False)
    names = set(settings.gateways)
    if not settings.paypal_webhook_id:
        names -= {"paypal"}
    return {name: create(settings) for name in sorted(names) if (create := GATEWAYS[name].webhooks) is not None}


def missing_webhook_keys(settings: Settings) -> dict[str, str]:
    """The variables that are not set and without which webhooks of gateways in use are refused, by gateway."""
    wanted = {name: key for name in settings.gateways if (key := GATEWAYS[name].webhook_key) is not None}
    return {name: f"PAYMENTS_{key.upper()}" for name, key in wanted.items() if not any(_secrets(settings, key))}


def _secrets(settings: Settings, name: str) -> list[str]:
    value = getattr(settings, name)
    return [_plain(each) for each in (value if isinstance(value, list) else [value])]


def create_rules(settings: Settings, gateways: Mapping[str, Gateway]) -> Rules:
    """What `decide` may accept in this installation."""
    return Rules(
        currencies=frozenset(settings.currencies),
        gateways={name: gateway.capabilities for name, gateway in gateways.items()},
        default_gateway=settings.default_gateway,
        limits=_limits(settings, gateways),
        retry=settings.retry,
    )


def _limits(settings: Settings, gateways: Mapping[str, Gateway]) -> dict[tuple[str, str], AmountLimits]:
    return {
        (name, currency): limits.over(gateway.capabilities.limits.get(currency, AmountLimits()))
        for name, gateway in gateways.items()
        for currency, limits in settings.amount_limits.get(name, {}).items()
    }
