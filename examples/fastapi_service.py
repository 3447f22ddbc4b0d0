"""A FastAPI service that calls several gateway instances: one Balancer, which the middleware starts, shares and closes.

    GATEWAY_URLS="http://10.0.0.1:3069 http://10.0.0.2:3069" uvicorn --app-dir examples fastapi_service:app

A caller says with X-Request-Timeout how many seconds it waits, and what it does not wait for any more is cancelled.
Run as a program it starts three emulated gateways, serves itself on a free port and calls itself.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request

import pathlb
from pathlb.asgi import BalancerMiddleware
from pathlb.testing import Fleet

LOCAL_GATEWAYS = [f"http://127.0.0.1:{port}" for port in range(3069, 3074)]


def gateway(request: Request) -> pathlb.AsyncClient:
    """The client every handler shares; FastAPI calls this for each request."""
    client = request.state.gateway
    assert isinstance(client, pathlb.AsyncClient)
    return client


def balancer(request: Request) -> pathlb.Balancer:
    """The balancer under it, where the middleware puts it."""
    shared = request.state.balancer
    assert isinstance(shared, pathlb.Balancer)
    return shared


Gateway = Annotated[pathlb.AsyncClient, Depends(gateway)]
Balancer = Annotated[pathlb.Balancer, Depends(balancer)]


def create_app(gateway_urls: list[str]) -> FastAPI:
    # It starts with the app's lifespan, or with its first request: in the worker process, on the loop it is used on.
    shared = pathlb.Balancer(gateway_urls, idempotent=True)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with pathlb.AsyncClient(shared) as client:
            yield {"gateway": client}

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(
        BalancerMiddleware, balancers=shared, deadline_header="X-Request-Timeout", concurrency=500, queue=1_000
    )

    @app.get("/{service}/height")
    async def height(service: str, client: Gateway) -> dict[str, Any]:
        call = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}
        try:
            response = await client.post("/v1", json=call, headers={"Target-Service-Id": service})
            response.raise_for_status()
        except pathlb.DeadlineExceeded as exc:
            raise HTTPException(504, "no gateway answered in time") from exc
        except httpx.HTTPError as exc:  # pathlb's errors are httpx's too
            raise HTTPException(502, f"no gateway answered: {exc}") from exc
        return {"service": service, "height": response.json()["result"]}

    @app.get("/gateways")
    async def gateways(balancer: Balancer) -> dict[str, Any]:
        return balancer.snapshot().to_dict()

    return app


app = create_app(os.environ.get("GATEWAY_URLS", "").split() or LOCAL_GATEWAYS)


async def main(gateway_urls: list[str]) -> None:
    server = uvicorn.Server(uvicorn.Config(create_app(gateway_urls), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        # The socket listens already: what comes before the service is up waits in its backlog.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as caller:
            print((await caller.get("/eth/height", headers={"X-Request-Timeout": "2.5"})).json())
            for endpoint in (await caller.get("/gateways")).json()["endpoints"]:
                print(f"{endpoint['url']}  {endpoint['state']}, {endpoint['counts']['ok']} ok")
        server.should_exit = True
        await serving


if __name__ == "__main__":
    with Fleet(3) as fleet:
        asyncio.run(main(fleet.urls))
