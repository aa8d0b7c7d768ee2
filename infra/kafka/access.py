"""Kafka's address, TLS and credentials. Every client is made of this, so that all use the same security."""

import ssl
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SecretStr

if TYPE_CHECKING:
    from faststream.security import BaseSecurity

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


@dataclass(frozen=True, slots=True)
class KafkaAccess:
    """The brokers, and how to speak with them: in the clear and as nobody, unless told otherwise."""

    bootstrap: str
    protocol: SecurityProtocol = "PLAINTEXT"
    sasl_mechanism: SaslMechanism = "PLAIN"
    username: str = ""
    password: SecretStr | None = None
    ca_file: str = ""
    """Whose signature the brokers' certificates must bear; if empty, of those that this machine trusts."""

    def client_arguments(self) -> dict[str, Any]:
        """What an aiokafka client needs to reach the brokers; from then on none in this process makes topics.

        Raises:
            OSError: the CA file cannot be read.
        """
        _leave_topics_to_us()
        arguments = {
            "bootstrap_servers": self.bootstrap,
            "security_protocol": self.protocol,
            "ssl_context": self._tls(),
        }
        if not self._has_user:
            return arguments
        return arguments | {
            "sasl_mechanism": self.sasl_mechanism,
            "sasl_plain_username": self.username,
            "sasl_plain_password": self._revealed(),
        }

    def broker_security(self) -> "BaseSecurity":
        """The same for FastStream's broker, beside `bootstrap`, and for its aiokafka clients.

        Raises:
            OSError: the CA file cannot be read.
        """
        # Of all processes only the worker uses FastStream, which takes a while to load.
        from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512  # noqa: PLC0415

        _leave_topics_to_us()
        if not self._has_user:
            return BaseSecurity(self._tls())
        kinds = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}
        return kinds[self.sasl_mechanism](self.username, self._revealed(), self._tls())

    @property
    def _has_user(self) -> bool:
        return self.protocol.startswith("SASL_")

    def _revealed(self) -> str:
        return self.password.get_secret_value() if self.password is not None else ""

    def _tls(self) -> ssl.SSLContext | None:
        """Verifies who signed a broker's certificate, and that it is that host's."""
        if not self.protocol.endswith("SSL"):
            return None
        return ssl.create_default_context(cafile=self.ca_file or None)


def _leave_topics_to_us() -> None:
    """Have no aiokafka client of this process ask for a topic so that the broker makes it.

    Where `auto.create.topics.enable` is on, which is Kafka's default, the question alone makes a topic that is missing,
    mistyped or just deleted, with one partition and one copy. aiokafka's clients have no setting for it.
    """
    import aiokafka.client  # noqa: PLC0415 - who only reads settings needs none
    from aiokafka.protocol.metadata import MetadataRequest  # noqa: PLC0415

    vars(aiokafka.client)["MetadataRequest"] = partial(MetadataRequest, allow_auto_topic_creation=False)
