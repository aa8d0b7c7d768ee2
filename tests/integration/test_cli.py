"""The command line against a real `payments up`: what a person types, and what the command answers."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from app.cli import app
from app.client import AmountUnusable, minor_units
from app.command_line import advice_on, error_text
from app.listing import Wanted, list_payments
from app.settings import Settings
from app.times import TimeUnusable, moment
from app.wiring import GATEWAYS
from infra.local.server import free_port
from tests.conftest import Topics
from tests.support.cli import PAYMENTS, ROOT, environment, run
from tests.support.waiting import wait_until

INSTANT = {"PAYMENTS_GATEWAYS": '["instant"]', "PAYMENTS_DEFAULT_GATEWAY": "instant"}


@dataclass(frozen=True, slots=True)
class Up:
    """A running `payments up`."""

    process: subprocess.Popen[str]
    data_dir: Path

    @property
    def stack(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.data_dir / "stack.json").read_text())
        return found

    @property
    def output(self) -> str:
        return (self.data_dir / "up.out").read_text()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(*arguments, data_dir=self.data_dir)

    def send(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Exit code and result of `payments send … --json`."""
        done = self.run("send", *arguments, "--json")
        assert done.stdout.startswith("{"), done.stderr
        return done.returncode, json.loads(done.stdout)


@contextlib.contextmanager
def started(data_dir: Path, **settings: str) -> Iterator[Up]:
    """`payments up`, once it reports that it is ready. If a test left it running, it is killed with its children."""
    log = (data_dir / "up.out").open("w+")
    process = subprocess.Popen(
        [*PAYMENTS, "up"], cwd=ROOT, env=environment(data_dir, **settings), stdout=log, text=True
    )
    try:
        wait_until(lambda: (data_dir / "stack.json").exists() or process.poll() is not None)
        assert process.poll() is None, Up(process, data_dir).output
        yield Up(process, data_dir)
    finally:
        process.terminate()
        process.wait(60)
        log.close()


@pytest.fixture(scope="module")
def up(data_dir: Path) -> Iterator[Up]:
    folder = data_dir / "cli"
    folder.mkdir()
    with started(folder) as running:
        yield running


def new_charge(*more: str) -> list[str]:
    return ["charge", "--amount", "12.50", "--currency", "USD", *more]


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [
        ("12.50", "USD", 1250),
        ("12.5", "USD", 1250),
        ("1250", "JPY", 1250),
        ("0.001", "KWD", 1),
        ("0.07", "EUR", 7),
        ("12.5000", "USD", 1250),
        (".5", "USD", 50),
        ("5.", "USD", 500),
        ("9" * 18, "KWD", int("9" * 18 + "000")),
    ],
)
def test_an_amount_becomes_minor_units_exactly(amount: str, currency: str, minor: int) -> None:
    assert minor_units(amount, currency) == minor


@pytest.mark.parametrize(
    ("amount", "currency", "why"),
    [
        ("12.505", "USD", "USD has 2 decimals"),
        ("1.5", "JPY", "JPY has no decimals"),
        ("0", "USD", "more than zero"),
        ("-3", "USD", "more than zero"),
        ("NaN", "USD", "not an amount"),
        ("1e3", "USD", "not an amount"),
        ("1_0", "USD", "not an amount"),
        ("\u0665", "USD", "not an amount"),
        (" 1", "USD", "not an amount"),
        ("1.2.3", "USD", "not an amount"),
        (".", "USD", "not an amount"),
        ("12.500000000000000000000000000000001", "USD", "USD has 2 decimals"),
        ("twelve", "USD", "not an amount"),
        ("1", "XXX", "not one of the currencies"),
    ],
)
def test_an_amount_that_cannot_be_paid_says_why(amount: str, currency: str, why: str) -> None:
    with pytest.raises(AmountUnusable, match=why):
        minor_units(amount, currency)


COMMANDS = (
    "up",
    "demo",
    "send",
    "show",
    "list",
    "worker",
    "relay",
    "http",
    "sandbox",
    "migrate",
    "maintain",
    "check",
    "asyncapi",
)
SLOW_TO_IMPORT = ("aiokafka", "faststream", "pydantic", "rich", "sqlalchemy", "stripe")


def test_help_names_every_command() -> None:
    done = subprocess.run([*PAYMENTS, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


def test_help_is_quick_since_it_loads_no_large_library() -> None:
    program = f"import sys, app.cli; print([name for name in {SLOW_TO_IMPORT} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_relay_begins_before_its_http_server_is_read_and_without_what_only_a_person_needs() -> None:
    read = "from app.processes import relay_config; from app.process import run; from infra.relay import Relay"
    program = f"import sys; {read}; print([name for name in ('rich', 'starlette', 'uvicorn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wrong_usage_is_not_mistaken_for_a_refused_payment(tmp_path: Path) -> None:
    assert run("send", "charge", "--amont", "3", data_dir=tmp_path).returncode == 1


def test_without_servers_send_says_how_to_start_them(tmp_path: Path) -> None:
    if "PAYMENTS_KAFKA_BOOTSTRAP" in os.environ:
        pytest.skip("the environment names servers")
    done = run("send", *new_charge(), data_dir=tmp_path)
    assert done.returncode == 1
    assert "payments up" in done.stderr


@pytest.mark.parametrize("command", ["worker", "http", "up", "gateways"])
def test_a_setting_that_is_no_json_says_what_to_write(tmp_path: Path, command: str) -> None:
    done = run(command, data_dir=tmp_path, PAYMENTS_GATEWAYS="stripe")
    assert done.returncode == 1
    message = """PAYMENTS_GATEWAYS is not valid JSON; write it like PAYMENTS_GATEWAYS='["stripe", "paypal"]'"""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_setting_that_cannot_be_says_why_in_our_words(tmp_path: Path) -> None:
    done = run("gateways", data_dir=tmp_path, PAYMENTS_KAFKA_BOOTSTRAP="x y")
    assert "PAYMENTS_KAFKA_BOOTSTRAP: 'x y' is not a valid broker address" in done.stderr


def test_a_secret_that_is_no_json_is_not_printed(tmp_path: Path) -> None:
    done = run("worker", data_dir=tmp_path, PAYMENTS_STRIPE_WEBHOOK_SECRETS="whsec_secret")
    assert "PAYMENTS_STRIPE_WEBHOOK_SECRETS is not valid JSON" in done.stderr
    assert "whsec_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["worker"], ["http"], ["dlq", "list"], ["maintain"]], ids=" ".join)
def test_a_password_that_is_not_escaped_is_named_and_not_printed(tmp_path: Path, command: list[str]) -> None:
    url = "postgresql://user:s3cr/et@127.0.0.1:1/payments"
    done = run(*command, data_dir=tmp_path, PAYMENTS_POSTGRES_URL=url, PAYMENTS_KAFKA_BOOTSTRAP="127.0.0.1:1")
    assert done.returncode == 1
    assert "PAYMENTS_POSTGRES_URL: is not a valid postgresql:// URL" in done.stderr
    assert "s3cr" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["worker", "http"])
def test_a_process_whose_gateways_lack_settings_names_them(tmp_path: Path, command: str) -> None:
    done = run(command, data_dir=tmp_path, PAYMENTS_GATEWAYS='["stripe", "vnpay", "momo"]')
    assert done.returncode == 1
    for name in ("STRIPE_RETURN_URL", "VNPAY_HASH_SECRET", "VNPAY_RETURN_URL", "MOMO_SECRET_KEY", "MOMO_IPN_URL"):
        assert f"PAYMENTS_{name}" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_gateway_is_told_by_the_matrix(tmp_path: Path) -> None:
    done = run("gateways", data_dir=tmp_path, PAYMENTS_GATEWAYS='["stripe", "strip"]')
    assert (done.returncode, done.stdout) == (1, "")
    assert "PAYMENTS_GATEWAYS names ['strip']; known are" in done.stderr


@pytest.mark.parametrize("command", [["list"], ["reconcile", "--now", "--dry-run"], ["maintain"]], ids=" ".join)
def test_a_database_without_a_schema_says_to_migrate(
    empty_postgres_url: str, tmp_path: Path, command: list[str]
) -> None:
    instant = {"PAYMENTS_GATEWAYS": '["instant"]', "PAYMENTS_DEFAULT_GATEWAY": "instant"}
    done = run(*command, data_dir=tmp_path, PAYMENTS_POSTGRES_URL=empty_postgres_url, **instant)
    assert done.returncode == 1
    assert "run `payments migrate`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["--as", "succeeded"], "--as needs --payment, --operation and --evidence"),
        (["--as", "succeeded", "--now"], "use --now"),
        (
            [
                "--as",
                "succeeded",
                "--payment",
                "5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69",
                "--operation",
                "2",
                "--evidence",
                "seen",
                "--json",
            ],
            "--yes",
        ),
        (["--now", "--evidence", "seen"], "go with --as"),
        (["--now", "--amount", "5"], "go with --as"),
        (["--now", "--yes"], "go with --as"),
        (["--now", "--gateway", "paypal"], "--gateway goes with --day"),
        (["--as", "succeeded", "--gateway", "paypal"], "--gateway goes with --day"),
        (["--day", "2026-01-31", "--payment", "p"], "go with --now"),
        (["--day", "2026-01-31", "--dry-run"], "go with --now"),
    ],
)
def test_options_of_reconcile_that_do_not_go_together_are_told(tmp_path: Path, given: list[str], advice: str) -> None:
    done = run("reconcile", *given, data_dir=tmp_path, PAYMENTS_POSTGRES_URL="postgresql://127.0.0.1:1/none")
    assert done.returncode == 1
    assert advice in done.stderr


def test_reconcile_logs_nothing_where_there_is_nothing_to_say(tmp_path: Path, postgres_url: str) -> None:
    done = run(
        "reconcile", "--now", "--dry-run", data_dir=tmp_path, **INSTANT | {"PAYMENTS_POSTGRES_URL": postgres_url}
    )
    assert (done.returncode, done.stderr) == (0, "")


SIGNING = {"PAYMENTS_STRIPE_WEBHOOK_SECRETS": '["whsec_cli"]', "PAYMENTS_PAYPAL_WEBHOOK_ID": "1JE"}


def test_the_simulator_alone_says_where_it_is_and_how_to_use_it(tmp_path: Path) -> None:
    port, state_file = str(free_port()), tmp_path / "not" / "yet" / "books.jsonl"
    command = [*PAYMENTS, "sandbox", "--port", port, "--state-file", str(state_file)]
    command += ["--webhooks-to", "http://127.0.0.1:9999/webhooks"]
    log = tmp_path / "sandbox.out"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path, **SIGNING), stdout=output)
    try:
        books = f"http://127.0.0.1:{port}/_sandbox"
        wait_until(lambda: process.poll() is not None or _answers(books))
        taken = run("sandbox", "--port", port, data_dir=tmp_path)
        assert taken.returncode == 1
        assert f"port {port} of 127.0.0.1 is in use" in taken.stderr
    finally:
        process.terminate()
        process.wait(30)
    told = log.read_text()
    assert books in told
    given = dict(re.findall("^export (PAYMENTS_[A-Z_]+)=(.*)$", told, re.MULTILINE))
    assert given["PAYMENTS_MOMO_IPN_URL"] == "http://127.0.0.1:9999/webhooks/momo"
    told_settings = {name: shlex.split(value)[0] for name, value in given.items()}
    assert run("gateways", data_dir=tmp_path, **told_settings).returncode == 0
    assert told_settings["PAYMENTS_PAYPAL_WEBHOOK_ID"] == SIGNING["PAYMENTS_PAYPAL_WEBHOOK_ID"]
    for needed in (needed for each in GATEWAYS.values() for needed in (*each.credentials, *each.addresses)):
        assert told_settings[f"PAYMENTS_{needed.upper()}"]


@pytest.mark.parametrize(("process", "port"), [("relay", "PAYMENTS_RELAY_PORT"), ("worker", "PAYMENTS_WORKER_PORT")])
def test_a_process_whose_port_is_taken_says_so_before_it_begins(tmp_path: Path, process: str, port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = INSTANT | {port: str(taken.getsockname()[1])}
        settings["PAYMENTS_POSTGRES_URL"] = "postgresql://127.0.0.1:1/none"
        ended = run(process, data_dir=tmp_path, **settings)
    assert ended.returncode == 1
    assert ended.stderr.startswith("payments: cannot listen: Address already in use")
    assert port in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("port", ["0", "99999"])
@pytest.mark.parametrize("command", ["http", "sandbox"])
def test_a_port_that_cannot_be_is_wrong_usage(command: str, port: str) -> None:
    assert "Invalid value for '--port'" in CliRunner().invoke(app, [command, "--port", port]).output


@pytest.mark.parametrize("away", ["PAYMENTS_POSTGRES_URL", "PAYMENTS_KAFKA_BOOTSTRAP"])
def test_a_worker_that_cannot_start_says_what_to_do(
    tmp_path: Path, postgres_url: str, kafka_bootstrap: str, away: str
) -> None:
    settings = INSTANT | {"PAYMENTS_POSTGRES_URL": postgres_url, "PAYMENTS_KAFKA_BOOTSTRAP": kafka_bootstrap}
    nowhere = {"PAYMENTS_POSTGRES_URL": "postgresql://127.0.0.1:1/none", "PAYMENTS_KAFKA_BOOTSTRAP": "127.0.0.1:1"}
    settings |= {away: nowhere[away], "PAYMENTS_WORKER_PORT": str(free_port())}
    ended = run("worker", data_dir=tmp_path, **settings)
    assert ended.returncode == 1
    assert f"running, and {away} right?" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("silent", ["PAYMENTS_POSTGRES_URL", "PAYMENTS_KAFKA_BOOTSTRAP"])
def test_a_worker_that_waits_for_a_silent_server_ends_when_it_is_told_to(
    tmp_path: Path, postgres_url: str, kafka_bootstrap: str, silent: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, port = f"127.0.0.1:{server.getsockname()[1]}", str(free_port())
        settings = INSTANT | {"PAYMENTS_POSTGRES_URL": postgres_url, "PAYMENTS_KAFKA_BOOTSTRAP": kafka_bootstrap}
        settings |= {silent: f"postgresql://{address}/none" if "URL" in silent else address}
        settings["PAYMENTS_WORKER_PORT"] = port
        process = subprocess.Popen([*PAYMENTS, "worker"], cwd=ROOT, env=environment(tmp_path, **settings))
        try:
            wait_until(lambda: process.poll() is not None or _answers(f"http://127.0.0.1:{port}/health/live"))
            with server.accept()[0]:
                process.terminate()
                assert process.wait(5) == 0
        finally:
            process.kill()


def test_up_does_not_begin_where_somebody_would_answer_for_one_of_its_processes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("up", data_dir=tmp_path, PAYMENTS_HTTP_PORT=port)
    assert ended.returncode == 1
    assert f"Port {port} of 127.0.0.1: another process already listens there" in ended.stdout
    assert "PAYMENTS_HTTP_PORT" in ended.stdout


@pytest.mark.parametrize("command", ["up", "demo"])
def test_in_the_environment_of_a_real_installation_nothing_is_simulated(command: str, tmp_path: Path) -> None:
    """Simulators would replace the real providers, and report orders as paid."""
    ended = run(command, data_dir=tmp_path, PAYMENTS_STRIPE_API_KEY="sk_live_own", PAYMENTS_VNPAY_HASH_SECRET="own")
    assert ended.returncode == 1
    assert "PAYMENTS_STRIPE_API_KEY, PAYMENTS_VNPAY_HASH_SECRET would be replaced" in ended.stdout
    assert "sk_live_own" not in ended.stdout + ended.stderr


def test_up_says_what_to_do_where_a_server_of_the_environments_is_away(tmp_path: Path) -> None:
    away = {"PAYMENTS_POSTGRES_URL": "postgresql://127.0.0.1:1/none", "PAYMENTS_KAFKA_BOOTSTRAP": "127.0.0.1:1"}
    ended = run("up", data_dir=tmp_path, **away, PAYMENTS_REDIS_URL="redis://127.0.0.1:1/0")
    assert ended.returncode == 1
    assert "Is Kafka running, and PAYMENTS_KAFKA_BOOTSTRAP right?" in ended.stdout
    assert "Traceback" not in ended.stderr + ended.stdout


def test_a_kafka_that_does_not_answer_is_not_waited_for_and_nothing_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.send.CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PAYMENTS_KAFKA_BOOTSTRAP", f"127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        done = CliRunner().invoke(app, ["send", *new_charge()])
    assert done.exit_code == 1
    assert "KafkaTimeoutError: Kafka does not answer; nothing was sent\nIs Kafka running" in done.output
    assert time.monotonic() - started < 10


def test_dlq_list_without_kafka_reports_the_error_and_what_to_check(tmp_path: Path, postgres_url: str) -> None:
    away = {"PAYMENTS_KAFKA_BOOTSTRAP": "127.0.0.1:1", "PAYMENTS_POSTGRES_URL": postgres_url}
    done = run("dlq", "list", data_dir=tmp_path, **away)
    assert done.returncode == 1
    told, advice = done.stderr.splitlines()
    assert told.startswith("payments: KafkaConnectionError: ")
    assert advice.startswith("Is Kafka running, and PAYMENTS_KAFKA_BOOTSTRAP right? ")


def test_a_topic_that_is_not_there_is_told_at_once_and_nothing_was_sent(
    tmp_path: Path, kafka_bootstrap: str, topics: Topics
) -> None:
    names = {"COMMANDS": "none", "EVENTS": topics.events, "DEAD_LETTER": topics.dlq}
    there = {f"PAYMENTS_{name}_TOPIC": topic for name, topic in names.items()}
    started = time.monotonic()
    done = run("send", *new_charge("--no-wait"), data_dir=tmp_path, PAYMENTS_KAFKA_BOOTSTRAP=kafka_bootstrap, **there)
    assert done.returncode == 1
    told = "payments: KafkaError: no topic none was found within 5 s: `payments migrate` creates it; nothing was sent"
    assert done.stderr.startswith(told)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("command", [["gateways"], ["gateways", "--json"], ["asyncapi"]], ids=" ".join)
def test_a_disk_that_is_full_is_no_trouble_of_postgres(tmp_path: Path, command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PAYMENTS, *command], cwd=ROOT, env=environment(tmp_path), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"payments: No space left on device\n")


@pytest.mark.parametrize("command", ["up", "demo"])
def test_it_ends_without_a_traceback_when_nobody_reads_any_more(tmp_path: Path, command: str) -> None:
    with subprocess.Popen(
        [*PAYMENTS, command],
        cwd=ROOT,
        env=environment(tmp_path),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        told = process.stderr.read()

    assert (process.returncode, told) == (1, "")


@pytest.mark.parametrize(
    "command", [["asyncapi"], ["gateways"], ["list", "--json"], ["relay", "status", "--json"]], ids=" ".join
)
def test_an_output_that_nobody_reads_is_no_trouble_of_postgres(
    tmp_path: Path, postgres_url: str, command: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    settings = environment(tmp_path, PAYMENTS_POSTGRES_URL=postgres_url)
    done = subprocess.run(
        [*PAYMENTS, *command], cwd=ROOT, env=settings, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("command", ["up", "demo", "list"])
def test_a_file_in_the_place_of_the_data_folder_is_told(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    done = run(command, data_dir=tmp_path / "file")
    assert done.returncode == 1
    assert done.stderr.endswith(f"dir '{tmp_path}/file' is a file.\n")


@pytest.mark.parametrize(
    ("error", "told", "is_of_a_server"),
    [
        (TimeoutError(), "TimeoutError: no answer in time", True),
        (ConnectionRefusedError(111, "Connect call failed"), "ConnectionRefusedError: [Errno 111]", True),
        (OSError("Multiple exceptions: …"), "OSError: Multiple exceptions", True),
        (FileNotFoundError(2, "No such file or directory"), "FileNotFoundError: [Errno 2]", True),
        (FileNotFoundError(2, "No such file or directory", "books"), "books: No such file or directory", False),
        (OSError(28, "No space left on device"), "No space left on device", False),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else "",
)
def test_only_an_error_of_a_connection_is_one_of_a_server(error: Exception, told: str, is_of_a_server: bool) -> None:
    assert error_text(error).startswith(told)
    assert (advice_on(error) is not None) is is_of_a_server


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_simulator_signs_no_webhooks_with_nothing(tmp_path: Path) -> None:
    for missing in SIGNING:
        rest = {name: value for name, value in SIGNING.items() if name != missing}
        done = run("sandbox", "--webhooks-to", "http://127.0.0.1:9999/webhooks", data_dir=tmp_path, **rest)
        assert done.returncode == 1
        assert f"--webhooks-to needs {missing}" in done.stderr


def test_a_folder_in_the_place_of_the_simulators_books_is_told(tmp_path: Path) -> None:
    done = run("sandbox", "--state-file", str(tmp_path), data_dir=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"payments: --state-file: {tmp_path} is a folder; name a file in it\n"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("list", "Of this currency"),
        ("send charge", "Like 12.50, of --currency."),
        ("send charge", "the message as it came"),
        ("reconcile", "As JSON."),
    ],
)
def test_help_says_what_an_option_is_for_here(tmp_path: Path, command: str, told: str) -> None:
    assert told in run(*command.split(), "--help", data_dir=tmp_path).stdout


def test_the_simulators_help_names_all_four(tmp_path: Path) -> None:
    told = run("sandbox", "--help", data_dir=tmp_path).stdout
    assert all(name in told for name in ("Stripe", "PayPal", "VNPay", "MoMo"))


def test_the_file_with_the_servers_addresses_is_readable_by_its_owner_only(up: Up) -> None:
    assert (up.data_dir / "stack.json").stat().st_mode & 0o077 == 0


def test_a_payer_who_is_awaited_is_told_and_where(up: Up) -> None:
    awaited = ["charge", "--amount-minor", "50000", "--currency", "VND", "--gateway", "vnpay", "--timeout", "5"]
    done = up.run("send", *awaited)
    assert done.returncode == 3
    assert "the payer is awaited until" in done.stderr
    assert re.search(r"Payer's page: +http://\S+/paymentv2/vpcpay\.html\?\S+", done.stderr)
    assert "running?" not in done.stderr
    payment = re.search(r"payment (\S+)", done.stdout)
    assert payment is not None, done.stdout
    shown = up.run("show", payment[1]).stdout
    assert re.search(r"payer's page +http://\S+/paymentv2/vpcpay\.html\?\S+\n", shown)
    assert re.search(r"until +20[0-9-]{8} [0-9:]{8}Z\n", shown)

    late = up.run("send", "refund", "--payment-id", payment[1], "--timeout", "2")
    assert late.returncode == 3
    assert "it waits its turn: an earlier command of its payment is not finished, or waits for its payer" in late.stderr
    assert re.search(r"refund +received: waits its turn", up.run("show", payment[1]).stdout)

    row = rf"{payment[1]} +charge 1 +VND 50,000 +requires_action +20[0-9-]{{8}} [0-9:]{{8}}Z +vnpay"
    stuck = up.run("list", "--stuck", "0m").stdout
    assert re.search(row, stuck)
    assert "refund" not in stuck
    facts = json.loads(up.run("list", "--stuck", "0m", "--json").stdout)["payments"]
    charge, refund = next(each for each in facts if each["payment_id"] == payment[1])["operations"]
    assert (charge["kind"], charge["gateway"], refund["state"]) == ("charge", "vnpay", "received")
    assert charge["dispatched_at"].endswith("Z")
    assert "No payment has waited for 30d, and none needs review." in up.run("list", "--stuck", "30d").stdout
    assert up.run("list", "--stuck", "0m", "--limit", str(len(facts))).stderr == ""
    up.run("send", *awaited)
    told = up.run("list", "--stuck", "0m", "--limit", str(len(facts))).stderr
    assert f"--limit shows more than {len(facts)}" in told


def test_a_hint_can_be_used_in_another_terminal(up: Up, tmp_path: Path) -> None:
    sent = up.run("send", *new_charge("--no-wait")).stdout
    hint = re.search(r"look later with: payments (.+)\n", sent)
    assert hint is not None, sent
    wait_until(lambda: run(*shlex.split(hint[1]), data_dir=tmp_path).returncode == 0)


def test_a_payment_that_never_was_one_is_shown_as_that(up: Up) -> None:
    payment = str(uuid.uuid4())
    up.send("capture", "--payment-id", payment)
    shown = up.run("show", payment).stdout
    assert "no charge or authorize of it was accepted" in shown
    assert f"payment_not_found: payment {payment} was never authorized or charged" in " ".join(shown.split())


def test_a_program_gets_where_the_payer_is_to_go(up: Up) -> None:
    vnpay = ["--amount-minor", "50000", "--currency", "VND", "--gateway", "vnpay", "--timeout", "5"]
    code, event = up.send("charge", *vnpay)
    assert (code, event["type"]) == (3, "payment.requires_action.v1")
    assert "vpcpay.html?" in event["action"]["url"]


def test_a_charge_is_captured(up: Up) -> None:
    code, event = up.send(*new_charge())
    assert (code, event["type"]) == (0, "payment.captured.v1")
    assert event["payment"]["captured_minor"] == 1250


def test_the_result_is_a_line_for_a_person(up: Up) -> None:
    done = up.run("send", *new_charge())
    assert done.returncode == 0
    assert "captured  USD 12.50" in done.stdout


def test_a_command_sent_again_is_replayed(up: Up) -> None:
    same = new_charge("--payment-id", str(uuid.uuid4()), "--idempotency-key", f"k-{uuid.uuid4()}")
    _, first = up.send(*same)
    code, second = up.send(*same)
    assert (code, second["replayed"]) == (0, True)
    assert second["original_event_id"] == first["event_id"]
    assert "replayed: nothing moved  payment was captured then, " in up.run("send", *same).stdout


def test_a_key_with_other_content_is_rejected(up: Up) -> None:
    key = ["--payment-id", str(uuid.uuid4()), "--idempotency-key", f"k-{uuid.uuid4()}"]
    up.send(*new_charge(*key))
    code, event = up.send("charge", "--amount", "99", *key)
    assert (code, event["reason"]) == (2, "idempotency_conflict")


def test_a_declined_card_has_its_own_exit_code(up: Up) -> None:
    code, event = up.send(*new_charge("--payment-method", "pm_card_visa_chargeDeclinedInsufficientFunds"))
    assert (code, event["decline_reason"]) == (2, "insufficient_funds")


def test_no_result_in_time_has_its_own_exit_code_and_advice(up: Up) -> None:
    done = up.run("send", *new_charge("--timeout", "0.001"))
    assert done.returncode == 3
    assert "payments show" in done.stderr
    key = f"k-{uuid.uuid4()}"
    code, told = up.send(*new_charge("--timeout", "0.001", "--idempotency-key", key))
    assert (code, told["idempotency_key"]) == (3, key), "a program can ask again"


def test_a_program_that_is_interrupted_can_ask_again_by_the_names_that_were_made_for_it(up: Up) -> None:
    charge = ["charge", "--amount-minor", "50000", "--currency", "VND", "--gateway", "vnpay"]
    with subprocess.Popen(
        [*PAYMENTS, "send", *charge, "--json"],
        cwd=ROOT,
        env=environment(up.data_dir),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        told = process.stderr.readline() + process.stderr.readline()
        process.terminate()
        assert process.stdout.read() == ""
    names = re.fullmatch(r"charge  payment (\S+)\n  idempotency key  (\S+)\n", told)
    assert names is not None, told
    code, event = up.send(*charge, "--payment-id", names[1], "--idempotency-key", names[2], "--timeout", "5")
    assert (code, event["payment_id"]) == (3, names[1])


def test_a_program_that_names_what_it_sends_is_told_the_result_alone(up: Up) -> None:
    named = ["--payment-id", str(uuid.uuid4()), "--idempotency-key", f"k-{uuid.uuid4()}", "--json"]
    assert up.run("send", *new_charge(*named)).stderr == ""


def test_the_advice_to_ask_again_holds_the_key_as_it_was_given(up: Up) -> None:
    key = f"refund {uuid.uuid4()}[a]:ticket:'"
    done = up.run("send", *new_charge("--timeout", "0", "--idempotency-key", key))
    assert f"idempotency key  {key}\n" in done.stdout
    advice = next(line for line in done.stderr.splitlines() if "Ask again:" in line)
    words = shlex.split(advice.partition(";")[0])
    assert words[words.index("--idempotency-key") + 1] == key


def test_text_of_others_is_shown_without_markup_or_control_codes(up: Up) -> None:
    order, customer = f"[/x]:ticket:{uuid.uuid4()}", f"[red]\x1b[2J{uuid.uuid4()}"
    _, event = up.send(*new_charge("--order-id", order, "--customer-id", customer))
    for told in (up.run("list", "--customer", customer), up.run("show", event["payment_id"])):
        assert told.returncode == 0, told.stderr
        assert order in told.stdout
        assert "\x1b" not in told.stdout
    assert customer.replace("\x1b", "\\x1b") in told.stdout


@pytest.mark.parametrize("answer", ["", "n\n"])
def test_a_question_that_nobody_answers_names_the_option_and_a_no_does_not(answer: str) -> None:
    drop = ["relay", "quarantine", "drop", str(uuid.uuid4()), "--why", "a test"]
    done = CliRunner().invoke(app, drop, input=answer)
    assert done.exit_code == 1
    assert ("nobody can answer here: use --yes to skip the question" in done.output) is (answer == "")


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_a_wait_that_is_none_sends_nothing(up: Up, seconds: str) -> None:
    done = up.run("send", *new_charge("--timeout", seconds))
    assert (done.returncode, done.stdout) == (1, "")
    assert "--timeout" in done.stderr


def test_too_many_decimals_send_nothing(up: Up) -> None:
    done = up.run("send", "charge", "--amount", "12.505", "--currency", "USD")
    assert (done.returncode, done.stdout) == (1, "")
    assert "USD has 2 decimals" in done.stderr


@pytest.mark.parametrize("option", ["--idempotency-key", "--payment-id"])
def test_an_empty_name_is_no_new_one(up: Up, option: str) -> None:
    """An unset shell variable gives an empty value. If it counted as a new name, each try would be another payment."""
    done = up.run("send", *new_charge(option, ""))
    assert (done.returncode, done.stdout) == (1, "")


def test_a_payment_can_be_followed_from_authorization_to_refund(up: Up) -> None:
    _, authorized = up.send("authorize", "--amount", "80", "--currency", "EUR", "--customer-id", "customer-cli")
    payment = ["--payment-id", authorized["payment_id"]]
    up.send("capture", *payment, "--amount", "30", "--currency", "EUR")
    up.send("capture", *payment)
    code, event = up.send("refund", *payment, "--amount-minor", "500")
    assert (code, event["payment"]["status"]) == (0, "partially_refunded")

    shown = json.loads(up.run("show", authorized["payment_id"], "--json").stdout)
    assert [each["state"] for each in shown["operations"]] == ["succeeded"] * 4
    assert [each["payment_seq"] for each in shown["events"]] == [1, 2, 3, 4]
    assert (shown["captured_minor"], shown["refunded_minor"]) == (8000, 500)
    assert "refunded EUR 5.00" in up.run("show", authorized["payment_id"]).stdout

    listed = json.loads(up.run("list", "--customer", "customer-cli", "--json").stdout)
    assert [each["payment_id"] for each in listed["payments"]] == [authorized["payment_id"]]


def test_payments_are_listed_by_filters(up: Up) -> None:
    _, event = up.send("charge", "--amount", "7777.77", "--currency", "GBP")
    filters = ["--status", "captured", "--currency", "GBP", "--min", "7777.77", "--max", "7777.77", "--since", "1h"]
    listed = json.loads(up.run("list", *filters, "--json").stdout)
    assert [each["payment_id"] for each in listed["payments"]] == [event["payment_id"]]


@pytest.mark.parametrize(
    ("filters", "advice"),
    [
        ({"status": "paid"}, "use one of: created"),
        ({"gateway": "strip"}, "use one of: instant, momo"),
        ({"stuck": "long"}, "15m, 2h, or 7d"),
        ({"stuck": "1h", "status": "captured"}, "cannot be combined"),
        ({"stuck": "1h", "cursor": "AAAAAAAAAAE"}, "cannot be combined"),
        ({"amount_min": "3"}, "need --currency"),
        ({"amount_min": "3.001", "currency": "USD"}, "2 decimals"),
        ({"since": "yesterday"}, "2h"),
        ({"order": "a", "status": "captured"}, "cannot be combined"),
        ({"order": "a", "customer": "b"}, "cannot be combined"),
    ],
)
def test_a_filter_that_cannot_be_read_says_what_to_write(filters: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        list_payments(Settings(), Wanted(**{"limit": 20} | filters), as_json=True)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_times_are_in_utc_wherever_the_terminal_is(up: Up, zone: str) -> None:
    _, event = up.send(*new_charge())
    shown = run("show", event["payment_id"], data_dir=up.data_dir, TZ=zone).stdout
    facts = json.loads(run("show", event["payment_id"], "--json", data_dir=up.data_dir, TZ=zone).stdout)
    created = re.search(r"created +(\S+ \S+Z)\n", shown)
    assert created is not None, shown
    assert facts["created_at"].endswith("Z")
    happened_at = datetime.fromisoformat(event["occurred_at"])
    for each in (created[1], facts["created_at"]):
        assert abs(datetime.fromisoformat(each) - happened_at).total_seconds() < 60


@pytest.mark.parametrize("text", ["2026-01-31", "2026-01-31T00:00:00", "2026-01-31T00:00Z", "2026-01-31T07:00+07:00"])
def test_a_day_begins_at_midnight_utc(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert moment(text) == datetime(2026, 1, 31, tzinfo=UTC)
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


@pytest.mark.parametrize("text", ["999999d", "0001-01-01T00:00+14:00", "soon"])
def test_a_time_that_is_none_is_told(text: str) -> None:
    with pytest.raises(TimeUnusable, match="is not a date or age"):
        moment(text)


def test_a_cursor_that_is_none_is_told(up: Up) -> None:
    done = up.run("list", "--cursor", "!")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cursor" in done.stderr


def test_an_unknown_payment_is_told(up: Up) -> None:
    assert up.run("show", str(uuid.uuid4())).returncode == 1


def test_a_second_up_refuses_and_says_where_the_first_is(up: Up) -> None:
    done = up.run("up")
    assert done.returncode == 1
    assert str(up.process.pid) in done.stdout
    assert up.process.poll() is None


def test_the_commands_that_up_suggests_work_in_another_terminal(up: Up) -> None:
    told = up.output + up.run("up").stdout
    hints = re.findall("(?:try|Use it:) +payments (send charge .*)", told)
    assert len(hints) == 2
    for each in hints:
        assert shlex.split(each)[-2:] == ["--data-dir", str(up.data_dir)]


def test_the_http_process_shows_all_processes(up: Up) -> None:
    metrics = httpx.get(f"{up.stack['urls']['http']}/metrics", trust_env=False).text
    for name in ("http", "worker", "relay"):
        assert f'payments_process_up{{process="{name}"}} 1.0' in metrics


def test_a_crashed_worker_is_started_again(up: Up) -> None:
    killed = up.stack["pids"]["worker"]
    os.kill(killed, signal.SIGKILL)
    code, _ = up.send(*new_charge())
    assert code == 0
    assert up.stack["pids"]["worker"] != killed
    wait_until(lambda: re.search(r"worker is back, ready after [0-9.]+ s", up.output) is not None)
    assert "worker ended (SIGKILL); starting it again" in up.output


def test_a_crashed_server_is_started_again(up: Up) -> None:
    killed = json.loads((up.data_dir / "valkey.pid").read_text())["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: re.search(r"Valkey is back after [0-9.]+ s", up.output) is not None)
    assert "Valkey ended; starting it again" in up.output


def test_migrating_what_is_migrated_does_nothing(up: Up) -> None:
    for command in ("migrate", "maintain"):
        done = up.run(command)
        assert done.returncode == 0, done.stderr


def test_the_matrix_marks_what_is_used_here(up: Up) -> None:
    used = json.loads(up.stack["environment"]["PAYMENTS_GATEWAYS"])
    assert used
    told = up.run("gateways").stdout
    assert all(f"{name} *" in told for name in used)
    assert "stripe **" in told


def test_ids_can_be_copied_from_a_narrow_screen(up: Up) -> None:
    key = f"k-{uuid.uuid4()}"
    _, event = up.send(*new_charge("--idempotency-key", key))
    listed = run("list", data_dir=up.data_dir, COLUMNS="80").stdout
    assert any(event["payment_id"] in line.split() for line in listed.splitlines())
    shown = run("show", event["payment_id"], data_dir=up.data_dir, COLUMNS="80").stdout.splitlines()
    for whole in (key, event["payment"]["gateway_payment_id"], event["type"]):
        assert any(whole in line.split() for line in shown)


def test_up_ends_cleanly_and_leaves_nothing_behind(up: Up) -> None:
    """The last of the tests that use `up`."""
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 4
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(60) == 0
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not (up.data_dir / "stack.json").exists()


def test_a_process_that_cannot_start_is_named_with_the_end_of_its_log(tmp_data_dir: Path) -> None:
    names = {"PAYMENTS_GATEWAYS": '["nonsense"]', "PAYMENTS_DEFAULT_GATEWAY": "nonsense"}
    done = run("up", data_dir=tmp_data_dir, **names)
    assert done.returncode == 1
    assert re.search("(worker|http) ended while starting", done.stdout)
    assert "PAYMENTS_GATEWAYS names ['nonsense']" in done.stdout
    assert not (tmp_data_dir / "stack.json").exists()


def test_settings_that_cannot_work_are_a_message_before_anything_starts(tmp_data_dir: Path) -> None:
    for command in ("up", "worker", "relay"):
        done = run(command, data_dir=tmp_data_dir, PAYMENTS_GATEWAYS='["nonsense"]')
        assert done.returncode == 1
        assert (
            "PAYMENTS_DEFAULT_GATEWAY is 'stripe'; write one of PAYMENTS_GATEWAYS, which are ['nonsense']"
            in done.stderr
        )
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [["list"], ["show", "5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69"], ["check"]], ids=lambda each: each[0]
)
def test_a_look_at_payments_in_a_database_that_does_not_exist_ends_with_what_to_check(
    tmp_path: Path, postgres_url: str, command: list[str]
) -> None:
    missing = postgres_url.rsplit("/", 1)[0] + "/no_such_database"
    done = run(*command, data_dir=tmp_path, PAYMENTS_POSTGRES_URL=missing)
    assert done.returncode == 1
    assert "PAYMENTS_POSTGRES_URL right?" in done.stderr
    assert "0 payments" not in done.stderr


def test_a_misspelt_setting_is_named_and_what_others_set_is_not(tmp_path: Path, postgres_url: str) -> None:
    others = {"PAYMENTS_PORT": "tcp://10.0.0.1:80", "PAYMENTS_LEASE_SECOND": "5"}
    done = run("list", data_dir=tmp_path, PAYMENTS_POSTGRES_URL=postgres_url, **others)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "payments: PAYMENTS_LEASE_SECOND is not a setting and is ignored; is PAYMENTS_LEASE_SECONDS meant?"
    ]
