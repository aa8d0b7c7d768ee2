"""The AsyncAPI document in the repository is generated, complete, valid and true to the parser."""

import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from app.settings import GATEWAYS_KNOWN
from domain.commands import Command, RejectionReason
from domain.errors import MessageUnreadable
from domain.money import MINOR_UNITS
from domain.settle import ENDINGS
from handlers.messages.asyncapi import (
    COMMANDS_TOPIC,
    DEAD_LETTER,
    DEAD_LETTERS_TOPIC,
    EVENTS_TOPIC,
    build_document,
)
from handlers.messages.command_models import COMMAND_MODELS
from handlers.messages.commands import read_command
from handlers.messages.dead_letter_reason import DeadLetterReason
from handlers.messages.events import EVENT_MODELS, event_type
from handlers.messages.examples import COMMAND_EXAMPLES
from infra.gateways.paypal_http import WHOLE
from infra.gateways.stripe_objects import ROUNDED_TO_TEN
from infra.kafka import dead_letters
from tests.support.events import read_event

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "asyncapi"
PARSER = "@asyncapi/parser@3"
CHECK = """
import { Parser } from "@asyncapi/parser";
import { readFileSync } from "node:fs";
const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], "utf8"));
const errors = diagnostics.filter((each) => each.severity < 2).map((each) => each.path.join(".") + ": " + each.message);
console.log(JSON.stringify({ parsed: document !== undefined, errors }));
"""


@pytest.fixture(scope="module")
def text() -> str:
    return build_document()


@pytest.fixture(scope="module")
def document(text: str) -> dict[str, Any]:
    loaded = yaml.safe_load(text)
    assert isinstance(loaded, dict)
    return loaded


def test_the_file_in_the_repository_is_up_to_date(text: str) -> None:
    """If this fails, run: python -m handlers.messages.asyncapi > asyncapi.yaml"""
    assert (ROOT / "asyncapi.yaml").read_text(encoding="utf-8") == text


def test_the_documents_messages_are_those_that_are_read_and_written(document: dict[str, Any]) -> None:
    channels = {topic: set(channel["messages"]) for topic, channel in document["channels"].items()}
    assert channels == {
        COMMANDS_TOPIC: set(COMMAND_MODELS),
        EVENTS_TOPIC: set(EVENT_MODELS),
        DEAD_LETTERS_TOPIC: {DEAD_LETTER},
    }


@pytest.mark.parametrize("type_", [*COMMAND_MODELS, *EVENT_MODELS])
def test_a_message_is_one_object_of_its_own_type(document: dict[str, Any], type_: str) -> None:
    reference = document["components"]["messages"][type_]["payload"]["$ref"]
    schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert (schema["type"], schema["properties"]["type"]["const"]) == ("object", type_)


@pytest.mark.parametrize("type_", COMMAND_MODELS)
def test_a_command_names_every_event_that_may_end_it(document: dict[str, Any], type_: str) -> None:
    model = COMMAND_MODELS[type_]
    named = re.findall(r"`([\w.]+)`", document["components"]["schemas"][model.__name__]["description"])
    assert named == [event_type(kind) for kind in ENDINGS[model.kind]]


def test_every_example_of_a_command_is_accepted(document: dict[str, Any]) -> None:
    for type_ in COMMAND_MODELS:
        for example in document["components"]["messages"][type_]["examples"]:
            assert isinstance(read_command(json.dumps(example["payload"]).encode(), None), Command)


def test_the_header_of_an_event_names_its_own_type(document: dict[str, Any]) -> None:
    for type_ in EVENT_MODELS:
        assert document["components"]["messages"][type_]["headers"]["properties"]["ce_type"]["const"] == type_


def test_every_example_of_an_event_is_readable(document: dict[str, Any]) -> None:
    for type_, model in EVENT_MODELS.items():
        for example in document["components"]["messages"][type_]["examples"]:
            assert isinstance(read_event(json.dumps(example["payload"])), model)


def named(key: str, value: object) -> Iterator[Any]:
    """Every value of this key, at any depth of a JSON value."""
    match value:
        case dict():
            yield from (inner for name, inner in value.items() if name == key)
            for inner in value.values():
                yield from named(key, inner)
        case list():
            for inner in value:
                yield from named(key, inner)


def objects(value: object) -> Iterator[dict[str, Any]]:
    """Every object, at any depth of a JSON value."""
    match value:
        case dict():
            yield value
            for inner in value.values():
                yield from objects(inner)
        case list():
            for inner in value:
                yield from objects(inner)


def test_nothing_stands_beside_a_reference(document: dict[str, Any]) -> None:
    """AsyncAPI requires readers to ignore other keys beside `$ref`."""
    assert [each for each in objects(document) if "$ref" in each and len(each) > 1] == []


def test_the_currencys_text_tells_the_decimals_of_each(document: dict[str, Any]) -> None:
    currency = document["components"]["schemas"]["Currency"]
    assert currency["enum"] == sorted(MINOR_UNITS)
    told = re.search(r"have 0 decimals in ([A-Z, ]+); 3 in ([A-Z, ]+); 2 in all others\.", currency["description"])
    assert told is not None
    decimals = dict.fromkeys(told[1].split(", "), 0) | dict.fromkeys(told[2].split(", "), 3)
    assert dict.fromkeys(MINOR_UNITS, 2) | decimals == MINOR_UNITS


def test_the_currencys_text_tells_which_decimals_a_provider_does_not_take(document: dict[str, Any]) -> None:
    text = document["components"]["schemas"]["Currency"]["description"]
    told = re.search(r"at Stripe .+ in ([^;]+); at PayPal a fraction in ([^.]+)\.", text)
    assert told is not None
    at_stripe, at_paypal = (set(re.findall("[A-Z]{3}", each)) for each in told.groups())
    assert at_stripe == ROUNDED_TO_TEN
    assert at_paypal == {currency for currency in WHOLE if MINOR_UNITS[currency]}


def test_a_schema_tells_a_validator_that_a_time_is_one(document: dict[str, Any]) -> None:
    """A pattern alone would accept a 45th day of a 13th month, which we refuse."""
    (schema, _) = document["components"]["schemas"]["ChargePayment"]["properties"]["expires_at"]["anyOf"]
    assert schema["format"] == "date-time"


def test_every_reason_is_explained(document: dict[str, Any]) -> None:
    rejection = document["components"]["schemas"]["RejectionReason"]
    dead_letter = document["components"]["messages"][DEAD_LETTER]["headers"]["properties"]["dlq_reason"]
    for schema, reasons in ((rejection, RejectionReason), (dead_letter, DeadLetterReason)):
        assert re.findall(r"^- `(\w+)`: .+\.$", schema["description"], re.MULTILINE) == schema["enum"] == list(reasons)


def test_the_example_of_an_action_is_one_that_a_gateway_asks_for(document: dict[str, Any]) -> None:
    (example,) = document["components"]["messages"]["payment.requires_action.v1"]["examples"]
    told = document["components"]["schemas"]["Action"]["properties"]["type"]["description"]
    assert f"`{example['payload']['action']['type']}`" in told


def test_the_server_is_where_docker_compose_publishes_kafka(document: dict[str, Any]) -> None:
    (server,) = document["servers"].values()
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    port = server["host"].removeprefix("localhost:")
    assert compose["services"]["kafka"]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_every_gateway_in_an_example_is_one_that_there_is(document: dict[str, Any]) -> None:
    messages, schemas = document["components"]["messages"], document["components"]["schemas"]
    payloads = [example["payload"] for each in messages.values() for example in each.get("examples", [])]
    of_fields = [example for field in named("gateway", schemas) for example in field.get("examples", [])]
    used = {*named("gateway", payloads), *of_fields}
    assert used
    assert used <= set(GATEWAYS_KNOWN)


def test_a_sender_is_told_the_names_of_all_gateways(document: dict[str, Any]) -> None:
    field = document["components"]["schemas"]["ChargePayment"]["properties"]["gateway"]
    assert set(re.findall(r"`(\w+)`", field["description"])) == set(GATEWAYS_KNOWN)


@pytest.mark.parametrize(
    ("payment_id", "is_taken"),
    [
        ("0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00", True),
        ("0190B3A1-7A3C-7E11-9C53-1F0A3A8B9C00", True),
        ("00000000-0000-0000-0000-000000000000", True),
        ("0190b3a17a3c7e119c531f0a3a8b9c00", False),
        ("{0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00}", False),
        ("urn:uuid:0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00", False),
        ("0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c0g", False),
        ("0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c0\n", False),
        ("0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00\n", False),
        ("0190b3a1-7a3c-7e119c53--1f0a3a8b9c00", False),
        ("order-1001-of-the-shop-in-the-old-town", False),
        ("an order's number of 36 characters...", False),
        ("", False),
        (7, False),
        (None, False),
    ],
)
@pytest.mark.parametrize("type_", COMMAND_MODELS)
def test_a_schema_takes_the_payment_ids_that_the_reader_takes(
    document: dict[str, Any], type_: str, payment_id: object, *, is_taken: bool
) -> None:
    """A command without a readable payment id is parked, and its sender gets no result."""
    command = {**COMMAND_EXAMPLES[type_], "payment_id": payment_id}
    schema = {"$ref": f"#/components/schemas/{COMMAND_MODELS[type_].__name__}", "components": document["components"]}
    assert Draft202012Validator(schema).is_valid(command) is is_taken
    if is_taken:
        assert isinstance(read_command(json.dumps(command).encode(), None), Command)
    else:
        with pytest.raises(MessageUnreadable):
            read_command(json.dumps(command).encode(), None)


def test_every_header_that_a_dead_letter_may_have_is_told(document: dict[str, Any]) -> None:
    headers = document["components"]["messages"][DEAD_LETTER]["headers"]
    assert headers["properties"].keys() == set(re.findall(r'"(dlq_\w+)"', inspect.getsource(dead_letters)))
    assert set(headers["properties"]) - set(headers["required"]) == {"dlq_value_left_out", "dlq_key_left_out"}


@pytest.mark.parametrize("told", [None, "", "of an earlier program"])
def test_a_dead_letter_may_have_any_key_and_value_and_none(document: dict[str, Any], told: str | None) -> None:
    message = document["components"]["messages"][DEAD_LETTER]
    components = {"components": document["components"]}
    for schema in (message["payload"], message["bindings"]["kafka"]["key"]):
        assert Draft202012Validator(schema | components).is_valid(told)


@pytest.fixture(scope="module")
def official_parser() -> Path:
    """The script that runs the official parser, installed once into the cache that git ignores."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not here: the document was not checked by @asyncapi/parser")
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (CACHE / "node_modules" / "@asyncapi" / "parser").is_dir():
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(CACHE), PARSER]
        installed = subprocess.run(command, capture_output=True, timeout=150, check=False, cwd=CACHE)
        if installed.returncode:
            pytest.skip("npm could not install @asyncapi/parser: the document was not checked by it")
    script = CACHE / "check.mjs"
    script.write_text(CHECK, encoding="utf-8")
    return script


def test_the_official_parser_accepts_the_document(official_parser: Path) -> None:
    command = ["node", str(official_parser), str(ROOT / "asyncapi.yaml")]
    answer = subprocess.run(command, capture_output=True, timeout=120, check=True, cwd=CACHE)
    assert json.loads(answer.stdout) == {"parsed": True, "errors": []}
