"""Settings from the environment are checked at the start, before a server can be harmed by them."""

from datetime import timedelta

import pytest
import typer
from pydantic import ValidationError

from app.command_line import read_settings
from app.processes import relay_config
from app.settings import GATEWAYS_KNOWN, OF_PROVIDERS, Settings
from app.wiring import GATEWAYS


@pytest.mark.parametrize("name", ["Payments-Relay", "", "a" * 64, "relay\n", "rélay"])
def test_an_invalid_slot_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="is not a valid slot name: write lower-case letters"):
        Settings(relay_slot=name)


def test_stuck_operations_are_reconciled_every_five_minutes_with_a_cut_off_of_one_hour() -> None:
    settings = Settings()
    assert settings.reconcile_interval_seconds == 300
    assert settings.retry.cut_off.total_seconds() == 3600
    assert Settings(reconcile_cut_off_seconds=600).retry.cut_off.total_seconds() == 600


def test_rounds_that_are_further_apart_than_the_cut_off_are_refused() -> None:
    with pytest.raises(
        ValidationError, match="RECONCILE_INTERVAL_SECONDS is too long; write at most PAYMENTS_RECONCILE_CUT_OFF"
    ):
        Settings(reconcile_interval_seconds=601, reconcile_cut_off_seconds=600)


def test_a_gateways_own_pace_goes_before_the_one_for_all() -> None:
    settings = Settings(gateway_questions_per_second={"paypal": 5})
    assert settings.questions_per_second_of("paypal") == 5
    assert settings.questions_per_second_of("stripe") == settings.gateway_questions_per_second_default


def test_a_valid_slot_name_is_accepted() -> None:
    assert Settings(relay_slot="payments_relay_2").relay_slot == "payments_relay_2"


def test_a_payer_at_stripe_has_a_day_unless_told_otherwise_and_less_than_the_deadline_for_review() -> None:
    assert Settings().stripe_action_window == timedelta(days=1)
    for seconds in (1_799, 7 * 86_400):
        with pytest.raises(ValidationError, match="stripe_action_window_seconds"):
            Settings(stripe_action_window_seconds=seconds)
    with pytest.raises(
        ValidationError, match="WINDOW_SECONDS is too long; write less than PAYMENTS_REVIEW_PENDING_AFTER_SECONDS"
    ):
        Settings(stripe_action_window_seconds=7_200, review_pending_after_seconds=7_200)
    others = Settings(gateways=["momo"], default_gateway="momo", review_pending_after_seconds=7_200)
    assert others.review_pending_after_seconds == 7_200


@pytest.mark.parametrize("url", ["", "payments", "postgres://u:s3cret@h/payments", "postgresql:/u:s3cret@h/payments"])
def test_an_invalid_database_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError, match=r"write it like postgresql://") as refusal:
        Settings(postgres_url=url)
    assert "s3cret" not in str(refusal.value.errors(include_input=False))


@pytest.mark.parametrize(
    "password",
    ["s3c/ret", "s3c@ret", "s3c#ret", "s3c?ret", "s3c%ret", "s3c[ret]", "s3c ret", "123/ret", "123#ret", "123?ret"],
)
def test_a_password_that_is_not_escaped_is_told_how_to_be_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], password: str
) -> None:
    told = refusal(monkeypatch, capsys, postgres_url=f"postgresql://user:{password}@host:5432/payments")
    assert "PAYMENTS_POSTGRES_URL: is not a valid postgresql:// URL" in told
    assert "(/ is %2F, @ is %40, # is %23)" in told
    assert not any(part in told for part in ("s3c", "123", "ret"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://",
        "postgresql:///payments?host=/run/postgresql",
        "postgresql://user@%2Frun%2Fpostgresql/payments",
        "postgresql://user:s3c%2Fret@host/payments",
        "postgresql://user:a:b!$&'()*+,;=~@host/payments",
        "postgresql://user@/payments?host=a,b&port=5432,5432&target_session_attrs=read-write",
        "postgresql://user:s3cret@a:5432,[::1]:5432/payments?sslmode=prefer&options=-c%20lock_timeout%3D5s",
        "postgresql://host?user=me@azure&sslrootcert=/etc/ca.pem",
    ],
)
def test_a_valid_database_url_is_accepted(url: str) -> None:
    assert Settings(postgres_url=url).postgres_url == url


@pytest.mark.parametrize("brokers", ["", "host:", "host:port", "host:70000", "http://host:9092", "a:9092,,b:9092"])
def test_an_invalid_list_of_brokers_is_refused(brokers: str) -> None:
    with pytest.raises(ValidationError, match="is not a valid broker address; write brokers like host:9092"):
        Settings(kafka_bootstrap=brokers)


@pytest.mark.parametrize("brokers", ["host", "127.0.0.1:9092", "a:9092, b:9092", "[::1]:9092"])
def test_a_valid_list_of_brokers_is_accepted(brokers: str) -> None:
    assert Settings(kafka_bootstrap=brokers).kafka_bootstrap == brokers


@pytest.mark.parametrize("port", [-1, 0, 65_536])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(ValidationError, match="relay_port"):
        Settings(relay_port=port)


def test_a_relay_is_kept_from_its_compiled_loop_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAYMENTS_RELAY_NATIVE", raising=False)
    assert relay_config(Settings()).is_native
    monkeypatch.setenv("PAYMENTS_RELAY_NATIVE", "false")
    assert not relay_config(Settings()).is_native


# --- settings that would stop a gateway or endanger stored data -------------------------------------------------------


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **environment: str) -> str:
    """The message that the operator reads."""
    for name, value in environment.items():
        monkeypatch.setenv(f"PAYMENTS_{name.upper()}", value)
    with pytest.raises(typer.Exit):
        read_settings()
    return capsys.readouterr().err


NUMBERS = {
    name
    for name, field in Settings.model_fields.items()
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
}
NONE_IS_ENOUGH = {
    "give_up_after_seconds",
    "instant_gateway_latency_ms",
    "retries_before_parking",
    "review_after_seconds",
    "vnpay_question_interval_seconds",
}


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_no_number_is_less_than_nothing_nor_beyond_all_bounds_and_few_are_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for value in ("-1", "inf", "nan", *([] if name in NONE_IS_ENOUGH else ["0"])):
        assert f"  PAYMENTS_{name.upper()}: Input should be " in refusal(monkeypatch, capsys, **{name: value})


@pytest.mark.parametrize("name", sorted(NONE_IS_ENOUGH))
def test_a_setting_that_may_be_zero_accepts_zero(name: str) -> None:
    assert getattr(Settings(**{name: 0}), name) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(each for each in NUMBERS if each.endswith("_seconds")))
def test_a_time_that_no_calendar_holds_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert f"PAYMENTS_{name.upper()}: Input should be less" in refusal(monkeypatch, capsys, **{name: "1e12"})


@pytest.mark.parametrize("days", ["0", "-1", "1000000"])
@pytest.mark.parametrize("name", ["outbox_retention_days", "inbox_retention_days", "outbox_days_ahead"])
def test_todays_rows_are_kept_and_tomorrows_have_a_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, days: str
) -> None:
    assert f"PAYMENTS_{name.upper()}: Input should be" in refusal(monkeypatch, capsys, **{name: days})
    assert getattr(Settings(**{name: 1}), name) == 1  # type: ignore[arg-type]


REFUSED: list[tuple[str, str, str]] = [
    ("gateway_concurrency", '{"stripe": 0}', "PAYMENTS_GATEWAY_CONCURRENCY__STRIPE: Input should be greater than 0"),
    ("gateway_concurrency__stripe", "0", "PAYMENTS_GATEWAY_CONCURRENCY__STRIPE: Input should be greater than 0"),
    ("gateway_questions_per_second", '{"stripe": 0}', "SECOND__STRIPE: Input should be greater than 0"),
    ("gateway_concurrency", '{"strpe": 5}', "PAYMENTS_GATEWAY_CONCURRENCY names 'strpe'; write one of instant, momo,"),
    ("gateway_questions_per_second", '{"a": 5, "b": 5}', "PAYMENTS_GATEWAY_QUESTIONS_PER_SECOND names 'a', 'b'; write"),
    ("amount_limits", '{"strpe": {}}', "PAYMENTS_AMOUNT_LIMITS names 'strpe'; write one of instant, momo, paypal"),
    ("amount_limits", '{"stripe": {"usd": {}}}', "PAYMENTS_AMOUNT_LIMITS names 'usd', which is not known here"),
    ("amount_limits", '{"stripe": {"USD": {"maximum": 5}}}', "LIMITS__STRIPE__USD: 'maximum' is not a valid limit"),
    ("amount_limits", '{"stripe": {"USD": {"maximum_minor": 0}}}', "minimum_minor is 1 and maximum_minor is 0; write"),
    ("amount_limits", '{"stripe": {"USD": {"minimum_minor": -1}}}', "write two amounts of at least 0, the minimum"),
    ("currencies", '["USD", "XXX"]', "PAYMENTS_CURRENCIES names 'XXX', which is not known here; write ISO 4217 codes"),
    ("currencies", "[]", "PAYMENTS_CURRENCIES: List should have at least 1 item"),
    ("gateways", "[]", "PAYMENTS_DEFAULT_GATEWAY is 'stripe'; write one of PAYMENTS_GATEWAYS, which are []"),
    ("events_topic", "payments.commands", "PAYMENTS_COMMANDS_TOPIC and PAYMENTS_EVENTS_TOPIC are both 'payments.com"),
    ("dead_letter_topic", "payments.commands", "PAYMENTS_COMMANDS_TOPIC and PAYMENTS_DEAD_LETTER_TOPIC are both"),
    ("dead_letter_topic", "payments.events", "write a topic of its own for each"),
    ("events_topic", "", "PAYMENTS_EVENTS_TOPIC: '' is not a valid topic name; write letters, digits"),
    ("commands_topic", "pay ments", "PAYMENTS_COMMANDS_TOPIC: 'pay ments' is not a valid topic name"),
    ("consumer_group", "", "PAYMENTS_CONSUMER_GROUP: String should have at least 1 character"),
    ("redis_url", "127.0.0.1:6379", "PAYMENTS_REDIS_URL: is not a valid Valkey URL; write it like redis://"),
    (
        "stripe_api_base",
        "api.stripe.com",
        "PAYMENTS_STRIPE_API_BASE: is not a valid http(s) address; write it like https://host",
    ),
    ("paypal_api_base", "api-m.paypal.com", "PAYMENTS_PAYPAL_API_BASE: is not a valid http(s) address; write it"),
    ("vnpay_pay_url", "https:/pay", "PAYMENTS_VNPAY_PAY_URL: is not a valid http(s) address; write it"),
    ("vnpay_api_url", "", "PAYMENTS_VNPAY_API_URL: is not a valid http(s) address; write it"),
    ("momo_api_base", "ftp://momo.vn", "PAYMENTS_MOMO_API_BASE: is not a valid http(s) address; write it"),
    (
        "stripe_api_base",
        "http://evil.com\\@127.0.0.1/",
        "is not a valid http(s) address; write it like https://host or http://host:8090",
    ),
    ("paypal_api_base", "http://evil.com\\.127.0.0.1/", "http://host:8090, without \\ and @"),
    (
        "momo_api_base",
        "https://momo.vn@evil.com",
        "PAYMENTS_MOMO_API_BASE: is not a valid http(s) address; write it",
    ),
    ("stripe_api_base", "http://api.stripe.com", "PAYMENTS_STRIPE_API_BASE is plain http to another machine"),
    ("paypal_api_base", "http://sandbox:8090", "set PAYMENTS_GATEWAYS_ALLOW_PLAIN_HTTP=true"),
    ("vnpay_pay_url", "http://sandbox.vnpayment.vn/pay", "PAYMENTS_VNPAY_PAY_URL is plain http"),
    ("vnpay_api_url", "http://sandbox.vnpayment.vn/api", "PAYMENTS_VNPAY_API_URL is plain http"),
    ("momo_api_base", "http://test-payment.momo.vn", "PAYMENTS_MOMO_API_BASE is plain http"),
    ("metrics_peers", '{"worker": "worker:8081"}', "PAYMENTS_METRICS_PEERS__WORKER: is not a valid http(s) address"),
]


@pytest.mark.parametrize(("name", "value", "told"), REFUSED, ids=lambda value: value)
def test_a_harmful_setting_is_refused_at_the_start_with_what_to_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, told: str
) -> None:
    assert told in refusal(monkeypatch, capsys, **{name: value})


def test_a_simulator_may_be_plain_http_on_this_machine_or_where_that_is_allowed() -> None:
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert Settings(momo_api_base=f"http://{host}:8090").momo_api_base
    url = "http://sandbox:8090"
    assert Settings(stripe_api_base=url, gateways_allow_plain_http=True).stripe_api_base == url


def test_every_address_of_a_provider_is_held_to_https() -> None:
    ours = {name for each in GATEWAYS.values() for name in each.addresses}
    addresses = {name for name in Settings.model_fields if name.endswith(("_url", "_base"))}
    assert {name for name in addresses if name.partition("_")[0] in GATEWAYS_KNOWN} - ours == set(OF_PROVIDERS)


SASL = {"kafka_security_protocol": "SASL_SSL", "kafka_sasl_username": "payments", "kafka_sasl_password": "s3cret"}
KAFKA: list[tuple[dict[str, str], str]] = [
    (SASL | {"kafka_sasl_password": ""}, "PROTOCOL is 'SASL_SSL', which needs PAYMENTS_KAFKA_SASL_PASSWORD\n"),
    (
        {"kafka_security_protocol": "SASL_PLAINTEXT"},
        "PROTOCOL is 'SASL_PLAINTEXT', which needs PAYMENTS_KAFKA_SASL_USERNAME and PAYMENTS_KAFKA_SASL_PASSWORD\n",
    ),
    (
        SASL | {"kafka_security_protocol": "SSL"},
        "'SSL', which has no use for PAYMENTS_KAFKA_SASL_USERNAME and PAYMENTS_KAFKA_SASL_PASSWORD; write SASL_SSL",
    ),
    ({"kafka_sasl_password": "s3cret"}, "PROTOCOL is 'PLAINTEXT', which has no use for PAYMENTS_KAFKA_SASL_PASSWORD;"),
    (
        {"kafka_ca_file": "/ca.pem"},
        "is 'PLAINTEXT', which has no use for PAYMENTS_KAFKA_CA_FILE; write SSL or SASL_SSL",
    ),
    (
        SASL | {"kafka_ca_file": "/nowhere.pem"},
        "PAYMENTS_KAFKA_CA_FILE is '/nowhere.pem', where no certificates can be read: No such file or directory; write",
    ),
    (SASL | {"kafka_ca_file": __file__}, "where no certificates can be read: [X509"),
    (
        {"kafka_security_protocol": "TLS"},
        "PAYMENTS_KAFKA_SECURITY_PROTOCOL: Input should be 'PLAINTEXT', 'SSL', 'SASL_",
    ),
    (SASL | {"kafka_sasl_mechanism": "GSSAPI"}, "PAYMENTS_KAFKA_SASL_MECHANISM: Input should be 'PLAIN', 'SCRAM-SHA-2"),
]


@pytest.mark.parametrize(("told", "refused"), KAFKA)
def test_unusable_kafka_settings_are_refused_without_repeating_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], told: dict[str, str], refused: str
) -> None:
    said = refusal(monkeypatch, capsys, **told)
    assert refused in said
    assert "s3cret" not in said


def test_the_gateways_that_settings_know_are_those_that_are_registered_in_the_order_of_their_names() -> None:
    assert list(GATEWAYS_KNOWN) == sorted(GATEWAYS)


def test_settings_of_an_unused_gateway_are_kept() -> None:
    limits = {"paypal": {"EUR": {"minimum_minor": 100, "maximum_minor": 100}}}
    settings = Settings(gateway_concurrency={"paypal": 5}, amount_limits=limits)
    assert (settings.concurrency_of("paypal"), settings.amount_limits["paypal"]["EUR"].maximum_minor) == (5, 100)
