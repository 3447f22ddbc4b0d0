"""What the operating system says in an exception, however deep, and whether it says it about us."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})


def reason_of(error: OSError) -> str:
    """In the system's words, which asyncio replaces by its own without the reason."""
    said = error.strerror or str(error) or type(error).__name__
    if error.errno is None or not isinstance(error, ConnectionError):
        return said
    reason = os.strerror(error.errno)
    return said if reason in said else f"{said}: {reason}"


def is_local(causes: Iterable[BaseException]) -> bool:
    """Whether all that the operating system refused was for lack of descriptors, ports or memory here. One address of
    a name that cannot be used from here does not excuse the others.
    """
    numbers = [cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno is not None]
    return bool(numbers) and all(number in _OUT_OF_RESOURCES for number in numbers)


def causes_of(exc: BaseException) -> Iterator[BaseException]:
    """The exception, what it came from, and the members of groups, down to the operating system's own errors.

    Not beyond those: what they came from in turn is whatever the caller was handling at the time.
    """
    pending: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions
        elif not isinstance(one, OSError) or one.errno is None:
            pending.append(one.__cause__ or one.__context__)
