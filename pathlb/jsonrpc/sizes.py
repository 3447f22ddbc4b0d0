"""Requests larger than the endpoints take are refused before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestTooLarge


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """What the endpoints take in one request: `items` of a batch, `size` of a body in bytes; None is no limit."""

    items: int | None
    size: int | None

    def check_items(self, count: int) -> None:
        """Raise `RequestTooLarge` for a batch of too many items."""
        if self.items is not None and count > self.items:
            raise RequestTooLarge(
                f"the batch has {count} items and the endpoints take {self.items} (JSONRPC.max_batch): send smaller "
                "batches, or have batches of reads sent in parts with JSONRPC(split=...); nothing was sent"
            )

    def check_size(self, size: int) -> None:
        """Raise `RequestTooLarge` for a body of too many bytes."""
        if self.size is not None and size > self.size:
            raise RequestTooLarge(
                f"the body has {size} bytes and the endpoints take {self.size} (JSONRPC.max_body): send less at once, "
                "or have batches of reads sent in (smaller) parts with JSONRPC(split=...); nothing was sent"
            )
