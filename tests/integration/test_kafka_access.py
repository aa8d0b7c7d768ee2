"""A Kafka that admits nobody without a password, and permits only granted rights: the whole service against it."""

import asyncio
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaConnectionError
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # does not say that it exports them
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from app.client import PaymentsClient, outgoing
from app.maintenance import Maintenance
from app.processes import relay_config
from app.settings import Settings
from domain.commands import OperationKind
from infra.kafka.access import KafkaAccess
from infra.local import EmbeddedKafka
from infra.local.server import HOST, free_port
from tests.support.outbox import fetch_value
from tests.support.relays import running as running_relay
from tests.support.workers import UNREADABLE
from tests.support.workers import running as running_worker

ROOT = Path(__file__).resolve().parents[2]
PASSWORD, ADMINS_PASSWORD = "s3cret-of-payments", "s3cret-of-admin"
LISTENERS = ("sasl_plaintext", "sasl_ssl")
MODULES = "org.apache.kafka.common.security"
PLAIN = (
    f'{MODULES}.plain.PlainLoginModule required username="admin" password="{ADMINS_PASSWORD}" '
    f'user_admin="{ADMINS_PASSWORD}" user_payments="{PASSWORD}";'
)
RIGHTS = {
    (ResourceType.TOPIC, "payments.", ResourcePatternType.PREFIXED): ("CREATE", "READ", "WRITE", "DESCRIBE_CONFIGS"),
    (ResourceType.GROUP, "payments", ResourcePatternType.LITERAL): ("READ",),
}
"""The rights that docs/operations/kafka.md lists."""


class SecuredKafka(EmbeddedKafka):
    """Requires a password from everybody; at `tls_port` over TLS, with a certificate for 127.0.0.1 and nothing else."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.tls_port = free_port()
        self.ca_file, self._keys = write_certificates(data_dir)

    @property
    def access(self) -> KafkaAccess:
        return KafkaAccess(self.bootstrap, "SASL_PLAINTEXT", username="admin", password=SecretStr(ADMINS_PASSWORD))

    def _settings(self) -> dict[str, str]:
        plain = super()._settings()
        broker, tls = plain["advertised.listeners"].replace("PLAINTEXT", "SASL_PLAINTEXT"), self.tls_port
        settings = plain | {
            "listeners": f"SASL_{plain['listeners']},SASL_SSL://{HOST}:{tls}",
            "advertised.listeners": f"{broker},SASL_SSL://{HOST}:{tls}",
            "listener.security.protocol.map": ("CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL"),
            "inter.broker.listener.name": "SASL_PLAINTEXT",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self._keys),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:admin;User:ANONYMOUS",  # The controller's listener has no users.
        }
        for name in LISTENERS:
            settings[f"listener.name.{name}.plain.sasl.jaas.config"] = PLAIN
            scram = f"{MODULES}.scram.ScramLoginModule required;"
            settings[f"listener.name.{name}.scram-sha-512.sasl.jaas.config"] = scram
        return settings

    def _java(self, *arguments: str) -> list[str]:
        if "format" in arguments:
            arguments += ("--add-scram", f"SCRAM-SHA-512=[name=payments,password={PASSWORD}]")
        return super()._java(*arguments)


def write_certificates(folder: Path) -> tuple[Path, Path]:
    """The CA's certificate, and the broker's key with the certificate that the CA signed for it."""
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in ("ca", "kafka")]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
    written = []
    for name, key, extension in zip(names, keys, (x509.BasicConstraints(True, None), address), strict=True):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
            .add_extension(extension, critical=True)
            .sign(keys[0], hashes.SHA256())
        )
        written.append(certificate.public_bytes(Encoding.PEM))
    private = keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    ca_file, key_file = folder / "ca.pem", folder / "kafka.pem"
    ca_file.write_bytes(written[0])
    key_file.write_bytes(private + written[1])
    return ca_file, key_file


@pytest.fixture(scope="module")
def kafka(data_dir: Path) -> Iterator[SecuredKafka]:
    """The broker; its user `payments` has RIGHTS and nothing more."""
    folder = data_dir / "secured"
    folder.mkdir()
    server = SecuredKafka(folder)
    try:
        server.start()
        admin = AdminClient(
            {
                "bootstrap.servers": server.bootstrap,
                "security.protocol": "SASL_PLAINTEXT",
                "sasl.mechanism": "PLAIN",
                "sasl.username": "admin",
                "sasl.password": ADMINS_PASSWORD,
            }
        )
        rights = [
            AclBinding(*resource, "User:payments", "*", AclOperation[operation], AclPermissionType.ALLOW)
            for resource, operations in RIGHTS.items()
            for operation in operations
        ]
        for made in admin.create_acls(rights).values():
            made.result(30)
        yield server
    finally:
        server.erase()


class Way(NamedTuple):
    """A way for a client to authenticate."""

    protocol: str
    mechanism: str

    def told(self, kafka: SecuredKafka) -> dict[str, str]:
        """This way as settings."""
        is_tls = self.protocol == "SASL_SSL"
        return {
            "kafka_bootstrap": f"{HOST}:{kafka.tls_port if is_tls else kafka.port}",
            "kafka_security_protocol": self.protocol,
            "kafka_sasl_mechanism": self.mechanism,
            "kafka_sasl_username": "payments",
            "kafka_sasl_password": PASSWORD,
            "kafka_ca_file": str(kafka.ca_file) if is_tls else "",
        }


WAYS = [Way("SASL_PLAINTEXT", "PLAIN"), Way("SASL_PLAINTEXT", "SCRAM-SHA-512"), Way("SASL_SSL", "PLAIN")]


@pytest.fixture
def told(kafka: SecuredKafka, way: Way, postgres_url: str, redis_url: str) -> dict[str, str]:
    run = uuid4().hex[:8]
    return way.told(kafka) | {
        "postgres_url": postgres_url,
        "redis_url": redis_url,
        "commands_topic": f"payments.{run}.commands",
        "events_topic": f"payments.{run}.events",
        "dead_letter_topic": f"payments.{run}.dlq",
        "topic_partitions": "2",
        "relay_slot": f"test_{run}",
        "default_gateway": "instant",
    }


async def payments(told: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished `payments …`; it must not have printed a password."""
    environment = {f"PAYMENTS_{name.upper()}": value for name, value in told.items()}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "app.cli", *arguments],
        cwd=ROOT,
        env=os.environ | environment | {"PAYMENTS_GATEWAYS": '["instant"]', "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert PASSWORD not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize("way", WAYS, ids="-".join)
async def test_with_its_password_and_its_rights_the_service_does_all_that_it_does(told: dict[str, str]) -> None:
    made = await payments(told, "migrate")
    assert made.returncode == 0, made.stderr
    settings = Settings(**told, gateways=["instant"])  # type: ignore[arg-type]
    assert await Maintenance(settings).checks()["kafka"]() is None
    config = relay_config(settings)
    fields: dict[str, Any] = {"amount_minor": 1250, "currency": "USD", "payment_method": "pm", "order_id": "order-1"}
    command = outgoing(OperationKind.CHARGE, uuid4(), "key-1", fields)
    async with running_worker(settings) as worker, running_relay(config), PaymentsClient(settings) as client:
        await client.send(command.value, command.payment_id)
        heard = [each.event["type"] async for each in client.result_of(command, timeout_seconds=60)]
        assert heard[-1] == "payment.captured.v1"
        await client.send(UNREADABLE, command.payment_id)
        async with asyncio.timeout(30):
            while not (parked := await client.dead_letters.read()):
                pass
        assert parked[0].value == UNREADABLE
        assert await worker.checks()["kafka"]() is None
        async with asyncio.timeout(30):
            proven = "SELECT count(*) FROM relay_slots WHERE published_below > (SELECT max(xact) FROM outbox)"
            while not await fetch_value(settings.postgres_url, proven):
                await asyncio.sleep(0.05)
    letters = await payments(told, "dlq", "list", "--json")
    assert [each["reason"] for each in json.loads(letters.stdout)] == ["not_utf8"], letters
    again = await payments(told, "dlq", "retry", "--all")
    assert again.returncode == 0, again
    replayed = await payments(told, "relay", "replay", "--since", "1h")
    assert replayed.returncode == 0, replayed
    refused = await payments(told | {"kafka_sasl_password": "wrong"}, "relay", "replay", "--since", "1h")
    assert_told_what_to_look_at(refused)


def assert_told_what_to_look_at(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, done
    assert "If it wants TLS or a password, are PAYMENTS_KAFKA_SECURITY_PROTOCOL and the" in done.stderr, done
    assert "Traceback" not in done.stdout + done.stderr, done


COMMANDS: list[tuple[str, ...]] = [
    ("migrate",),
    ("dlq", "list"),
    ("send", "charge", "--amount", "1", "--currency", "USD"),
    ("worker",),
]


@pytest.mark.parametrize("way", WAYS[:1], ids="-".join)
@pytest.mark.parametrize("wrong", [{"kafka_sasl_password": "wrong"}, {}], ids=["wrong password", "in the clear"])
async def test_a_refused_kafka_login_is_reported_with_the_settings_to_check(
    told: dict[str, str], wrong: dict[str, str]
) -> None:
    kept = {name: value for name, value in told.items() if wrong or not name.startswith("kafka_s")}
    kept |= {name: str(free_port()) for name in ("worker_port", "relay_port")}
    for command in COMMANDS:
        assert_told_what_to_look_at(await payments(kept | wrong, *command))


@pytest.mark.parametrize("way", WAYS[:1], ids="-".join)
async def test_a_missing_kafka_right_is_reported_with_the_page_that_lists_the_rights(told: dict[str, str]) -> None:
    done = await payments(told | {"events_topic": "not.ours"}, "migrate")
    assert done.returncode == 1
    assert "docs/operations/kafka.md lists the rights" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_broker_whose_certificate_is_of_another_ca_or_host_gets_no_password(kafka: SecuredKafka) -> None:
    def admin(host: str, ca_file: str) -> AIOKafkaAdminClient:
        access = KafkaAccess(f"{host}:{kafka.tls_port}", "SASL_SSL", "PLAIN", "payments", SecretStr(PASSWORD), ca_file)
        return AIOKafkaAdminClient(**access.client_arguments())

    for host, ca_file in (("localhost", str(kafka.ca_file)), (HOST, "")):
        client = admin(host, ca_file)
        with pytest.raises(KafkaConnectionError):
            await client.start()
        await client.close()
    client = admin(HOST, str(kafka.ca_file))
    await client.start()
    await client.close()
