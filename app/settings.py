"""All settings, read once from the environment (`PAYMENTS_…`); nothing below `app` reads the environment."""

import re
from datetime import timedelta
from functools import cached_property
from typing import Annotated, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from domain.capabilities import AmountLimits
from domain.money import MINOR_UNITS
from domain.rules import RetryPolicy

NOWHERE: Final = "https://example.invalid"
"""Where our own addresses lead until they are set; a gateway that needs them is not started with it."""
PORT_MAX: Final = 65_535
Port = Annotated[int, Field(ge=1, le=PORT_MAX)]
_BROKER: Final = re.compile(r"(\[[^\s\[\]]+\]|[^\s:\[\]]+)(?::(\d{1,5}))?")


class Settings(BaseSettings):
    """Each field is an environment variable with the prefix `PAYMENTS_`; lists and maps are JSON."""

    model_config = SettingsConfigDict(env_prefix="PAYMENTS_", env_nested_delimiter="__", extra="ignore")

    postgres_url: str = Field("postgresql://postgres@127.0.0.1:5432/payments", description="one Postgres database")
    kafka_bootstrap: str = "127.0.0.1:9092"
    redis_url: str = "redis://127.0.0.1:6379/0"

    commands_topic: str = "payments.commands"
    events_topic: str = "payments.events"
    dead_letter_topic: str = "payments.commands.dlq"
    topic_partitions: PositiveInt = 8
    consumer_group: str = "payments"

    gateways: list[str] = ["stripe"]
    default_gateway: str = "stripe"
    gateway_concurrency: dict[str, int] = {}
    gateway_concurrency_default: PositiveInt = 64
    gateway_questions_per_second: dict[str, PositiveFloat] = {}
    gateway_questions_per_second_default: PositiveFloat = 50.0
    """How many stuck operations and holds a gateway is asked about per second, by one worker: less than the provider
    allows the account, for payers' own operations come on top."""
    instant_gateway_latency_ms: float = 0.0
    stripe_api_key: SecretStr = SecretStr("")
    stripe_api_base: str | None = None
    stripe_timeout_seconds: float = 20.0
    stripe_return_url: str = f"{NOWHERE}/return"
    stripe_multi_capture: bool = False
    """Whether Stripe grants this account several captures of one hold. Where not, the first one releases the rest."""
    stripe_action_window_seconds: float = Field(86_400.0, ge=1_800, le=6 * 86_400)
    """How long a payer may take for 3-D Secure. Stripe has no end for it: what is abandoned is canceled after this."""
    stripe_webhook_secrets: list[SecretStr] = []
    """Of the endpoint /webhooks/stripe; two while one is being rolled. None: every webhook is refused."""
    paypal_client_id: str = ""
    paypal_client_secret: SecretStr = SecretStr("")
    paypal_api_base: str = "https://api-m.sandbox.paypal.com"
    paypal_webhook_id: str = ""
    """Of the webhook at PayPal that calls /webhooks/paypal; without it none is received."""
    paypal_allows_plain_http: bool = False
    """Only for a simulator in the same private network, such as docker-compose's."""
    paypal_return_url: str = f"{NOWHERE}/return"
    paypal_cancel_url: str = f"{NOWHERE}/cancel"
    vnpay_tmn_code: str = ""
    vnpay_hash_secret: SecretStr = SecretStr("")
    vnpay_pay_url: str = "https://sandbox.vnpayment.vn/paymentv2/vpcpay.html"
    vnpay_api_url: str = "https://sandbox.vnpayment.vn/merchant_webapi/api/transaction"
    vnpay_return_url: str = f"{NOWHERE}/return"
    vnpay_question_interval_seconds: float = Field(300.0, ge=0)
    """VNPay is asked about one payment no more often: it would answer 94, asked too soon."""
    momo_partner_code: str = ""
    momo_access_key: str = ""
    momo_secret_key: SecretStr = SecretStr("")
    momo_api_base: str = "https://test-payment.momo.vn"
    momo_redirect_url: str = f"{NOWHERE}/return"
    momo_ipn_url: str = f"{NOWHERE}/webhooks/momo"
    """Our own /webhooks/momo, as MoMo reaches it."""

    currencies: list[str] = sorted(MINOR_UNITS)
    amount_limits: dict[str, dict[str, AmountLimits]] = {}
    """gateway → currency → {"minimum_minor": …, "maximum_minor": …}"""

    lease_seconds: PositiveFloat = 60.0
    retry_first_delay_seconds: float = 1.0
    retry_delay_max_seconds: float = 300.0
    poll_interval_seconds: float = 300.0
    """At most this long after its last answer, what is pending or waits for the payer is asked about again."""
    review_after_seconds: float = 3600.0
    review_pending_after_seconds: float = 7 * 86_400.0
    review_poll_interval_seconds: float = 900.0
    give_up_after_seconds: float = 900.0
    sweep_interval_seconds: float = 1.0
    reconcile_interval_seconds: PositiveFloat = 300.0
    """How often holds past their end are looked for. Everything else that is stuck has its own time."""
    reconcile_cut_off_seconds: float = Field(3600.0, gt=0, le=86_400)
    """However often it was looked at in vain, what is stuck is looked at again so long after the last time, at most."""
    retries_before_parking: int = 5
    backlog_capacity: PositiveInt = 20_000
    store_connections: PositiveInt = 6
    webhook_connections: PositiveInt = 3

    http_host: str = "127.0.0.1"
    http_port: Port = 8080
    worker_port: Port = 8081
    relay_port: Port = 8082
    metrics_peers: dict[str, str] = {}
    """name → base URL of the worker's and relay's own HTTP, whose metrics the HTTP process shows, too"""

    relay_slot: str = "payments_relay"
    """Names the relay and its replication slot; relays of one name are one relay and its standbys."""
    relay_source: Literal["wal", "poll"] = "wal"
    relay_native: bool = True
    """Whether the relay uses its compiled inner loop, where there is one; `False` has it all done in Python."""
    outbox_retention_days: int = 14
    inbox_retention_days: int = 35
    """How long applied webhooks are kept; Stripe, the most patient of the providers, sends one again for 30 days."""
    outbox_days_ahead: int = 7
    maintenance_interval_seconds: float = 3600.0
    log_json: bool = True

    @field_validator("postgres_url")
    @classmethod
    def _is_a_databases_url(cls, url: str) -> str:
        if not url.startswith("postgresql://"):
            # What is there is not repeated: it may hold a password.
            raise ValueError("is no database's URL; write it like postgresql://user:password@host:5432/payments")
        return url

    @field_validator("kafka_bootstrap")
    @classmethod
    def _names_brokers(cls, brokers: str) -> str:
        for each in brokers.split(","):
            found = _BROKER.fullmatch(each.strip())
            if found is None or int(found[2] or 1) not in range(1, PORT_MAX + 1):
                raise ValueError(f"{each.strip()!r} is no broker; write them like host:9092,other:9092")
        return brokers

    @field_validator("relay_slot")
    @classmethod
    def _is_a_slot_name(cls, name: str) -> str:
        if re.fullmatch("[a-z0-9_]{1,63}", name) is None:
            raise ValueError(f"{name!r} is no name for a slot: lower-case letters, digits and _, at most 63 of them")
        return name

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.default_gateway not in self.gateways:
            raise ValueError(f"default_gateway {self.default_gateway!r} is none of gateways {self.gateways}")
        if self.reconcile_interval_seconds > self.reconcile_cut_off_seconds:
            raise ValueError("reconcile_interval_seconds is more than reconcile_cut_off_seconds")
        if "stripe" in self.gateways and self.stripe_action_window_seconds >= self.review_pending_after_seconds:
            # What needs review is only asked about, so it would never be canceled.
            raise ValueError("stripe_action_window_seconds is not less than review_pending_after_seconds")
        if unknown := sorted(set(self.currencies) - set(MINOR_UNITS)):
            raise ValueError(f"currencies: {', '.join(unknown)} are not known here")
        return self

    @cached_property
    def retry(self) -> RetryPolicy:
        return RetryPolicy(
            lease=timedelta(seconds=self.lease_seconds),
            first_delay=timedelta(seconds=self.retry_first_delay_seconds),
            delay_max=timedelta(seconds=self.retry_delay_max_seconds),
            poll_interval=timedelta(seconds=self.poll_interval_seconds),
            review_after=timedelta(seconds=self.review_after_seconds),
            review_pending_after=timedelta(seconds=self.review_pending_after_seconds),
            review_poll_interval=timedelta(seconds=self.review_poll_interval_seconds),
            give_up_after=timedelta(seconds=self.give_up_after_seconds),
            cut_off=timedelta(seconds=self.reconcile_cut_off_seconds),
        )

    @property
    def stripe_action_window(self) -> timedelta:
        return timedelta(seconds=self.stripe_action_window_seconds)

    @property
    def topics(self) -> dict[str, int]:
        """Every topic and its number of partitions; commands and events of a payment share a partition number."""
        return dict.fromkeys((self.commands_topic, self.events_topic, self.dead_letter_topic), self.topic_partitions)

    def concurrency_of(self, gateway: str) -> int:
        return self.gateway_concurrency.get(gateway, self.gateway_concurrency_default)

    def questions_per_second_of(self, gateway: str) -> float:
        return self.gateway_questions_per_second.get(gateway, self.gateway_questions_per_second_default)
