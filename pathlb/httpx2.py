"""pathlb for httpx2 (`pip install pathlb[httpx2]`): the names of `pathlb`, on the other library."""

from .adapters.httpx2 import AsyncClient, BalancedTransport

__all__ = ["AsyncClient", "BalancedTransport"]
