"""The openai SDK over several model servers, one of which is killed with requests in flight.

    python examples/openai_sdk.py http://10.0.0.1:8000 http://10.0.0.2:8000

Without URLs it starts three servers of its own that answer chat completions, streamed or whole. openai 3 is built on
httpx2, so the client is `pathlb.httpx2`'s (`pip install pathlb[httpx2]`).
"""

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
from openai import AsyncOpenAI

import pathlb.httpx2

WORDS = ["The ", "answer ", "is ", "42."]


async def main(urls: list[str], kill_one: Callable[[], None] | None = None) -> None:
    attempts: Counter[int] = Counter()

    async def count(response: httpx2.Response) -> None:
        attempts[len(response.extensions["pathlb"]["attempts"])] += 1

    client = AsyncOpenAI(
        api_key="not needed here",
        base_url="http://model-servers/v1",
        # pathlb retries, elsewhere; the SDK must not do it a second time.
        max_retries=0,
        http_client=pathlb.httpx2.AsyncClient(
            urls,
            base_url="http://model-servers/v1",
            # To ask a model twice costs a little and changes nothing; by itself pathlb would not send a POST again.
            idempotent=True,
            event_hooks={"response": [count]},
        ),
    )
    async with client:

        async def ask(question: str) -> str:
            reply = await client.chat.completions.create(
                model="emulated", messages=[{"role": "user", "content": question}]
            )
            return reply.choices[0].message.content or ""

        asked = [asyncio.create_task(ask(f"question {number}")) for number in range(20)]
        if kill_one is not None:
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            kill_one()  # the others are under way
        answers = await asyncio.gather(*asked)
        print(f"{len(answers)} of {len(asked)} answered, {attempts[2]} of them at the second attempt: {answers[0]}")

        # A stream is retried up to its first byte. After that half an answer is out, and it fails like any other.
        stream = await client.chat.completions.create(
            model="emulated", messages=[{"role": "user", "content": "slowly, please"}], stream=True
        )
        async for chunk in stream:
            print("streamed:", chunk.choices[0].delta.content)


class ModelServer:
    """Just enough of an OpenAI-compatible server, and a way to kill it."""

    def __init__(self) -> None:
        self.url = ""
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._questions = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def kill(self) -> None:
        """No new connections, and the existing ones break."""
        if self._server is not None:
            self._server.close()
        for writer in self._connections.values():
            writer.transport.abort()

    async def aclose(self) -> None:
        self.kill()
        await asyncio.gather(*self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
                question = json.loads(await reader.readexactly(length))
                if question.get("stream"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
                    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
                    for event in [*map(_chunk, WORDS), "[DONE]"]:
                        data = f"data: {event}\n\n".encode()
                        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                        await writer.drain()
                    writer.write(b"0\r\n\r\n")
                else:
                    self._questions += 1
                    await asyncio.sleep(0.02 * self._questions)  # the more it is asked, the longer it thinks
                    data = _completion("".join(WORDS)).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        del self._connections[task]
        writer.close()


def _completion(text: str) -> str:
    return _render("chat.completion", {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"})


def _chunk(word: str) -> str:
    return _render("chat.completion.chunk", {"delta": {"content": word}, "finish_reason": None})


def _render(kind: str, choice: dict[str, Any]) -> str:
    return json.dumps(
        {"id": "1", "object": kind, "created": 0, "model": "emulated", "choices": [{"index": 0, **choice}]}
    )


@contextlib.asynccontextmanager
async def model_servers(count: int) -> AsyncIterator[list[ModelServer]]:
    servers = [ModelServer() for _ in range(count)]
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        await server.aclose()


async def main_alone() -> None:
    async with model_servers(3) as servers:
        await main([server.url for server in servers], kill_one=servers[0].kill)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]) if len(sys.argv) > 1 else main_alone())
