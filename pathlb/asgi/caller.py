"""The caller of a wrapped app, and noticing that it has left although the app does not look.

ASGI tells of that in `receive`, which is the app's. So what the caller sends goes through a buffer: the app takes from
it, and once a request has been under way for a while somebody reads ahead, as far as 64 KiB of body. Only one of the
two is in the server's `receive` at a time, and nothing is lost when either is cancelled there.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import anyio

from ..deadline import Bound
from ..runner import Work
from .lookout import Lookout
from .types import Message, Receive, Scope, Send

logger = logging.getLogger("pathlb")

_HELD = 65_536  # bytes of a body that are read before the app asks for them
_DISCONNECT = "http.disconnect"


class Caller:
    """One caller's request under way; the app gets `receive` and `send` of this."""

    __slots__ = (
        "_asked",
        "_held",
        "_listening",
        "_lookout",
        "_news",
        "_over",
        "_receive",
        "_scope",
        "_send",
        "_size",
        "_watcher",
        "began",
        "bound",
        "left",
        "watched",
    )

    def __init__(self, lookout: Lookout, scope: Scope, receive: Receive, send: Send, bound: Bound) -> None:
        self._lookout = lookout
        self._scope = scope
        self._receive = receive
        self._send = send
        self.bound = bound
        """What is cancelled when it leaves before it is answered, and lifted when it is answered."""
        self.began = time.monotonic()
        self.left = False
        self.watched = False
        """Somebody reads ahead."""
        self._held: deque[Message] = deque()
        self._size = 0  # of the bodies held
        self._asked = False  # the app has, for a message
        self._listening = False  # somebody is in the server's `receive`
        self._news: anyio.Event | None = None  # for the app, that it can look again
        self._over = False
        self._watcher: anyio.CancelScope | None = None
        lookout.add(self)

    async def receive(self) -> Message:
        """The app's."""
        self._asked = True
        while True:
            if self._held:
                message = self._held.popleft()
                self._size -= len(message.get("body", b""))
                return message
            if self.left:
                return {"type": _DISCONNECT}
            if not self._listening:
                # The app learns of it first: what it does itself about a caller that left comes before the next look.
                return await self._listen()
            if self._news is None:
                self._news = anyio.Event()
            await self._news.wait()

    async def send(self, message: Message) -> None:
        """The app's."""
        kind = message["type"]
        if (kind == "http.response.body" and not message.get("more_body", False)) or kind == "http.response.pathsend":
            self.end()  # first: many servers say of an answered caller that it has left
            self.bound.lift()
        try:
            await self._send(message)
        except OSError:  # what the specification has servers raise
            self.left = True
            raise

    def look(self) -> Work | None:
        """Cancel what is done for a caller that has left, or begin to read ahead."""
        if self.left:
            self.bound.cancel()
        elif self._readable():
            self.watched = True
            return self.watch
        return None

    def _readable(self) -> bool:
        if self.watched or self._listening or self._size > _HELD:
            return False
        # To read is to ask for the body, where the caller waits for that: the app may want to refuse it unseen.
        return self._asked or not any(name == b"expect" for name, _ in self._scope["headers"])

    async def watch(self) -> None:
        """Read ahead until the caller leaves."""
        try:
            with anyio.CancelScope() as self._watcher:
                while not self._over and not self._listening and self._size <= _HELD:
                    message = await self._listen()
                    if self.left:
                        if not self._over:
                            self.bound.cancel()
                        break
                    self._held.append(message)
                    self._size += len(message.get("body", b""))
        except Exception:  # the app will meet it too, if it asks
            logger.debug("reading ahead of an app failed", exc_info=True)
            return
        self.watched = False

    def end(self) -> None:
        """It is answered, or over: nobody need read ahead any more. Ending twice is fine."""
        if self._over:
            return
        self._over = True
        self._lookout.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()

    async def _listen(self) -> Message:
        self._listening = True
        try:
            message = await self._receive()
        finally:
            self._listening = False
            news, self._news = self._news, None
            if news is not None:
                news.set()
        if message["type"] == _DISCONNECT:
            self.left = True
        return message
