"""What a provider can do, declared by its gateway."""

from dataclasses import dataclass
from datetime import timedelta

from domain.commands import OperationKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a provider can do: what is not declared is refused up front, never emulated."""

    operations: frozenset[OperationKind]
    currencies: frozenset[str]
    partial_capture: bool
    multi_capture: bool
    partial_refund: bool
    idempotency_retention: timedelta
    """How long a repeated provider key surely returns the first answer. Afterwards only a status query is safe."""
