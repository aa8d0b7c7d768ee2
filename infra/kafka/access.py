"""Kafka's address, TLS and credentials. Every client is built from this, so that all use the same security."""

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
    """The brokers and how to connect to them; by default without TLS or authentication."""

    bootstrap: str
    protocol: SecurityProtocol = "PLAINTEXT"
    sasl_mechanism: SaslMechanism = "PLAIN"
    username: str = ""
    password: SecretStr | None = None
    ca_file: str = ""
    """CA certificates that must have signed the brokers' certificates; if empty, those that this machine trusts."""

    def client_arguments(self) -> dict[str, Any]:
        """The arguments of an aiokafka client; from this call on no client of this process creates topics.

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
        """The same for FastStream's broker and its aiokafka clients, except `bootstrap`.

        Raises:
            OSError: the CA file cannot be read.
        """
        # Only the worker uses FastStream, which takes a while to load.
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
        """A context that verifies who signed a broker's certificate, and that it is for that host."""
        if not self.protocol.endswith("SSL"):
            return None
        return ssl.create_default_context(cafile=self.ca_file or None)


def _leave_topics_to_us() -> None:
    """Keep the aiokafka clients of this process from asking for a topic in a way that creates it.

    Where `auto.create.topics.enable` is on, which is Kafka's default, the mere request creates a topic that is missing,
    mistyped or just deleted, with one partition and one copy. aiokafka's clients have no setting for this.
    """
    import aiokafka.client  # noqa: PLC0415 - not needed to read settings only
    from aiokafka.protocol.metadata import MetadataRequest  # noqa: PLC0415

    vars(aiokafka.client)["MetadataRequest"] = partial(MetadataRequest, allow_auto_topic_creation=False)
