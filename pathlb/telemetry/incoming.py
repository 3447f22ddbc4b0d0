"""The trace a request came with, for the calls made while it is handled."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import Token

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter

Fields = Iterable[tuple[bytes, bytes]]


def join(headers: Fields) -> Token[Context] | None:
    """Make the trace of a request the present one, where there is none; for `leave`. `headers` have lower-case names.

    Nothing happens, and nothing is read, as long as nobody has configured an SDK.
    """
    if getattr(trace, "_TRACER_PROVIDER", None) is None:  # asking the API for the provider is dear while there is none
        return None
    around = otel_context.get_current()
    if trace.get_current_span(around).get_span_context().is_valid:
        return None
    extracted = propagate.extract(headers, around, _GETTER)
    return None if extracted is around else otel_context.attach(extracted)


def leave(token: Token[Context]) -> None:
    otel_context.detach(token)


class _FieldGetter(Getter[Fields]):
    def get(self, carrier: Fields, key: str) -> list[str] | None:
        wanted = key.lower().encode("latin-1")
        return [value.decode("latin-1") for name, value in carrier if name == wanted] or None

    def keys(self, carrier: Fields) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_GETTER = _FieldGetter()
