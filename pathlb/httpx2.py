"""The clients for httpx2 (`pip install 'pathlb[httpx2]'`); everything else is in `pathlb`, the same for both.

A `Balancer` made by hand reaches its endpoints through httpx, whoever uses it, unless it is told otherwise:
`Balancer(urls, upstream=pathlb.TransportUpstreams(stack=httpx2))`.
"""

from .adapters.httpx2 import AsyncClient, BalancedTransport

__all__ = ["AsyncClient", "BalancedTransport"]
