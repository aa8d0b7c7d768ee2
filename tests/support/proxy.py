"""A TCP proxy that tests put between two parts, to cut connections in mid-message or to stop passing data on."""

import asyncio
import contextlib
from typing import Self

from infra.local import EmbeddedKafka
from infra.local.server import HOST, free_port


class Proxy:
    """Listens on a port of its own and passes bytes on to `target`, until a test cuts or stalls it."""

    def __init__(self, host: str = HOST, port: int = 0) -> None:
        self.port = 0
        self.cuts = 0
        self.target = (host, port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._passes_on = asyncio.Event()
        self._passes_on.set()
        self._cut_after: int | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._passes_on.set()
        self._server.close()
        self._abort()

    def cut_after(self, count: int) -> None:
        """Pass on `count` more bytes to the client, even if that ends in mid-message, then break every connection."""
        self._cut_after = count

    def stall(self) -> None:
        """Accept connections and data but pass nothing on; neither side gets an error."""
        self._passes_on.clear()

    def resume(self) -> None:
        """Break all connections, and let new ones through."""
        self._abort()
        self._passes_on.set()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer, is_answer=True))
        self._writers -= {writer, back}
        writer.transport.abort()
        back.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool = False
    ) -> None:
        while data := await reader.read(65_536):
            await self._passes_on.wait()
            if is_answer and self._cut_after is not None:
                data, self._cut_after = data[: self._cut_after], self._cut_after - len(data)
                if self._cut_after <= 0:
                    self._cut(writer, data)
                    return
            writer.write(data)
            await writer.drain()
        writer.transport.abort()

    def _cut(self, writer: asyncio.StreamWriter, rest: bytes) -> None:
        self._cut_after = None
        self.cuts += 1
        writer.write(rest)
        asyncio.get_running_loop().call_later(0.02, self._abort)


class ProxiedKafka(EmbeddedKafka):
    """A Kafka with a second listener behind a proxy: clients that connect through the proxy get only its address."""

    proxy_port = 0

    def set_door(self, proxy_port: int) -> int:
        """Set the port on which the proxy listens; returns the port to which it must pass bytes on.

        Call this before the start.
        """
        self.proxy_port, self.door = proxy_port, free_port()
        return self.door

    def _settings(self) -> dict[str, str]:
        settings = super()._settings()
        return settings | {
            "listeners": f"{settings['listeners']},PROXIED://{HOST}:{self.door}",
            "advertised.listeners": f"{settings['advertised.listeners']},PROXIED://{HOST}:{self.proxy_port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
        }
