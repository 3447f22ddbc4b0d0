"""Whether a request may be sent twice, as far as the caller, the method and the headers say; the body only if asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .config import Idempotent
from .exchange import Request
from .jsonrpc.methods import MethodRules

_IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"})


class ResendRule:
    """The rule of one balancer, in this order: the request's own setting, the balancer's `idempotent`, HTTP's methods
    and Idempotency-Key, and for a POST the JSON-RPC methods in its body.
    """

    def __init__(self, idempotent: Idempotent, methods: MethodRules | None) -> None:
        self._idempotent = idempotent
        self._methods = methods

    def resendable(self, request: Request) -> bool | Callable[[], bool]:
        """Whether it may be sent twice, or what to call when the question comes up: parsing a body has its price."""
        if not isinstance(request.body, bytes):
            return False
        if request.idempotent is not None:
            return request.idempotent
        rule = self._idempotent
        if callable(rule):
            rule = rule(request if request.expose is None else request.expose)
        if rule is not None:
            return bool(rule)
        if request.method in _IDEMPOTENT_METHODS:
            return True
        for name, _ in request.headers:
            if len(name) == 15 and name.lower() == b"idempotency-key":
                return True
        if self._methods is None or request.method != "POST":
            return False
        return partial(self._methods.may_send_twice, request.body)
