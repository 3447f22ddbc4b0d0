"""The block height an endpoint tells in passing."""

from __future__ import annotations

import json

from ..exchange import Reply, Request, WholeBody

_METHOD = b'"eth_blockNumber"'
_SHORT = 512  # bytes of a request, and of an answer, that may be one of it


def told_height(request: Request, reply: Reply) -> int | None:
    """What an `eth_blockNumber` was answered with, if the answer is here; None for everything else."""
    body = request.body
    if not isinstance(body, bytes) or len(body) > _SHORT or _METHOD not in body or reply.status != 200:
        return None
    if not isinstance(reply.body, WholeBody) or len(reply.body.content) > _SHORT:
        return None
    try:
        if json.loads(body)["method"] != "eth_blockNumber":
            return None
        return int(json.loads(reply.body.content)["result"], 16)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
