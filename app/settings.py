"""All settings, read once from the environment (`PAYMENTS_…`); nothing below `app` reads the environment."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cached_property
from itertools import combinations
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from domain.capabilities import AmountLimits
from domain.money import MINOR_UNITS
from domain.rules import RetryPolicy
from infra.kafka.access import KafkaAccess, SaslMechanism, SecurityProtocol
from infra.loopback import LOOPBACK

NOWHERE: Final = "https://example.invalid"
"""The placeholder host of our own addresses until they are set; a gateway that needs them does not start with it."""
GATEWAYS_KNOWN: Final = ("instant", "momo", "paypal", "stripe", "vnpay")
"""All gateways that exist. Settings of a gateway that is not in use take effect once it is.

This repeats the keys of `app.wiring.GATEWAYS`, which cannot be imported here: wiring imports these settings, and loads
every provider's library, which would delay commands that only send or show a payment. A test compares the two.
"""
PORT_MAX: Final = 65_535
Port = Annotated[int, Field(ge=1, le=PORT_MAX)]
SECONDS_MAX: Final = 10**9
"""Some thirty years: added to the current time it is still a valid date."""
Seconds = Annotated[float, Field(gt=0, le=SECONDS_MAX, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, le=SECONDS_MAX, allow_inf_nan=False)]
RetentionDays = Annotated[int, Field(ge=1, le=36_500)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_HOST: Final = r"(?:\[[^\s/?#@\[\]]+\]|[^\s:,/?#@\[\]]*)(?::\d*)?"
_DATABASE: Final = re.compile(
    r"postgresql://"
    # asyncpg and libpq end a password at different characters of these, and print how they parse the rest.
    r"(?:(?:[^\s/?#@%\[\]]|%[0-9A-Fa-f]{2})*@)?"
    rf"{_HOST}(?:,{_HOST})*"
    r"(?:/[^?#@]*)?"
    r"(?:\?(?:[^=&#@]+=[^&#]*(?:&[^=&#@]+=[^&#]*)*)?)?"
)
_BROKER: Final = re.compile(r"(\[[^\s\[\]]+\]|[^\s:\[\]]+)(?::(\d{1,5}))?")
_TOPIC: Final = re.compile(r"[a-zA-Z0-9._-]{1,249}")
# A backslash or a user part makes libraries disagree about which part is the host.
_ADDRESS: Final = re.compile(r"https?://[^\s/\\@][^\s\\@]*")
OF_PROVIDERS: Final = ("stripe_api_base", "paypal_api_base", "vnpay_pay_url", "vnpay_api_url", "momo_api_base")
"""Addresses of providers; they must be https."""


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """Bounds of one authorization or charge that this installation sets; None leaves the provider's own."""

    minimum_minor: int | None = None
    maximum_minor: int | None = None

    def over(self, providers: AmountLimits) -> AmountLimits:
        """These bounds, and the provider's where there is none."""
        least, most = self.minimum_minor, self.maximum_minor
        return AmountLimits(
            providers.minimum_minor if least is None else least, providers.maximum_minor if most is None else most
        )


_LIMITS: Final = tuple(each.name for each in fields(OwnLimits))


def _is_topic(name: str) -> str:
    if _TOPIC.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} is not a valid topic name; write letters, digits, '.', '_' and '-', at most 249 of them"
        )
    return name


def _is_address(url: str) -> str:
    if _ADDRESS.fullmatch(url) is None:
        raise ValueError(
            "is not a valid http(s) address; write it like https://host or http://host:8090, without \\ and @"
        )
    return url


def _names_limits(limits: Any) -> Any:
    """Refuse unknown names: a misspelt limit would otherwise not be applied."""
    if isinstance(limits, dict) and (unknown := sorted(limits.keys() - set(_LIMITS))):
        raise ValueError(f"{_quoted(unknown)} is not a valid limit; write {' and '.join(_LIMITS)}")
    return limits


def _are_bounds(limits: OwnLimits) -> OwnLimits:
    whole = limits.over(AmountLimits())
    least, most = whole.minimum_minor, whole.maximum_minor
    if not 0 <= least <= most:
        raise ValueError(
            f"minimum_minor is {least} and maximum_minor is {most}; write two amounts of at least 0, the minimum not"
            " above the maximum"
        )
    return limits


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _variable(name: str) -> str:
    return f"PAYMENTS_{name.upper()}"


def _too_long(name: str, bound: str, other: str) -> str:
    return f"{_variable(name)} is too long; write {bound} {_variable(other)}"


Topic = Annotated[str, AfterValidator(_is_topic)]
Address = Annotated[str, AfterValidator(_is_address)]
Limits = Annotated[OwnLimits, BeforeValidator(_names_limits), AfterValidator(_are_bounds)]


class Settings(BaseSettings):
    """Each field is an environment variable with the prefix `PAYMENTS_`; lists and maps are JSON."""

    model_config = SettingsConfigDict(
        env_prefix="PAYMENTS_", env_nested_delimiter="__", extra="ignore", hide_input_in_errors=True
    )

    postgres_url: str = Field("postgresql://postgres@127.0.0.1:5432/payments", description="one Postgres database")
    kafka_bootstrap: str = "127.0.0.1:9092"
    kafka_security_protocol: SecurityProtocol = "PLAINTEXT"
    kafka_sasl_mechanism: SaslMechanism = "PLAIN"
    kafka_sasl_username: str = ""
    kafka_sasl_password: SecretStr = SecretStr("")
    kafka_ca_file: str = ""
    """PEM file of the authorities that sign the brokers' certificates; without it, those that this machine trusts."""
    redis_url: str = "redis://127.0.0.1:6379/0"

    commands_topic: Topic = "payments.commands"
    events_topic: Topic = "payments.events"
    dead_letter_topic: Topic = "payments.commands.dlq"
    topic_partitions: PositiveInt = 8
    consumer_group: str = Field("payments", min_length=1)

    gateways: list[str] = ["stripe"]
    default_gateway: str = "stripe"
    gateways_allow_plain_http: bool = False
    """Only for a simulator in the same private network, such as the one of docker-compose."""
    gateway_concurrency: dict[str, PositiveInt] = {}
    gateway_concurrency_default: PositiveInt = 64
    gateway_questions_per_second: dict[str, Rate] = {}
    gateway_questions_per_second_default: Rate = 50.0
    """How many stuck operations and holds one worker asks a gateway about per second. Keep it below what the provider
    allows the account: payers' own operations come on top."""
    instant_gateway_latency_ms: float = Field(0.0, ge=0, allow_inf_nan=False)
    stripe_api_key: SecretStr = SecretStr("")
    stripe_api_base: Annotated[Address | None, BeforeValidator(lambda url: url or None)] = None
    stripe_timeout_seconds: Seconds = 20.0
    stripe_return_url: str = f"{NOWHERE}/return"
    stripe_multi_capture: bool = False
    """Whether Stripe allows this account several captures of one hold. If not, the first capture releases the rest."""
    stripe_action_window_seconds: float = Field(86_400.0, ge=1_800, le=6 * 86_400, allow_inf_nan=False)
    """How long a payer may take for 3-D Secure. Stripe sets no limit: we cancel what is abandoned after this time."""
    stripe_webhook_secrets: list[SecretStr] = []
    """Secrets of /webhooks/stripe; two while one is being rotated. Without any, every webhook is refused."""
    paypal_client_id: str = ""
    paypal_client_secret: SecretStr = SecretStr("")
    paypal_api_base: Address = "https://api-m.sandbox.paypal.com"
    paypal_webhook_id: str = ""
    """Id of the webhook at PayPal that calls /webhooks/paypal; without it no webhook is accepted."""
    paypal_return_url: str = f"{NOWHERE}/return"
    paypal_cancel_url: str = f"{NOWHERE}/cancel"
    vnpay_tmn_code: str = ""
    vnpay_hash_secret: SecretStr = SecretStr("")
    vnpay_pay_url: Address = "https://sandbox.vnpayment.vn/paymentv2/vpcpay.html"
    vnpay_api_url: Address = "https://sandbox.vnpayment.vn/merchant_webapi/api/transaction"
    vnpay_return_url: str = f"{NOWHERE}/return"
    vnpay_question_interval_seconds: SecondsOrNone = 300.0
    """Least time between two questions to VNPay about one payment: asked sooner, it answers 94."""
    momo_partner_code: str = ""
    momo_access_key: str = ""
    momo_secret_key: SecretStr = SecretStr("")
    momo_api_base: Address = "https://test-payment.momo.vn"
    momo_redirect_url: str = f"{NOWHERE}/return"
    momo_ipn_url: str = f"{NOWHERE}/webhooks/momo"
    """The public URL of our own /webhooks/momo, for MoMo."""

    currencies: list[str] = Field(sorted(MINOR_UNITS), min_length=1)
    amount_limits: dict[str, dict[str, Limits]] = {}
    """gateway → currency → {"minimum_minor": …, "maximum_minor": …}; a bound that is left out is the provider's own"""

    lease_seconds: Seconds = 60.0
    retry_first_delay_seconds: Seconds = 1.0
    retry_delay_max_seconds: Seconds = 300.0
    poll_interval_seconds: Seconds = 300.0
    """The longest time from an answer to the next question about an operation that is pending or awaits its payer."""
    review_after_seconds: SecondsOrNone = 3600.0
    review_pending_after_seconds: Seconds = 7 * 86_400.0
    review_poll_interval_seconds: Seconds = 900.0
    give_up_after_seconds: SecondsOrNone = 900.0
    sweep_interval_seconds: Seconds = 1.0
    reconcile_interval_seconds: Seconds = 300.0
    """How often to look for holds past their end. Every other stuck operation has a due time of its own."""
    reconcile_cut_off_seconds: float = Field(3600.0, gt=0, le=86_400, allow_inf_nan=False)
    """The longest time between two looks at a stuck operation or hold, however many looks found nothing."""
    retries_before_parking: NonNegativeInt = 5
    """Five take some five seconds: enough for a brief failure; a poison message holds up its partition no longer."""
    backlog_capacity: PositiveInt = 20_000
    store_connections: PositiveInt = 6
    webhook_connections: PositiveInt = 3

    http_host: str = "127.0.0.1"
    http_port: Port = 8080
    worker_port: Port = 8081
    relay_port: Port = 8082
    metrics_peers: dict[str, Address] = {}
    """name → base URL of a worker's or relay's own HTTP server, whose metrics the HTTP process serves as well"""

    relay_slot: str = "payments_relay"
    """Names the relay and its replication slot; relays with the same name are one relay and its standbys."""
    relay_source: Literal["wal", "poll"] = "wal"
    relay_native: bool = True
    """Whether the relay uses its compiled inner loop, if it was compiled; with `False` it uses Python only."""
    outbox_retention_days: RetentionDays = 14
    inbox_retention_days: RetentionDays = 35
    """How long applied webhooks are kept: longer than a provider can resend one. Stripe keeps them for 30 days."""
    outbox_days_ahead: int = Field(7, ge=1, le=366)
    """Rows that arrive before their day's partition exists are moved later, under a lock that stops payments."""
    maintenance_interval_seconds: Seconds = 3600.0
    log_json: bool = True

    @field_validator("postgres_url")
    @classmethod
    def _is_a_postgres_url(cls, url: str) -> str:
        if _DATABASE.fullmatch(url) is None:
            # The message does not repeat the value: it may hold a password.
            raise ValueError(
                "is not a valid postgresql:// URL; write it like postgresql://user:password@host:5432/payments, and in "
                "a password escape everything but letters, digits and -._~ (/ is %2F, @ is %40, # is %23)"
            )
        return url

    @field_validator("redis_url")
    @classmethod
    def _is_a_valkey_url(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            # This value may hold a password, too.
            raise ValueError("is not a valid Valkey URL; write it like redis://:password@host:6379/0")
        return url

    @field_validator("kafka_bootstrap")
    @classmethod
    def _names_brokers(cls, brokers: str) -> str:
        for each in brokers.split(","):
            found = _BROKER.fullmatch(each.strip())
            if found is None or int(found[2] or 1) not in range(1, PORT_MAX + 1):
                raise ValueError(
                    f"{each.strip()!r} is not a valid broker address; write brokers like host:9092,other:9092"
                )
        return brokers

    @field_validator("relay_slot")
    @classmethod
    def _is_a_slot_name(cls, name: str) -> str:
        if re.fullmatch("[a-z0-9_]{1,63}", name) is None:
            raise ValueError(f"{name!r} is not a valid slot name: write lower-case letters, digits and _, at most 63")
        return name

    @model_validator(mode="after")
    def _kafkas_user_is_complete(self) -> Self:
        protocol = self.kafka_security_protocol
        is_set = {name: bool(getattr(self, name)) for name in ("kafka_sasl_username", "kafka_sasl_password")}
        asked = f"{_variable('kafka_security_protocol')} is {protocol!r}"
        if protocol.startswith("SASL_") and not all(is_set.values()):
            missing = " and ".join(_variable(name) for name, given in is_set.items() if not given)
            raise ValueError(f"{asked}, which needs {missing}")
        if not protocol.startswith("SASL_") and any(is_set.values()):
            # They would have no effect, and nothing would say so to the person who set them.
            unused = " and ".join(_variable(name) for name, given in is_set.items() if given)
            raise ValueError(f"{asked}, which has no use for {unused}; write SASL_SSL, or leave them out")
        return self

    @model_validator(mode="after")
    def _kafkas_ca_can_be_read(self) -> Self:
        if not self.kafka_ca_file:
            return self
        name, protocol = _variable("kafka_ca_file"), self.kafka_security_protocol
        if not protocol.endswith("SSL"):
            asked = f"{_variable('kafka_security_protocol')} is {protocol!r}"
            raise ValueError(f"{asked}, which has no use for {name}; write SSL or SASL_SSL, or leave it out")
        try:
            self.kafka.client_arguments()
        except OSError as error:
            problem = f"{name} is {self.kafka_ca_file!r}, where no certificates can be read: {error.strerror}"
            raise ValueError(f"{problem}; write the path of a PEM file") from error
        return self

    @model_validator(mode="after")
    def _topics_differ(self) -> Self:
        for one, other in combinations(("commands_topic", "events_topic", "dead_letter_topic"), 2):
            if getattr(self, one) == getattr(self, other):
                both = f"{_variable(one)} and {_variable(other)} are both {getattr(self, one)!r}"
                raise ValueError(f"{both}; write a topic of its own for each")
        return self

    @model_validator(mode="after")
    def _gateways_are_known(self) -> Self:
        if self.default_gateway not in self.gateways:
            problem = f"{_variable('default_gateway')} is {self.default_gateway!r}"
            raise ValueError(f"{problem}; write one of {_variable('gateways')}, which are {self.gateways}")
        for name in ("gateway_concurrency", "gateway_questions_per_second", "amount_limits"):
            if unknown := getattr(self, name).keys() - {*GATEWAYS_KNOWN, *self.gateways}:
                known = ", ".join(GATEWAYS_KNOWN)
                raise ValueError(f"{_variable(name)} names {_quoted(unknown)}; write one of {known}")
        return self

    @model_validator(mode="after")
    def _keys_travel_encrypted(self) -> Self:
        for name in OF_PROVIDERS:
            url = urlsplit(getattr(self, name) or "https:")
            if url.scheme != "https" and url.hostname not in LOOPBACK and not self.gateways_allow_plain_http:
                problem = (
                    f"{_variable(name)} is plain http to another machine: anybody on the way can read what is sent"
                )
                allowed = f"{_variable('gateways_allow_plain_http')}=true"
                raise ValueError(f"{problem}; write https, or, for a simulator in your own network, set {allowed}")
        return self

    @model_validator(mode="after")
    def _currencies_are_known(self) -> Self:
        limited = {currency for by_currency in self.amount_limits.values() for currency in by_currency}
        for name, currencies in (("currencies", set(self.currencies)), ("amount_limits", limited)):
            if unknown := currencies - MINOR_UNITS.keys():
                problem = f"{_variable(name)} names {_quoted(unknown)}, which is not known here"
                raise ValueError(f"{problem}; write ISO 4217 codes like USD")
        return self

    @model_validator(mode="after")
    def _times_fit_together(self) -> Self:
        if self.reconcile_interval_seconds > self.reconcile_cut_off_seconds:
            raise ValueError(_too_long("reconcile_interval_seconds", "at most", "reconcile_cut_off_seconds"))
        if "stripe" in self.gateways and self.stripe_action_window_seconds >= self.review_pending_after_seconds:
            # An operation that needs review is only asked about, so it would never be canceled.
            raise ValueError(_too_long("stripe_action_window_seconds", "less than", "review_pending_after_seconds"))
        return self

    @property
    def kafka(self) -> KafkaAccess:
        """How every client of this service reaches Kafka."""
        return KafkaAccess(
            self.kafka_bootstrap,
            protocol=self.kafka_security_protocol,
            sasl_mechanism=self.kafka_sasl_mechanism,
            username=self.kafka_sasl_username,
            password=self.kafka_sasl_password,
            ca_file=self.kafka_ca_file,
        )

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
        """Every topic and its number of partitions; commands and events of a payment have the same partition number."""
        return dict.fromkeys((self.commands_topic, self.events_topic, self.dead_letter_topic), self.topic_partitions)

    def concurrency_of(self, gateway: str) -> int:
        return self.gateway_concurrency.get(gateway, self.gateway_concurrency_default)

    def questions_per_second_of(self, gateway: str) -> float:
        return self.gateway_questions_per_second.get(gateway, self.gateway_questions_per_second_default)
