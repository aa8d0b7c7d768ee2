"""What `payments send` prints: what was sent, what came back; and the exit code for the result."""

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Final

from aiokafka.errors import KafkaConnectionError, KafkaError, KafkaTimeoutError, MessageSizeTooLargeError
from rich.console import Console
from rich.text import Text

from app.client import REFUSALS, EventBody, NoResultYet, OutgoingCommand, PaymentsClient, is_result
from app.console import new_console, print_json, safe_text, shell_word
from app.settings import Settings
from domain.money import Money

DONE, REFUSED, NO_RESULT = 0, 2, 3
CONNECT_SECONDS: Final = 10.0
"""How long Kafka may take for its first answer; nothing is sent before it."""
REQUIRES_ACTION: Final = "payment.requires_action.v1"


def send_and_report(
    settings: Settings,
    kind: str,
    command: OutgoingCommand,
    *,
    is_named: bool,
    wait: bool,
    timeout_seconds: float,
    as_json: bool,
    folder: str,
) -> int:
    """Send the command, print its events, and return the exit code.

    `folder`: the option by which other commands find the same data folder, for hints; empty for the default.
    `is_named`: the caller chose payment id and key. If they were generated for a program, they are printed on standard
    error before anything is sent: without them, an interrupted program could only pay again.
    """
    console, aside = new_console(), new_console(to_stderr=True)
    if not (as_json and is_named):
        first = aside if as_json else console
        first.print(Text.assemble(f"{kind}  payment ", (str(command.payment_id), "bold")), soft_wrap=True)
        first.print(f"  idempotency key  {safe_text(command.idempotency_key)}", soft_wrap=True)
    try:
        code = asyncio.run(_exchange(settings, command, console, timeout_seconds if wait else None, as_json))
        return _sent(console, command, as_json, folder) if code is None else code
    except NoResultYet as late:
        if as_json:
            print_json(late.last or _sent_facts(command))
        if late.last is not None and late.last["type"] == REQUIRES_ACTION:
            aside.print(_payer_awaited(late.last, command, folder), soft_wrap=True)
            return NO_RESULT
        aside.print(_advice(late, command, timeout_seconds, folder), soft_wrap=True)
        return NO_RESULT


async def _exchange(
    settings: Settings, command: OutgoingCommand, console: Console, timeout_seconds: float | None, as_json: bool
) -> int | None:
    """The exit code for the command's result; None if it was only sent, without a time to wait."""
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                client = await stack.enter_async_context(PaymentsClient(settings))
        except TimeoutError as error:
            raise KafkaTimeoutError("Kafka does not answer; nothing was sent") from error
        except KafkaConnectionError as error:
            bootstrap = settings.kafka.bootstrap
            raise KafkaConnectionError(f"nothing was sent: Kafka at {bootstrap} cannot be reached") from error
        sent_at = time.monotonic()
        try:
            await client.send(command.value, command.payment_id)
        except MessageSizeTooLargeError:
            raise
        except KafkaError as error:
            raise KafkaError(
                f"{error!r}: Kafka may or may not have the command. {_how_to_ask_again(command)}"
            ) from error
        if timeout_seconds is None:
            return None
        async for heard in client.result_of(command, timeout_seconds=timeout_seconds):
            event = heard.event
            if not as_json:
                _print_event(console, event, heard.at - sent_at)
        if as_json:
            print_json(event)
        return REFUSED if event["type"] in REFUSALS else DONE


def _sent(console: Console, command: OutgoingCommand, as_json: bool, folder: str) -> int:
    if as_json:
        print_json(_sent_facts(command))
    else:
        console.print(f"  sent; look later with: payments show {command.payment_id}{folder}", soft_wrap=True)
    return DONE


def _sent_facts(command: OutgoingCommand) -> dict[str, str]:
    """The ids that are needed to ask again."""
    return {"payment_id": str(command.payment_id), "idempotency_key": command.idempotency_key}


def _print_event(console: Console, event: EventBody, seconds: float) -> None:
    colour = "red" if event["type"] in REFUSALS else "green" if is_result(event) else "yellow"
    word = event["type"].split(".")[1].replace("command_", "").replace("_", " ")
    facts = [_amount(event), _why(event), "replayed: nothing moved" if event["replayed"] else ""]
    text = safe_text("  ".join(fact for fact in facts if fact))
    status = event["payment"]["status"]
    state = f"payment was {status} then" if event["replayed"] else f"payment is {status}"
    aside = f"{state}, {seconds * 1000:.0f} ms"
    console.print(Text.assemble("  ", (word, f"bold {colour}"), f"  {text}  ", (aside, "dim")), soft_wrap=True)


def _amount(event: EventBody) -> str:
    minor, currency = event["amount_minor"], event["currency"]
    return "" if minor is None or currency is None else str(Money(minor, currency))


def _why(event: EventBody) -> str:
    match event["type"]:
        case "payment.declined.v1":
            code = f" ({event['decline_code']})" if event["decline_code"] else ""
            return f"{event['decline_reason']}{code}"
        case "payment.command_rejected.v1":
            return f"{event['reason']}: {event['message']}"
        case "payment.requires_action.v1":
            return f"the payer must act: {event['action']['url'] or event['action']['type']}"
        case "payment.pending.v1":
            return f"{event['cause']}; waiting"
        case _:
            return ""


def _payer_awaited(event: EventBody, command: OutgoingCommand, folder: str) -> Text:
    """The message for a command that waits for its payer."""
    action = event["action"]
    until = f" until {action['expires_at']}" if action["expires_at"] else ""
    return Text.assemble(
        (f"No result yet: the payer is awaited{until}.", "yellow"),
        " The result follows when they have acted.\n"
        f"  Payer's page:  {safe_text(action['url'] or action['type'])}\n"
        f"  Look:          payments show {command.payment_id}{folder}\n"
        f"  Cancel:        payments send void --payment-id {command.payment_id}{folder} (where the provider can: "
        "payments gateways)",
    )


def _advice(late: NoResultYet, command: OutgoingCommand, timeout_seconds: float, folder: str) -> Text:
    state = f"its last event is {late.last['type']}" if late.last else "no event about it has come"
    return Text.assemble(
        (f"No result after {timeout_seconds:g} s: {state}.", "yellow"),
        " The command is not lost and may still succeed.\n"
        "  Perhaps:     it waits its turn: an earlier command of its payment is not finished, or waits for its payer\n"
        f"  Look:        payments show {command.payment_id}{folder}\n"
        f"  {_how_to_ask_again(command)}\n"
        "  Still quiet: is `payments up` (or worker and relay) running? See /health/ready and the logs.",
    )


def _how_to_ask_again(command: OutgoingCommand) -> str:
    return (
        f"Ask again:   the same command with --payment-id {command.payment_id} --idempotency-key "
        f"{shell_word(command.idempotency_key)}; nothing moves twice"
    )
