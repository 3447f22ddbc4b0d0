"""A FastAPI service that calls several gateway instances: one Balancer, owned by the app's lifespan.

    GATEWAY_URLS="http://10.0.0.1:3069 http://10.0.0.2:3069" uvicorn --app-dir examples fastapi_service:app

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
from pathlb.testing import Fleet

LOCAL_GATEWAYS = [f"http://127.0.0.1:{port}" for port in range(3069, 3074)]


def gateway(request: Request) -> pathlb.AsyncClient:
    """The client every handler shares; FastAPI calls this for each request."""
    client = request.app.state.gateway
    assert isinstance(client, pathlb.AsyncClient)
    return client


Gateway = Annotated[pathlb.AsyncClient, Depends(gateway)]


def create_app(gateway_urls: list[str]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Made here and not at import: after the fork of a worker process, on the event loop it will be used on.
        async with pathlb.Balancer(gateway_urls, idempotent=True) as balancer, pathlb.AsyncClient(balancer) as client:
            app.state.gateway = client
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/{service}/height")
    async def height(service: str, client: Gateway) -> dict[str, Any]:
        call = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}
        try:
            response = await client.post("/v1", json=call, headers={"Target-Service-Id": service})
            response.raise_for_status()
        except httpx.HTTPError as exc:  # pathlb's errors are httpx's too
            raise HTTPException(502, f"no gateway answered: {exc}") from exc
        return {"service": service, "height": response.json()["result"]}

    @app.get("/gateways")
    async def gateways(client: Gateway) -> dict[str, Any]:
        return client.balancer.snapshot().to_dict()

    return app


app = create_app(os.environ.get("GATEWAY_URLS", "").split() or LOCAL_GATEWAYS)


async def main(gateway_urls: list[str]) -> None:
    server = uvicorn.Server(uvicorn.Config(create_app(gateway_urls), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        # The socket listens already: what comes before the service is up waits in its backlog.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as caller:
            print((await caller.get("/eth/height")).json())
            for endpoint in (await caller.get("/gateways")).json()["endpoints"]:
                print(f"{endpoint['url']}  {endpoint['state']}, {endpoint['counts']['ok']} ok")
        server.should_exit = True
        await serving


if __name__ == "__main__":
    with Fleet(3) as fleet:
        asyncio.run(main(fleet.urls))
