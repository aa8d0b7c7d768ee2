"""Every Kafka client uses the security that the settings ask for, and no password is shown."""

import ast
import json
import ssl
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
from faststream.kafka.security import parse_security
from pydantic import SecretStr, ValidationError

from app.processes import relay_config
from app.settings import Settings
from infra.kafka.access import KafkaAccess, SaslMechanism, SecurityProtocol

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = {"AIOKafkaProducer", "AIOKafkaConsumer", "AIOKafkaAdminClient"}
PASSWORD = "s3cret-of-kafka"
USER = {"username": "payments", "password": SecretStr(PASSWORD)}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the code that may reach a broker, with the name of the function that is called."""
    for package in ("app", "infra"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield ast.unparse(node.func).rpartition(".")[2], node


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {each.arg: ast.unparse(each.value) for each in call.keywords}


def test_every_client_is_made_of_the_one_that_knows_how_to_come_in() -> None:
    made = [keywords(call) for name, call in calls() if name in CLIENTS]
    assert len(made) >= 11, "the search finds them no more"
    for each in made:
        assert each.get(None, "").endswith("kafka.client_arguments()"), each
        assert "bootstrap_servers" not in each
    (broker,) = (keywords(call) for name, call in calls() if name == "KafkaBroker")
    assert broker["security"] == "kafka.broker_security()"


def test_the_settings_alone_say_how_the_service_comes_in() -> None:
    made = [keywords(call) for name, call in calls() if name == "KafkaAccess"]
    from_settings = [each for each in made if each.get("password") == "self.kafka_sasl_password"]
    assert len(from_settings) == 1
    # The others are for our local server and for the relay that tests run alone.
    assert len(made) == 3


@pytest.mark.parametrize("mechanism", get_args(SaslMechanism))
@pytest.mark.parametrize("protocol", get_args(SecurityProtocol))
def test_the_worker_comes_in_as_all_others(protocol: SecurityProtocol, mechanism: SaslMechanism) -> None:
    access = KafkaAccess("kafka:9092", protocol=protocol, sasl_mechanism=mechanism, **USER)  # type: ignore[arg-type]
    ours, its = access.client_arguments(), parse_security(access.broker_security())
    assert ours.pop("bootstrap_servers") == "kafka:9092"
    assert [type(each.pop("ssl_context")) for each in (ours, its)] == 2 * [
        ssl.SSLContext if protocol.endswith("SSL") else type(None)
    ]
    assert ours == its
    assert (ours.get("sasl_plain_password") == PASSWORD) == protocol.startswith("SASL")


@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL"])
def test_an_encrypted_connection_is_to_the_host_that_is_meant(protocol: SecurityProtocol) -> None:
    context = KafkaAccess("kafka:9092", protocol=protocol).client_arguments()["ssl_context"]
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def secured(**more: Any) -> Settings:
    told = {"kafka_security_protocol": "SASL_SSL", "kafka_sasl_username": "payments", "kafka_sasl_password": PASSWORD}
    return Settings(**(told | more))


def test_the_settings_reach_the_relay_whole() -> None:
    settings = secured(kafka_sasl_mechanism="SCRAM-SHA-512", kafka_bootstrap="kafka:9093")
    expected = KafkaAccess("kafka:9093", "SASL_SSL", "SCRAM-SHA-512", "payments", SecretStr(PASSWORD))
    assert relay_config(settings).kafka == settings.kafka == expected
    assert Settings(kafka_bootstrap="kafka:9092").kafka.client_arguments() == {
        "bootstrap_servers": "kafka:9092",
        "security_protocol": "PLAINTEXT",
        "ssl_context": None,
    }


def test_the_password_is_shown_by_nothing_that_holds_it() -> None:
    settings = secured()
    for holder in (settings, settings.kafka, relay_config(settings)):
        assert PASSWORD not in f"{holder!r} {holder}"
    with pytest.raises(TypeError, match="SecretStr"):
        json.dumps(asdict(relay_config(settings)))
    with pytest.raises(ValidationError) as refused:
        secured(kafka_sasl_username="")
    assert PASSWORD not in str(refused.value)
