"""The metrics of the use cases, all named here. Labels come from closed sets."""

from collections.abc import Callable, Iterable
from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from domain.commands import OperationKind
from domain.events import EventKind
from domain.ports import Connections

RESULTS = Counter("payments_command_results_total", "Events that answer commands", ["command", "result"])
COMMANDS = Counter("payments_commands_received_total", "Commands read, duplicates and postponed ones included")
DUPLICATES = Counter("payments_commands_duplicate_total", "Deliveries whose idempotency key was known")
DEAD_LETTERS = Counter("payments_commands_dead_lettered_total", "Messages parked in the dead-letter topic", ["reason"])
COMMANDS_LOST = Counter(
    "payments_commands_lost_total", "Offsets of the commands' topic that Kafka deleted before they were read"
)
RESULT_SECONDS = Histogram(
    "payments_command_result_seconds",
    "From a command's dispatch to its saved result",
    ["command"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
BATCH_SECONDS = Histogram(
    "payments_batch_seconds",
    "One write transaction with its decisions",
    ["input"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
CONCURRENT_UPDATES = Counter("payments_concurrent_updates_total", "Batches decided again after a lost race")
STALE_ANSWERS = Counter("payments_stale_answers_total", "Gateway answers too late to be applied")
REFUSED_ANSWERS = Counter(
    "payments_refused_answers_total",
    "Gateway answers, about operations or holds, that could not be saved: the log says which are asked for again",
)
POSTPONED = Counter(
    "payments_batches_postponed_total",
    "Batches to be read again: postgres or kafka was away, or a defect",
    ["input", "cause"],
)
HINT_UNAVAILABLE = Counter("payments_recent_keys_unavailable_total", "Checks of recent keys that Valkey did not answer")
COMMAND_RETRIES = Counter("payments_command_retries_total", "Tries of commands that had failed alone, before parking")
BACKLOG = Gauge("payments_backlog", "Operations accepted by this worker and not yet saved with an outcome")
IN_FLIGHT = Gauge("payments_gateway_in_flight", "Gateway calls under way", ["gateway"])
IN_FLIGHT_LIMIT = Gauge("payments_gateway_in_flight_limit", "Gateway calls under way at most", ["gateway"])
CONNECTIONS = Gauge(
    "payments_gateway_connections",
    "Connections open to a provider: in_use by a call, or idle, kept for the next one",
    ["gateway", "state"],
)
CONNECTIONS_LIMIT = Gauge("payments_gateway_connections_limit", "Connections to a provider at most", ["gateway"])
TIMEOUTS = Counter(
    "payments_gateway_timeouts_total",
    "Gateway calls that got no connection or no whole answer in time",
    ["gateway"],
)
CALLS = Counter("payments_gateway_calls_total", "Gateway calls by outcome", ["gateway", "operation", "outcome"])
CALL_SECONDS = Histogram(
    "payments_gateway_call_seconds",
    "One gateway call",
    ["gateway"],
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60),
)
RECONCILED = Counter(
    "payments_reconciled_total",
    "What was stuck (an operation that was taken over, a hold past its end) and asked about, or repeated, by answer",
    ["gateway", "subject", "answer"],
)
IN_DOUBT = Gauge("payments_operations_in_doubt", "Operations whose outcome is unknown: money may have moved", ["state"])
OLDEST_DOUBT = Gauge(
    "payments_operations_in_doubt_oldest_seconds", "For how long the oldest of them has been under way", ["state"]
)
HEALED = Counter(
    "payments_operations_healed_total",
    "What was stuck (in doubt, taken over, a hold past its end) and ended by the provider's word",
    ["gateway", "state"],
)
DISAGREEING = Counter(
    "payments_reconciled_disagreeing_total",
    "Providers' answers that contradict what is booked: somebody must look",
    ["gateway"],
)
STUCK = Gauge(
    "payments_stuck",
    "Open operations that nobody is working on just now, holds past their end, and webhooks not applied",
    ["subject"],
)
STUCK_OLDEST = Gauge(
    "payments_stuck_oldest_seconds",
    "For how long the oldest of them has been under way, past its end, or in the inbox",
    ["subject"],
)
STUCK_OVERDUE = Gauge(
    "payments_stuck_overdue_seconds",
    "For how long one of them has been due to be asked about, or applied, at most",
    ["subject"],
)
WEBHOOKS = Counter("payments_webhooks_total", "Webhooks received, by what became of them", ["gateway", "verdict"])
NOTICES_DISAGREEING = Counter(
    "payments_notices_disagreeing_total", "Webhooks that contradict what is known: somebody must look", ["gateway"]
)
NOTICES_APPLIED = Counter("payments_notices_applied_total", "Webhooks applied to their payments")
NOTICES_POSTPONED = Counter(
    "payments_notices_postponed_total", "Times that a webhook was put off until what is under way has its outcome"
)
CIRCUIT_OPEN = Gauge("payments_gateway_circuit_open", "1 while nothing but questions is sent to a gateway", ["gateway"])
RESTING = Gauge(
    "payments_gateway_resting",
    "1 while a provider has asked for fewer requests: only payers' own are sent",
    ["gateway"],
)
LAG = Gauge("payments_commands_lag", "Offsets of a partition that this worker has and has not read yet", ["partition"])
POSITION = Gauge("payments_commands_position", "The offset of a partition that this worker reads next", ["partition"])
PAUSED = Gauge("payments_consumer_paused", "1 while the backlog is above its bound and partitions are paused")
CLAIMED = Counter("payments_operations_claimed_total", "Operations taken over by the sweep")


def expect(gateways: Iterable[str]) -> None:
    """Start series at 0 whose first increase must alert: a series that first appears at 1 has not increased."""
    for name in gateways:
        TIMEOUTS.labels(name)
        DISAGREEING.labels(name)
        NOTICES_DISAGREEING.labels(name)


def watch_connections(gateway: str, connections: Callable[[], Connections]) -> None:
    """Report a gateway's connections whenever the metrics are read."""
    CONNECTIONS.labels(gateway, "in_use").set_function(lambda: connections().in_use)
    CONNECTIONS.labels(gateway, "idle").set_function(lambda: connections().idle)
    CONNECTIONS_LIMIT.labels(gateway).set_function(lambda: connections().limit)


@cache
def results(command: OperationKind | None, result: EventKind) -> Counter:
    """The counter with these labels, cached: a look-up for every event would cost more than the counting."""
    return RESULTS.labels(command.value if command else "none", result.value)


@cache
def calls(gateway: str, operation: OperationKind, outcome: str) -> Counter:
    """The counter with these labels, cached."""
    return CALLS.labels(gateway, operation.value, outcome)


@cache
def checked(gateway: str, subject: str, answer: str) -> Counter:
    """The counter with these labels, cached."""
    return RECONCILED.labels(gateway, subject, answer)


@cache
def result_seconds(command: OperationKind) -> Histogram:
    """The histogram of this kind of command, cached."""
    return RESULT_SECONDS.labels(command.value)


@cache
def call_seconds(gateway: str) -> Histogram:
    """The histogram of this gateway, cached."""
    return CALL_SECONDS.labels(gateway)
