"""The demo from start to end: start everything, send, crash, wait, compare. Exit code 0 only if every promise held."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

import httpx
from rich.console import Console
from rich.markup import escape

from app.client import PaymentsClient
from app.command_line import folder_option
from app.console import new_console, safe_text
from app.demo.books import Books, compare
from app.demo.orders import Sending, stream
from app.demo.outsiders import Outsiders
from app.demo.screen import Screen
from app.demo.tally import Check, DemoTally
from app.reporter import ConsoleReporter
from app.settings import Settings
from app.signals import stop_on_signals
from app.stack_file import StackFile
from app.up import ALL_GATEWAYS, Installation
from app.up_report import show_addresses, start_errors
from infra.postgres.ledger import database_time

CRASH_AT: Final = 0.45
"""The worker is killed after this share of the messages."""
RESULTS_SECONDS_MAX: Final = 60.0
"""How long we wait for the remaining results once the last message is sent."""
SURPLUS_SECONDS: Final = 1.0
LETTERS_SECONDS_MAX: Final = 5.0
PROVIDER_LATENCY_MS: Final = 60
MISSING_SHOWN: Final = 10
HASTE: Final = {
    "PAYMENTS_LEASE_SECONDS": "3",
    "PAYMENTS_RETRY_FIRST_DELAY_SECONDS": "0.3",
    "PAYMENTS_SWEEP_INTERVAL_SECONDS": "0.3",
    "PAYMENTS_POLL_INTERVAL_SECONDS": "1",
    "PAYMENTS_STRIPE_TIMEOUT_SECONDS": "6",
}
"""Settings with which recovery from a crash takes seconds. The defaults are for production."""

GATEWAYS: Final = {"PAYMENTS_GATEWAYS": ALL_GATEWAYS, "PAYMENTS_DEFAULT_GATEWAY": "stripe"}


class Interrupted(Exception):
    """Somebody pressed Ctrl-C before the end."""


def run_demo(data_dir: Path, *, orders: int, seed: int | None, stay: bool) -> int:
    """Run the demo and return its exit code."""
    console = new_console()
    screen = Screen(console)
    reporter = Teller(console, screen)
    chosen = random.randrange(10_000) if seed is None else seed  # noqa: S311 - no secret
    try:
        with start_errors(console, reporter), StackFile(data_dir) as stack_file:
            installation = Installation(data_dir, stack_file, reporter, defaults=HASTE | GATEWAYS, always_simulate=True)
            demo = Demo(installation, reporter, screen, stream(orders, chosen))
            demo.introduce(orders, chosen)
            return asyncio.run(demo.run(stay=stay))
    except Interrupted:
        console.print("Interrupted; everything is stopped.")
        return 1


class Teller(ConsoleReporter):
    """Once everything runs, prints notes as timed lines of the story."""

    def __init__(self, console: Console, screen: Screen) -> None:
        super().__init__(console)
        self._screen = screen
        self.has_started = False

    def note(self, text: str) -> None:
        if self.has_started:
            self._screen.tell(f"[yellow]{escape(safe_text(text))}[/]")
        else:
            super().note(text)


class Demo:
    """One run."""

    def __init__(self, installation: Installation, reporter: "Teller", screen: Screen, sendings: list[Sending]) -> None:
        self._installation = installation
        self._reporter = reporter
        self._screen = screen
        self._sendings = sendings
        self._tally = DemoTally(sendings)
        self._answered = asyncio.Event()
        self._letters: set[tuple[bytes, bytes]] = set()

    def introduce(self, orders: int, seed: int) -> None:
        say = self._screen.say
        say("[bold]Payments, each exactly once: a demonstration[/]")
        say(
            f"{orders:,} orders ({len(self._sendings):,} messages, seed {seed}) go through real Kafka, Postgres and "
            "Valkey to four simulated providers\n(Stripe, PayPal, VNPay, MoMo) that lose answers. Messages come twice, "
            "payers pass or fail 3-D Secure,\nbanks open disputes, and the worker is killed on the way. At the end our "
            "books are compared with the providers'."
        )
        haste = ", ".join(f"{name.removeprefix('PAYMENTS_').lower()} {value}" for name, value in HASTE.items())
        data = escape(str(self._installation.data_dir))
        say(f"[dim]Shorter times than in production, so that you need not wait: {haste}. Data: {data}[/]")

    async def run(self, *, stay: bool) -> int:
        """Perform the demo; however it ends, stop everything that was started."""
        stop = stop_on_signals(then=self._installation.kill_all)
        try:
            code = await _unless(stop, self._perform())
            if stay:
                self._show_addresses()
                await stop.wait()
            return code
        finally:
            await self._installation.stop()
            self._reporter.stop_spinner()

    async def _perform(self) -> int:
        self._screen.heading("Starting")
        await self._installation.erase()
        await self._installation.start()
        self._reporter.has_started = True
        self._reporter.stop_spinner()
        await self._set_latency()
        self._screen.heading("Orders come in")
        since = await database_time(self._installation.urls["postgres"])
        urls = self._installation.urls
        planned = [sending.planned for sending in self._sendings if sending.planned is not None]
        self._outsiders = Outsiders(urls["simulator"], urls["http"], planned)
        try:
            async with PaymentsClient(Settings()) as client:
                await self._exchange(client)
                await self._read_dead_letters(client)
        finally:
            await self._outsiders.close()
        return await self._conclude(since)

    async def _set_latency(self) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"{self._installation.urls['simulator']}/_sandbox/all"
            (await client.post(url, json={"latency_ms": PROVIDER_LATENCY_MS})).raise_for_status()

    # --- the exchange -----------------------------------------------------------------------------------------------

    async def _exchange(self, client: PaymentsClient) -> None:
        """Send everything, kill the worker midway, and listen until every delivery is answered or time is up."""
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(self._listen(client))
            with _running(self._screen.follow(self._tally, len(self._sendings))):
                await self._send(client)
                self._screen.tell("all messages are sent")
                await self._outsiders.forge()
                await self._wait_for_answers()
                # Wait a moment longer for what should not come, such as a second result.
                await asyncio.sleep(SURPLUS_SECONDS)
            listening.cancel()

    async def _wait_for_answers(self) -> None:
        try:
            async with asyncio.timeout(RESULTS_SECONDS_MAX):
                await self._answered.wait()
                while not self._outsiders.are_done:  # noqa: ASYNC110 - done by tasks and by events, in any order
                    await asyncio.sleep(0.1)
            self._screen.tell(f"[green]every delivery is answered[/]: {self._tally.answered:,}")
        except TimeoutError:
            self._screen.tell(f"[red]{len(self._tally.missing):,} commands have no answer[/]")

    async def _send(self, client: PaymentsClient) -> None:
        crash_at = int(len(self._sendings) * CRASH_AT)
        started = time.monotonic()
        for number, sending in enumerate(self._sendings):
            if number == crash_at:
                self._crash()
            await asyncio.sleep(max(0.0, started + sending.at - time.monotonic()))
            self._tally.note_sent(sending, time.monotonic())
            await client.post(sending.value, sending.payment_id)
        await client.flush()

    async def _listen(self, client: PaymentsClient) -> None:
        async for heard in client.heard():
            self._tally.note_heard(heard)
            self._outsiders.hear(heard.event)
            if self._installation.children["worker"].is_ready and self._tally.has_recovered(heard.at):
                self._screen.tell("the backlog from the crash is processed")
            if self._tally.sent == len(self._sendings) and not self._tally.missing:
                self._answered.set()

    def _crash(self) -> None:
        self._tally.note_crash(time.monotonic())
        self._screen.tell(
            f"[bold red]the worker is killed (SIGKILL)[/] with {self._tally.in_flight} commands in flight; "
            "orders keep coming"
        )
        self._screen.tell(
            "[dim]the new worker gets the killed one's Kafka partitions when that one's session times out, after 10 s; "
            "until then commands wait[/]"
        )
        self._installation.children["worker"].kill()

    async def _read_dead_letters(self, client: PaymentsClient) -> None:
        """Collect the dead letters; a message that was written several times counts once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LETTERS_SECONDS_MAX):
                while len(self._letters) < self._unreadable:
                    for record in await client.dead_letters.read():
                        headers = dict(record.headers)
                        self._letters.add((headers["dlq_partition"], headers["dlq_offset"]))

    @property
    def _unreadable(self) -> int:
        return sum(1 for sending in self._sendings if sending.planned is None)

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _conclude(self, since: datetime) -> int:
        screen, tally, urls = self._screen, self._tally, self._installation.urls
        books = await compare(urls["postgres"], urls["simulator"], since)
        screen.heading("What happened")
        screen.show_commands(tally)
        screen.show_troubles(tally, self._unreadable, len(self._letters))
        screen.show_latency(tally)
        screen.show_books(books)
        checks = [*tally.checks(), self._check_letters(), self._check_forged(), self._check_disputes()]
        checks += [*_check_books(books), check_told(tally, books)]
        screen.heading("What was promised")
        screen.show_checks(checks)
        self._name_missing()
        held = all(check.held for check in checks)
        screen.say(
            "\n[bold green]No payment was charged twice, every command has its result, and the books agree to the last "
            "cent.[/]"
            if held
            else "\n[bold red]A promise did not hold; see ✗ above.[/]"
        )
        return 0 if held else 1

    def _check_letters(self) -> Check:
        parked = len(self._letters)
        found = f"{parked} of {self._unreadable} are in the dead-letter topic"
        return Check("unreadable messages are kept, not lost", parked == self._unreadable, found)

    def _check_forged(self) -> Check:
        answers = self._outsiders.forged_answers
        found = f"answered with HTTP {', '.join(map(str, answers))}"
        return Check("a forged webhook is refused", bool(answers) and set(answers) == {400}, found)

    def _check_disputes(self) -> Check:
        opened, closed = self._outsiders.disputes_opened, self._outsiders.disputes_closed
        found = f"{opened} opened, {closed} closed"
        return Check("disputes are reported when they open and when they close", self._outsiders.are_done, found)

    def _name_missing(self) -> None:
        missing = self._tally.missing
        for answer in missing[:MISSING_SHOWN]:
            planned = answer.planned
            self._screen.say(f"    missing: {planned.kind} of payment {planned.payment_id} ({planned.story})")
        if len(missing) > MISSING_SHOWN:
            logs = escape(f"{self._installation.data_dir}/logs")
            self._screen.say(f"    and {len(missing) - MISSING_SHOWN} more; logs: {logs}")

    def _show_addresses(self) -> None:
        payment = next(iter(self._tally.answers.values())).planned.payment_id
        self._screen.heading("Everything keeps running; Ctrl-C stops it")
        data_dir = self._installation.data_dir
        show_addresses(self._screen.console, self._installation.urls, data_dir)
        self._screen.say(f"  {'look at a payment':<22}payments show {payment}{escape(folder_option(data_dir))}")


def _check_books(books: Books) -> Iterator[Check]:
    twice = books.charged_twice
    yield Check("no payment was charged twice at the provider", not twice, ", ".join(map(str, twice)) or "none was")
    unequal = [f"{each.gateway} {each.currency}" for each in books.currencies if not each.is_equal]
    providers = len({each.gateway for each in books.currencies})
    found = f"difference 0 with {providers} providers" if not unequal else f"not for {', '.join(unequal)}"
    yield Check("our ledger and the providers' books agree", not unequal, found)


def check_told(tally: DemoTally, books: Books) -> Check:
    """A subscriber that adds up the amounts in the events must get the same sums as the ledger."""
    booked: Counter[tuple[str, str]] = Counter()
    for each in books.currencies:
        booked[each.currency, "captured"] += each.ours.captured
        booked[each.currency, "refunded"] += each.ours.refunded
    wrong = [
        f"{currency} {word}"
        for (currency, word), sum_ in booked.items()
        if set(tally.told_in(currency, word)) != {sum_}
    ]
    found = "in every currency" if not wrong else f"not for {', '.join(wrong)}"
    return Check("the amounts in the results add up to the ledger", not wrong, found)


async def _unless(stop: asyncio.Event, work: Awaitable[int]) -> int:
    """The result of `work`.

    Raises:
        Interrupted: `stop` was set before `work` was done.
    """
    working, stopping = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    raise Interrupted


@contextlib.contextmanager
def _running(work: Awaitable[None]) -> Iterator[None]:
    """Run `work` in the background for as long as the block runs."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
