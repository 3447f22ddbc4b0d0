"""What spans and metrics share: the instrumentation scope, and how an outcome is named as `error.type`."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from ..core.model import Cause, Outcome
from ..errors import UpstreamError

SCOPE = "pathlb"
SCHEMA_URL = "https://opentelemetry.io/schemas/1.27.0"

ENDPOINT = "pathlb.endpoint"
ERROR_TYPE = "error.type"
OUTCOME = "pathlb.outcome"
SERVICE = "pathlb.service"
RELAYS = "pathlb.relays"
REQUEST_RELAYS = "pathlb.request.relays"
STATUS_CODE = "http.response.status_code"

# A fixed name rather than that of the exception: asyncio and trio have one each, and both causes cancel.
_ABANDONED = {Cause.CANCELLED: "cancelled", Cause.GIVEN_UP: "given_up"}
# A request fault without an error status is an answer; the loser of a hedge failed at nothing.
_NO_ERROR = frozenset({Cause.OK, Cause.REQUEST, Cause.HEDGE_LOST})


@cache
def version() -> str:
    """pathlb's own version, for the instrumentation scope; empty when run from a source tree."""
    try:
        return metadata.version("pathlb")
    except metadata.PackageNotFoundError:
        return ""


def records(given: object) -> bool:
    """Whether a provider or a tracer keeps what it is given: not the API's own stand-ins, there without an SDK.

    The API has no question for this and the stand-in for meters is a private class, so the module that defines the
    class has to tell: no private name is imported, and a wrong guess costs some microseconds or an idle listener.
    """
    return not type(given).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))


def error_type(outcome: Outcome, status: int | None, error: BaseException | None = None) -> str | None:
    """The low-cardinality class of what went wrong, or None when nothing did."""
    if (abandoned := _ABANDONED.get(outcome.cause)) is not None:
        return abandoned
    if status is not None and status >= 400:
        return str(status)
    if outcome.cause in _NO_ERROR:
        return None
    if isinstance(error, UpstreamError):
        return error.fault.value
    if error is not None:
        return type(error).__qualname__
    return outcome.cause.value
