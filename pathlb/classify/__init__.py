"""From a reply or a failure to an Outcome: what it says, and about whom.

A classifier is a small pure object (`Classifier`). `HTTPClassifier` is the default; `JSONRPCClassifier` looks into
JSON-RPC errors, `PATHClassifier` knows Pocket Network's gateway. Your own:

    class MyClassifier(HTTPClassifier):
        def reply(self, request, reply, body=None):
            if reply.status != 500:
                return self.by_head(reply)
            if body is None:
                return NeedBody(1024)
            if b"backend" in body:  # the gateway is fine, what is behind it is not
                return Outcome(Cause.BEYOND, retry=True, once=True, status=500)
            return self.by_head(reply)

    client = pathlb.AsyncClient(endpoints, classifier=MyClassifier())
"""

from ..core.model import Cause, Outcome
from .base import Classifier, NeedBody
from .http import HTTPClassifier
from .jsonrpc import JSONRPCClassifier
from .path import PATHClassifier
from .prefix import decoded

__all__ = [
    "Cause",
    "Classifier",
    "HTTPClassifier",
    "JSONRPCClassifier",
    "NeedBody",
    "Outcome",
    "PATHClassifier",
    "decoded",
]
