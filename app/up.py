"""Everything on this machine: the servers, the provider simulator and the service, each a process of its own.

Promises: `start` returns when every part answers its health page; a process that crashes is started again; `stop` ends
each part before the parts that it depends on: worker, relay, HTTP, simulator, servers.
"""

import asyncio
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import httpx

from app import processes
from app.child import Child, ChildFailed
from app.settings import Settings
from app.signals import stop_on_signals
from app.stack_file import RunningStack, StackFile
from infra.local import LocalServerError, LocalStack
from infra.local.server import HOST, EmbeddedServer, free_port, is_free
from infra.sandbox import momo, vnpay

RESTART_DELAY_FIRST_SECONDS: Final = 0.5
RESTART_DELAY_MAX_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 30.0
"""A process that ran this long did not fail at its start: its next restart is quick again."""
SERVER_WATCH_SECONDS: Final = 1.0
PREFERRED_HTTP_PORT: Final = 8080
SIMULATOR_KEY: Final = "sk_test_simulator"
ALL_GATEWAYS: Final = '["stripe", "paypal", "vnpay", "momo"]'
STRIPE_BASE: Final = "PAYMENTS_STRIPE_API_BASE"
RETURNS: Final = (
    "PAYMENTS_STRIPE_RETURN_URL",
    "PAYMENTS_PAYPAL_RETURN_URL",
    "PAYMENTS_PAYPAL_CANCEL_URL",
    "PAYMENTS_VNPAY_RETURN_URL",
    "PAYMENTS_MOMO_REDIRECT_URL",
)
"""The pages that payers return to; here there is no shop."""
CREDENTIALS: Final = (
    "PAYMENTS_STRIPE_API_KEY",
    "PAYMENTS_PAYPAL_CLIENT_SECRET",
    "PAYMENTS_VNPAY_HASH_SECRET",
    "PAYMENTS_MOMO_SECRET_KEY",
)
"""Set only in a real installation, or to the simulators' own values."""
SERVICE: Final = ("worker", "relay", "http")


class Reporter(Protocol):
    """Receives the progress of starting and stopping."""

    def step(self, text: str) -> None:
        """A step begins that takes a while."""

    def done(self, what: str, detail: str) -> None:
        """A part is ready."""

    def note(self, text: str) -> None:
        """Something that a person should know."""


class Installation:
    """One complete set of servers and processes, with data in `data_dir`. URLs in the environment replace our servers.

    The caller has entered `stack_file`: only its owner may run an installation in the folder. `defaults` are settings
    that the environment does not set. This process takes on the same environment as its children.
    """

    def __init__(
        self,
        data_dir: Path,
        stack_file: StackFile,
        reporter: Reporter,
        *,
        defaults: Mapping[str, str] | None = None,
        always_simulate: bool = False,
    ) -> None:
        self.data_dir = data_dir
        self.children: dict[str, Child] = {}
        self._stack_file = stack_file
        self._reporter = reporter
        self._simulates = always_simulate or not os.environ.get(STRIPE_BASE)
        self._environment = addresses(simulates=self._simulates) | dict(defaults or {})
        self._servers = LocalStack.from_environment(os.environ, data_dir, on_progress=reporter.step)
        self._servers_starting: asyncio.Future[object] | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._client = httpx.AsyncClient(timeout=3.0, trust_env=False)

    @property
    def urls(self) -> dict[str, str]:
        """Where everything is, by name; complete once started."""
        servers = self._servers.urls
        return {name: self._url_of(name) for name in self.children} | {
            "postgres": servers.postgres_url,
            "kafka": servers.kafka_bootstrap,
            "valkey": servers.redis_url,
        }

    async def start(self) -> None:
        """Start everything, as much as possible in parallel. Call `stop` even after an error.

        Raises:
            LocalServerError, ChildFailed: a part could not start.
        """
        os.environ.update(self._environment)
        processes.preload()
        if self._simulates:
            await self._start_child("simulator")
        await self._start_servers()
        self._reporter.step("schema and topics …")
        await processes.prepare(Settings())
        self._reporter.done("schema, topics", "ready")
        for name in SERVICE:
            await self._start_child(name)
        await self._wait_until_ready()
        self._write_stack_file()
        self._keepers = [asyncio.create_task(self._keep(child)) for child in self.children.values()]
        self._keepers += [asyncio.create_task(self._keep_server(server)) for server in self._servers.servers]

    async def stop(self) -> None:
        """Stop everything that was started, in order; the data stays."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for name in (*SERVICE, "simulator"):
            if name in self.children:
                await self._stop_child(self.children[name])
        await self._client.aclose()
        if self._servers_starting is not None:
            # An interrupted start goes on in its thread: the servers can be stopped only after it.
            await asyncio.gather(self._servers_starting, return_exceptions=True)
            self._reporter.step("stopping the servers …")
            await asyncio.to_thread(self._servers.stop)

    async def erase(self) -> None:
        """Delete the servers' data, the simulator's books and the logs. Only before `start` or after `stop`."""
        await asyncio.to_thread(self._servers.erase)
        for books in self.data_dir.glob(f"{self._books_path.stem}*"):
            books.unlink()
        await asyncio.to_thread(shutil.rmtree, self.data_dir / "logs", ignore_errors=True)

    def kill_all(self) -> None:
        """End our processes at once, without waiting. The servers still stop in order."""
        for child in self.children.values():
            child.kill()

    # --- starting and stopping --------------------------------------------------------------------------------------

    async def _start_servers(self) -> None:
        started = time.monotonic()
        self._servers_starting = asyncio.get_running_loop().run_in_executor(None, self._servers.start)
        await asyncio.shield(self._servers_starting)
        self._environment |= self._servers.urls.as_environment()
        os.environ.update(self._environment)
        self._reporter.done("Kafka, Postgres, Valkey", f"{time.monotonic() - started:.1f} s")

    async def _start_child(self, name: str) -> None:
        arguments = self._simulator_arguments() if name == "simulator" else [name]
        page = "/_sandbox/books?details=false" if name == "simulator" else "/health/ready"
        child = Child(name, arguments, health_url=self._url_of(name) + page, log_dir=self.data_dir / "logs")
        self.children[name] = child
        await child.start()

    def _simulator_arguments(self) -> list[str]:
        port = self._environment[STRIPE_BASE].rsplit(":", 1)[1]
        webhooks = f"{self._url_of('http')}/webhooks"
        return ["sandbox", "--port", port, "--state-file", str(self._books_path), "--webhooks-to", webhooks]

    @property
    def _books_path(self) -> Path:
        return self.data_dir / "simulator.jsonl"

    def _url_of(self, name: str) -> str:
        if name == "simulator":
            return self._environment[STRIPE_BASE]
        return f"http://{HOST}:{self._environment[_port_variable(name)]}"

    async def _wait_until_ready(self) -> None:
        self._reporter.step("waiting until every process is ready …")
        waiting = [asyncio.create_task(self._wait_for(child)) for child in self.children.values()]
        try:
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()

    async def _wait_for(self, child: Child) -> None:
        seconds = await child.wait_until_ready(self._client)
        self._reporter.done(child.name, f"{seconds:.1f} s")

    async def _stop_child(self, child: Child) -> None:
        if child.pid is not None:
            self._reporter.step(f"stopping {child.name} …")
            if not await child.stop():
                self._reporter.note(f"{child.name} did not stop cleanly ({child.ending()}): see {child.log_path}")

    def _write_stack_file(self) -> None:
        pids = {name: child.pid for name, child in self.children.items() if child.pid is not None}
        self._stack_file.write(RunningStack(os.getpid(), self._environment, self.urls, pids))

    # --- keeping it running -----------------------------------------------------------------------------------------

    async def _keep(self, child: Child) -> None:
        """Start the child again whenever it ends, with a growing pause while it keeps failing."""
        failures = 0
        while True:
            await child.wait()
            failures = 0 if child.age_seconds > STEADY_SECONDS else failures + 1
            pause = min(RESTART_DELAY_FIRST_SECONDS * 2 ** max(failures - 1, 0), RESTART_DELAY_MAX_SECONDS)
            self._reporter.note(f"{child.name} ended ({child.ending()}); starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            await child.start()
            self._write_stack_file()
            await self._see_it_back(child)

    async def _see_it_back(self, child: Child) -> None:
        try:
            seconds = await child.wait_until_ready(self._client)
            self._reporter.note(f"{child.name} is back, ready after {seconds:.1f} s")
        except ChildFailed as failure:
            self._reporter.note(f"{failure}: see {failure.log_path}")
            child.kill()

    async def _keep_server(self, server: EmbeddedServer) -> None:
        while True:
            await asyncio.sleep(SERVER_WATCH_SECONDS)
            if not server.running:
                self._reporter.note(f"{server.title} ended; starting it again")
                since = time.monotonic()
                try:
                    await asyncio.to_thread(server.restart)
                    self._reporter.note(f"{server.title} is back after {time.monotonic() - since:.1f} s")
                except LocalServerError as error:
                    self._reporter.note(str(error))


async def run_until_stopped(installation: Installation, on_ready: Callable[[], None]) -> None:
    """`payments up`: start, stay until SIGTERM or SIGINT, stop. A second signal kills what is still stopping.

    Raises:
        LocalServerError, ChildFailed: a part could not start; everything else was stopped again.
    """
    stop = stop_on_signals(then=installation.kill_all)
    starting = asyncio.create_task(installation.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            on_ready()
            await stopping
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await installation.stop()


def addresses(*, simulates: bool) -> dict[str, str]:
    """Ports for our processes, from the environment if set there, and the settings by which they find each other.

    Raises:
        LocalServerError: another process listens on a port that the environment names; it would answer for ours.
    """
    for variable in map(_port_variable, SERVICE):
        port = os.environ.get(variable)
        if port and not is_free(int(port)):
            raise LocalServerError(
                f"Port {port} of {HOST}",
                "another process already listens there",
                f"free it, or set {variable} to another",
            )
    ports = {_port_variable(name): os.environ.get(_port_variable(name)) or str(free_port()) for name in SERVICE}
    if _port_variable("http") not in os.environ and is_free(PREFERRED_HTTP_PORT):
        ports[_port_variable("http")] = str(PREFERRED_HTTP_PORT)
    peers = {name: f"http://{HOST}:{ports[_port_variable(name)]}" for name in ("worker", "relay")}
    found = ports | {"PAYMENTS_HTTP_HOST": HOST, "PAYMENTS_METRICS_PEERS": json.dumps(peers)}
    if simulates:
        simulators = simulated(f"http://{HOST}:{free_port()}", f"http://{HOST}:{ports[_port_variable('http')]}")
        _refuse_real(simulators)
        found |= simulators
    return found


def _refuse_real(simulators: Mapping[str, str]) -> None:
    """Refuse to run with a real installation's credentials: the simulator would report its orders as paid."""
    given = [name for name in CREDENTIALS if os.environ.get(name) not in (None, "", simulators[name])]
    if given:
        raise LocalServerError(
            "The simulated providers",
            f"{', '.join(given)} would be replaced by theirs, and they would report orders here as paid",
            f"unset it, or set {STRIPE_BASE} to call the real providers",
        )


def simulated(simulator: str, http: str) -> dict[str, str]:
    """The settings for every gateway: the simulators' addresses and credentials.

    `simulator` and `http` are the base URLs of the simulators and of the process that receives webhooks.
    """
    return {
        STRIPE_BASE: simulator,
        "PAYMENTS_GATEWAYS": os.environ.get("PAYMENTS_GATEWAYS") or ALL_GATEWAYS,
        "PAYMENTS_STRIPE_API_KEY": SIMULATOR_KEY,
        "PAYMENTS_STRIPE_MULTI_CAPTURE": "true",
        "PAYMENTS_STRIPE_WEBHOOK_SECRETS": json.dumps([f"whsec_{secrets.token_hex(16)}"]),
        "PAYMENTS_PAYPAL_API_BASE": simulator,
        "PAYMENTS_PAYPAL_CLIENT_ID": "simulator",
        "PAYMENTS_PAYPAL_CLIENT_SECRET": "simulator",
        "PAYMENTS_PAYPAL_WEBHOOK_ID": "1JE4291016473214C",
        "PAYMENTS_VNPAY_TMN_CODE": vnpay.TMN_CODE,
        "PAYMENTS_VNPAY_HASH_SECRET": vnpay.SECRET,
        "PAYMENTS_VNPAY_PAY_URL": f"{simulator}/paymentv2/vpcpay.html",
        "PAYMENTS_VNPAY_API_URL": f"{simulator}/merchant_webapi/api/transaction",
        "PAYMENTS_VNPAY_QUESTION_INTERVAL_SECONDS": "0",
        "PAYMENTS_MOMO_PARTNER_CODE": momo.PARTNER,
        "PAYMENTS_MOMO_ACCESS_KEY": momo.ACCESS,
        "PAYMENTS_MOMO_SECRET_KEY": momo.SECRET,
        "PAYMENTS_MOMO_API_BASE": simulator,
        "PAYMENTS_MOMO_IPN_URL": f"{http}/webhooks/momo",
        **{name: os.environ.get(name) or f"{http}/" for name in RETURNS},
    }


def _port_variable(name: str) -> str:
    return f"PAYMENTS_{name.upper()}_PORT"
