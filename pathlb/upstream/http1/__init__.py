"""pathlb's own HTTP/1.1: the connections to one endpoint, on asyncio and httptools.

A request goes `upstream` (which connection) -> `head`, `sending` (bytes out) -> `connection` -> `reading` (bytes in) ->
`reply` (head and body). `dial` makes connections; `network_stream` is what one becomes after a 101.
"""

from .settings import Pool
from .upstream import Http1Upstream

__all__ = ["Http1Upstream", "Pool"]
