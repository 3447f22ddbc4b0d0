"""What a classifier is: from a request and how it ended to an Outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..core.model import Outcome
from ..errors import UpstreamError
from ..exchange import Reply, Request


@dataclass(frozen=True, slots=True)
class NeedBody:
    """The head does not decide: call again with the first `limit` bytes of the body, or all of it if it is shorter.

    Reading them delays nothing but the verdict: the caller gets the whole body, still streaming.
    """

    limit: int = 8_192


class Classifier(Protocol):
    """Says what replies and failures mean. Pure: the same arguments, the same answer; no I/O, no waiting.

    `pathlb.classify.HTTPClassifier` is the one to derive from. What it raises ends the request.
    """

    def key(self, request: Request, /) -> str | None:
        """The part of the endpoints a request needs (a service id), which has a breaker, an outlier comparison and a
        health of its own on each endpoint; None for none in particular. `Request.key`, if set, is taken instead.
        """

    def reply(self, request: Request, reply: Reply, body: bytes | None = None, /) -> Outcome | NeedBody:
        """The outcome a reply means. `body` is None at first, and what was asked for if that was `NeedBody`, as it
        came (`classify.decoded` undoes a Content-Encoding). The reply's own body must not be touched.
        """

    def failure(self, request: Request, error: UpstreamError, /) -> Outcome:
        """The outcome of a failure without a reply head, or in the middle of a body."""
