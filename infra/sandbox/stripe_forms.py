"""Form bodies and queries with nested names, as Stripe's clients send them: `metadata[order]=7`, `expand[0]=x`."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from infra.sandbox.stripe_errors import invalid

Params = dict[str, Any]


def parse(encoded: str) -> Params:
    """Nested maps of strings. A list keeps its indices as keys; read it with `values`.

    Raises:
        StripeError: a name is a value in one place and a map in another.
    """
    params: Params = {}
    for name, value in parse_qsl(encoded, keep_blank_values=True):
        *path, last = _path(name)
        level = params
        for key in path:
            level = level.setdefault(key, {})
            if not isinstance(level, dict):
                raise invalid(f"Invalid parameter: {name}", param=name)
        level[last or str(len(level))] = value
    return params


@lru_cache(maxsize=1024)
def _path(name: str) -> tuple[str, ...]:
    head, bracket, _ = name.partition("[")
    return (head, *re.findall(r"\[([^\]]*)\]", name)) if bracket else (head,)


def allow(params: Params, names: Iterable[str]) -> None:
    """Refuse parameters that the endpoint does not have, as Stripe does."""
    for name in params.keys() - set(names):
        raise invalid(f"Received unknown parameter: {name}", param=name, code="parameter_unknown")


def integer(params: Params, name: str, *, minimum: int = 1, default: int | None = None) -> int:
    """An integer parameter; required unless it has a default."""
    text = params.get(name)
    if text is None:
        if default is None:
            raise invalid(f"Missing required param: {name}.", param=name, code="parameter_missing")
        return default
    try:
        value = int(text)
    except (TypeError, ValueError):
        raise invalid(f"Invalid integer: {text}", param=name, code="parameter_invalid_integer") from None
    if value < minimum:
        message = f"This value must be greater than or equal to {minimum}."
        raise invalid(message, param=name, code="parameter_invalid_integer")
    return value


def boolean(params: Params, name: str, *, default: bool) -> bool:
    match params.get(name):
        case None:
            return default
        case "true":
            return True
        case "false":
            return False
        case other:
            raise invalid(f"Invalid boolean: {other}", param=name)


def choice(params: Params, name: str, allowed: Iterable[str], *, default: str | None = None) -> str | None:
    value = params.get(name, default)
    if value is not None and value not in allowed:
        raise invalid(f"Invalid {name}: must be one of {', '.join(allowed)}", param=name)
    return value


def values(params: Params, name: str) -> list[str]:
    """A list parameter, in order."""
    listed = params.get(name, {})
    return list(listed.values()) if isinstance(listed, dict) else [listed]


def metadata(params: Params) -> dict[str, str]:
    """Metadata within Stripe's limits. Source: https://docs.stripe.com/api/metadata."""
    given = params.get("metadata") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise invalid("Invalid metadata: must be a map of strings", param="metadata")
    if len(given) > 50:
        raise invalid("You cannot have more than 50 metadata keys", param="metadata")
    for key, value in given.items():
        if len(key) > 40 or len(value) > 500:
            raise invalid("Metadata keys take 40 characters and values 500", param=f"metadata[{key}]")
    return given
