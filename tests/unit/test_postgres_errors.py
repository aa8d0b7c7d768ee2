"""An error of Postgres is blamed on the input or on the server's state, and its text repeats no row."""

import asyncpg
import pytest

from domain.errors import ConcurrentUpdate, InputRefusedByStore, StoreUnavailable
from infra.postgres.errors import translated

# Connections, prepared statements, authorization, databases, resources, object state, operator intervention, system.
OF_THE_SERVER = ("08", "26", "28", "3D", "53", "55", "57", "58")
NOT_OF_AN_INPUT: set[type[asyncpg.PostgresError]] = {
    each
    for each in vars(asyncpg.exceptions).values()
    if isinstance(each, type)
    and issubclass(each, asyncpg.PostgresError)
    and str(each.sqlstate or "").startswith(OF_THE_SERVER)
}
DETAILS = {
    "S": "ERROR",
    "C": "23514",
    "M": 'new row for relation "operations" violates check constraint "operations_state_known"',
    "D": "Failing row contains (42, vault:4f9c, customer-7).",
    "n": "operations_state_known",
}


def test_there_are_such_errors() -> None:
    assert len(NOT_OF_AN_INPUT) > 30


@pytest.mark.parametrize("kind", sorted(NOT_OF_AN_INPUT, key=str))
def test_no_state_of_the_server_is_taken_for_an_inputs_fault(kind: type[Exception]) -> None:
    """Otherwise a command would be parked because a password had changed."""
    with pytest.raises((StoreUnavailable, ConcurrentUpdate)), translated():
        raise kind("so says Postgres")


def test_a_constraint_violation_is_reported_without_the_row() -> None:
    with pytest.raises(InputRefusedByStore) as refused, translated():
        raise asyncpg.PostgresError.new(DETAILS)
    assert str(refused.value) == DETAILS["M"]
