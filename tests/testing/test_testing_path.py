"""What a fleet with services takes over from PATH, one route or mode a test, over real sockets."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pathlb.testing import Fleet, FleetGateway, Mode, ServiceMode, ServiceTime

INSTANT = ServiceTime.constant(0)
TRANSACTION = "0xf86c"


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet(2, path=["eth", "solana"], service_time=INSTANT) as fleet:
        yield fleet


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def processes(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def call(method: str, *params: Any, id: Any = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": list(params)}


def post(
    client: httpx.Client, gateway: FleetGateway, body: Any, service: str = "eth", **headers: str
) -> httpx.Response:
    return client.post(f"{gateway.url}/v1", json=body, headers={"Target-Service-Id": service} | headers)


def ask(gateway: FleetGateway, body: Any, service: str = "eth") -> socket.socket:
    """Send a request and do not wait for the reply."""
    content = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    head = f"POST /v1 HTTP/1.1\r\nHost: x\r\nTarget-Service-Id: {service}\r\nContent-Length: {len(content)}\r\n\r\n"
    sock.sendall(head.encode() + content)
    return sock


def until_relayed(gateway: FleetGateway, count: int) -> None:
    while gateway.stats().relays != count:
        pass


def tried(reply: httpx.Response) -> list[str]:
    return [supplier for supplier in reply.headers["x-suppliers-tried"].split(",") if supplier]


def error(reply: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = reply.json()["error"]
    return found


# relays


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/some/path?q=1"])
def test_a_call_is_relayed_to_one_supplier(client: httpx.Client, fleet: Fleet, path: str) -> None:
    headers = {"Target-Service-Id": "eth"}
    reply = client.post(fleet[1].url + path, json=call("eth_call", {"to": "0x1"}, id="a"), headers=headers)
    assert reply.status_code == 200
    assert reply.json() == {
        "jsonrpc": "2.0",
        "id": "a",
        "result": {"method": "eth_call", "params": [{"to": "0x1"}]},
    }
    (supplier,) = tried(reply)
    relay_headers = {name: value for name, value in reply.headers.items() if name.startswith("x-")}
    assert relay_headers == {
        "x-gateway": "gateway-1",
        "x-archival-request": "false",
        "x-retry-count": "0",
        "x-suppliers-tried": supplier,
        "x-hedge-result": "primary_only",
        "x-app-address": "pokt1application",
        "x-supplier-address": supplier,
        "x-session-id": "session-eth",
    }
    assert [gateway.stats().relays for gateway in fleet] == [0, 1]


def test_the_suppliers_are_the_same_behind_every_gateway(client: httpx.Client) -> None:
    with Fleet(2, path=["eth"], suppliers=3, service_time=INSTANT) as fleet:
        seen = [{tried(post(client, gateway, call("x")))[0] for _ in range(50)} for gateway in fleet]
        assert seen[0] == seen[1]
        assert len(seen[0]) == 3


def test_a_batch_is_one_relay_an_item_and_keeps_no_order(client: httpx.Client, fleet: Fleet) -> None:
    replies = [post(client, fleet[0], [call("x", id=number) for number in range(8)]) for _ in range(3)]
    orders = [[item["id"] for item in reply.json()] for reply in replies]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert any(order != list(range(8)) for order in orders)
    assert fleet[0].stats().relays == 24
    assert replies[0].headers["x-retry-count"] == "0"
    assert set(tried(replies[0])) <= {f"pokt1supplier{index}" for index in range(5)}
    assert not {"x-supplier-address", "x-hedge-result"} & set(replies[0].headers)


def test_a_batch_of_one_is_a_single_relay_answered_as_a_batch(client: httpx.Client, fleet: Fleet) -> None:
    reply = post(client, fleet[0], [call("eth_chainId", id=7)])
    assert reply.json() == [{"jsonrpc": "2.0", "id": 7, "result": "0x1"}]
    assert len(tried(reply)) == 1


# what PATH refuses


@pytest.mark.parametrize("headers", [{}, {"Target-Service-Id": ""}])
def test_a_missing_service_is_a_400_of_its_own_shape(
    client: httpx.Client, fleet: Fleet, headers: dict[str, str]
) -> None:
    reply = client.post(f"{fleet[0].url}/v1", json=call("x"), headers=headers)
    assert reply.status_code == 400
    assert reply.json() == {
        "code": 400,
        "message": "no service ID provided in 'Target-Service-Id' header: no service ID provided",
    }
    assert tried(reply) == []


@pytest.mark.parametrize("service", ["near", "eth"])
def test_a_service_that_is_not_configured(client: httpx.Client, fleet: Fleet, service: str) -> None:
    fleet[0].set_service("eth", ServiceMode.NOT_CONFIGURED)
    reply = post(client, fleet[0], call("x"), service)
    assert reply.status_code == 400
    assert reply.json() == {
        "jsonrpc": "2.0",
        "id": None,
        "error": {
            "code": -32600,
            "message": f"Service '{service}' is not configured",
            "data": {"available_services": ["solana"], "service_id": service},
        },
    }
    assert reply.headers["x-suppliers-tried"] == ""
    assert fleet[0].stats().relays == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "invalid request: "),
        (b"\xff", "invalid request: "),
        (b" ", "invalid request: empty request body"),
        (b"[]", "invalid request: empty batch request not allowed"),
        (b"[1]", "invalid request: json: cannot unmarshal"),
        (b'{"id":1.5}', "invalid request: json: cannot unmarshal"),
    ],
)
def test_what_is_no_json_rpc_is_a_400(client: httpx.Client, fleet: Fleet, content: bytes, message: str) -> None:
    reply = client.post(f"{fleet[0].url}/v1", content=content, headers={"Target-Service-Id": "eth"})
    assert reply.status_code == 400
    assert reply.json()["id"] is None
    assert error(reply)["code"] == -32600
    assert error(reply)["message"].startswith(message)
    assert error(reply)["data"]["retryable"] == "false"
    assert tried(reply) == []


def test_other_rpc_types_are_a_400(client: httpx.Client, fleet: Fleet) -> None:
    assert post(client, fleet[0], call("x"), "eth", **{"RPC-Type": "json_rpc"}).status_code == 200
    told = post(client, fleet[0], call("x"), "eth", **{"RPC-Type": "rest"})
    undetected = client.get(f"{fleet[0].url}/v1/block", headers={"Target-Service-Id": "eth"})
    for reply in (told, undetected):
        assert reply.status_code == 400
        assert error(reply)["code"] == -32600
        assert error(reply)["message"].startswith("Failed to detect RPC type: ")
        assert error(reply)["data"]["allowed_rpc_types"] == ["json_rpc", "websocket"]


def test_a_body_over_75_mib_is_a_500_that_ends_the_connection(client: httpx.Client, fleet: Fleet) -> None:
    content = b"[" + b" " * (75 * 1024 * 1024)
    reply = client.post(f"{fleet[0].url}/v1", content=content, headers={"Target-Service-Id": "eth"})
    assert reply.status_code == 500
    assert error(reply)["code"] == -31001
    assert error(reply)["message"] == "internal error: request body exceeds 104857600 bytes limit"
    assert tried(reply) == []
    assert reply.headers["connection"] == "close"


def test_a_batch_over_5500_items_is_a_500(client: httpx.Client, fleet: Fleet) -> None:
    reply = post(client, fleet[0], [{}] * 5501)
    assert reply.status_code == 500
    assert reply.json()["id"] is None
    assert error(reply)["code"] == -31001
    assert error(reply)["message"].startswith("Failed to receive any response from endpoints.")
    assert tried(reply) == []
    assert fleet[0].stats().relays == 0


def test_a_websocket_is_refused_by_an_empty_200(client: httpx.Client, fleet: Fleet) -> None:
    headers = {"Target-Service-Id": "eth", "Connection": "Upgrade", "Upgrade": "websocket"}
    reply = client.get(f"{fleet[0].url}/v1", headers=headers)
    assert (reply.status_code, reply.content) == (200, b"")
    assert "x-suppliers-tried" not in reply.headers


# how services fare


def test_no_session_is_one_services_on_one_instance(client: httpx.Client, fleet: Fleet) -> None:
    fleet[0].set_service("eth", ServiceMode.NO_SESSION)
    reply = post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION, id=9))
    why = "no active sessions could be retrieved for the service: service eth"
    assert reply.status_code == 500
    assert reply.json() == {
        "jsonrpc": "2.0",
        "id": 9,
        "error": {
            "code": -31001,
            "message": f"internal error: {why}",
            "data": {"error": why, "retryable": "true"},
        },
    }
    assert reply.headers["x-suppliers-tried"] == ""
    assert reply.headers["x-retry-count"] == "0"
    assert post(client, fleet[0], [call("x"), call("y")]).json()["id"] is None
    assert fleet.transactions() == {}
    assert fleet[0].stats().relays == 0
    assert post(client, fleet[0], call("x"), "solana").status_code == 200
    assert post(client, fleet[1], call("x")).status_code == 200
    fleet.set_service("eth", ServiceMode.OK)
    assert post(client, fleet[0], call("x")).status_code == 200


def test_failing_suppliers_are_retried_once_and_listed(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL)
    reply = post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION))
    assert reply.status_code == 500
    assert reply.json()["id"] == 1
    assert error(reply)["code"] == -31001
    assert error(reply)["message"].startswith("internal error: relay: error sending relay for service eth endpoint ")
    assert reply.headers["x-retry-count"] == "1"
    assert len(set(tried(reply))) == 2
    assert "x-supplier-address" not in reply.headers
    assert fleet[0].stats().relays == 2
    assert fleet.transactions() == {TRANSACTION: 1}, "one request, whatever the gateway's own retry"


def test_a_share_of_the_relays_fails_and_the_retry_answers(client: httpx.Client) -> None:
    def run() -> list[tuple[int, str]]:
        with Fleet(1, path=["eth"], service_time=INSTANT, seed=3) as fleet:
            fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL, share=0.5)
            replies = [post(client, fleet[0], call("x")) for _ in range(60)]
            assert all(len(tried(reply)) == int(reply.headers["x-retry-count"]) + 1 for reply in replies)
            assert all(reply.headers["x-supplier-address"] == tried(reply)[-1] for reply in replies if reply.is_success)
            assert fleet[0].stats().relays == sum(len(tried(reply)) for reply in replies)
            return [(reply.status_code, reply.headers["x-retry-count"]) for reply in replies]

    outcomes = run()
    assert set(outcomes) == {(200, "0"), (200, "1"), (500, "1")}
    assert Counter(outcomes)[200, "0"] == pytest.approx(30, abs=12)
    assert run() == outcomes


def test_a_share_of_the_requests_is_befallen(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.CHAIN_ERROR, share=0.5)
    failed = ["error" in post(client, fleet[0], call("x")).json() for _ in range(40)]
    assert set(failed) == {True, False}
    fleet.set_service("eth", ServiceMode.CHAIN_ERROR, share=0)
    assert "result" in post(client, fleet[0], call("x")).json()


def test_a_rate_limit_is_passed_through(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.RATE_LIMITED)
    reply = post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION))
    assert reply.status_code == 429
    assert reply.json() == {"error": "too many requests"}
    assert "retry-after" not in reply.headers
    assert len(tried(reply)) == 2
    assert fleet.transactions() == {}


def test_a_lost_answer_is_an_empty_200(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("solana", ServiceMode.EMPTY)
    reply = post(client, fleet[0], call("getSlot"), "solana")
    assert reply.status_code == 200
    assert reply.content == b""
    assert len(tried(reply)) == 2


def test_the_chains_verdict_is_a_200(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.CHAIN_ERROR)
    reply = post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION, id=4))
    assert reply.status_code == 200
    assert reply.json() == {"jsonrpc": "2.0", "id": 4, "error": {"code": 3, "message": "execution reverted"}}
    assert len(tried(reply)) == 1
    assert fleet.transactions() == {}


def test_a_slow_service_leaves_the_others_as_they_are(client: httpx.Client) -> None:
    with Fleet(1, path=["eth", "solana"], service_time=ServiceTime.constant(0.001)) as fleet:
        fleet.set_service("eth", ServiceMode.SLOW, factor=1e7)
        with ask(fleet[0], call("eth_sendRawTransaction", TRANSACTION)):
            until_relayed(fleet[0], 1)
            assert post(client, fleet[0], call("getSlot"), "solana").status_code == 200
            assert fleet[0].stats().in_flight == 1
            assert fleet.transactions() == {TRANSACTION: 1}


def test_a_hanging_service_relays_and_never_answers(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.HANG)
    with ask(fleet[0], call("eth_sendRawTransaction", TRANSACTION)):
        until_relayed(fleet[0], 1)
        fleet.set_service("eth", ServiceMode.OK)
        assert post(client, fleet[0], call("x")).status_code == 200
        assert fleet[0].stats().in_flight == 1
        assert fleet.transactions() == {TRANSACTION: 1}


def test_a_batch_that_lost_some_items_is_a_500(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL, share=0.7)
    reply = post(client, fleet[0], [call("eth_sendRawTransaction", f"0x{number:02x}") for number in range(40)])
    assert reply.status_code == 500
    assert reply.json()["id"] is None
    assert error(reply)["message"].startswith(
        "Failed to marshal batch response: batch response length mismatch: expected 40 responses, got "
    )
    assert reply.headers["x-retry-count"] == "0"
    assert set(fleet.transactions().values()) == {1}
    assert len(fleet.transactions()) == 40


def test_a_batch_that_lost_all_items_is_an_empty_200(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL)
    for size in (1, 3):
        reply = post(client, fleet[0], [call("x")] * size)
        assert reply.status_code == 200
        assert reply.content == b""
        assert tried(reply)


# the operational routes


def test_liveness(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.NO_SESSION)
    health = client.get(f"{fleet[0].url}/health")
    assert (health.status_code, health.content) == (200, b"")
    assert "x-suppliers-tried" not in health.headers
    healthz = client.get(f"{fleet[0].url}/healthz")
    assert healthz.status_code == 200
    assert healthz.json()["status"] == "ready"
    assert healthz.json()["readyStates"] == {"pokt-shannon": True}
    assert healthz.json()["configuredServiceIDs"] == ["eth", "solana"]


def test_readiness_is_by_service_and_of_all_of_them(client: httpx.Client, fleet: Fleet) -> None:
    def ready(path: str) -> tuple[int, dict[str, Any]]:
        reply = client.get(fleet[0].url + path)
        return reply.status_code, reply.json()

    well = {"ready": True, "endpoint_count": 5, "has_session": True}
    assert ready("/ready") == (200, {"ready": True, "services": {"eth": well, "solana": well}})
    assert ready("/ready/eth") == (200, {"ready": True, "services": {"eth": well}})
    fleet[0].set_service("eth", ServiceMode.NO_SESSION)
    why = "no active sessions could be retrieved for the service: service eth"
    ill = {"ready": False, "endpoint_count": 0, "has_session": False, "error": why}
    assert ready("/ready/eth") == (503, {"ready": False, "services": {"eth": ill}})
    assert ready("/ready") == (503, {"ready": False, "services": {"eth": ill, "solana": well}})
    assert ready("/ready/solana")[0] == 200
    assert client.get(f"{fleet[1].url}/ready").status_code == 200


def test_readiness_knows_nothing_of_a_service_that_is_not_configured(client: httpx.Client, fleet: Fleet) -> None:
    fleet[0].set_service("eth", ServiceMode.NOT_CONFIGURED)
    for service in ("eth", "near"):
        reply = client.get(f"{fleet[0].url}/ready/{service}")
        assert reply.status_code == 503
        assert reply.json()["services"][service]["error"] == f"ZERO owned apps found for service: {service}"
    assert client.get(f"{fleet[0].url}/ready").json()["services"].keys() == {"solana"}
    fleet[0].set_service("solana", ServiceMode.NOT_CONFIGURED)
    reply = client.get(f"{fleet[0].url}/ready")
    assert (reply.status_code, reply.json()) == (503, {"ready": False, "message": "no services configured"})


def test_readiness_does_not_see_failing_suppliers(client: httpx.Client, fleet: Fleet) -> None:
    fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL)
    assert client.get(f"{fleet[0].url}/ready/eth").status_code == 200


def test_detailed_readiness_tells_the_height(client: httpx.Client, fleet: Fleet) -> None:
    fleet[0].set_height(20)
    heights = [
        client.get(f"{gateway.url}/ready/eth?detailed=true").json()["services"]["eth"]["perceived_block_height"]
        for gateway in fleet
    ]
    assert heights == [20, 1000]
    assert post(client, fleet[0], call("eth_blockNumber")).json()["result"] == "0x14"
    info = client.get(f"{fleet[0].url}/ready?detailed=true").json()["services"]["solana"]
    assert (info["median_block_height"], info["block_observations"]) == (20, 5)
    assert [endpoint["supplier_address"] for endpoint in info["endpoints"]] == [f"pokt1supplier{i}" for i in range(5)]
    assert "perceived_block_height" not in client.get(f"{fleet[0].url}/ready/eth?detailed=1").json()["services"]["eth"]


def test_disqualified_endpoints(client: httpx.Client, fleet: Fleet) -> None:
    def ask_for(service: str) -> httpx.Response:
        return client.get(f"{fleet[0].url}/disqualified_endpoints", headers={"Target-Service-Id": service})

    assert ask_for("eth").json()["total_service_endpoints_count"] == 5
    assert ask_for("").json() == {"error": "400 Bad Request", "message": "Target-Service-Id header is required"}
    assert ask_for("near").status_code == 400


@pytest.mark.parametrize("path", ["/", "/v2", "/v1x", "/metrics", "/readyz"])
def test_other_routes_are_a_404(client: httpx.Client, fleet: Fleet, path: str) -> None:
    reply = client.post(fleet[0].url + path, json=call("x"), headers={"Target-Service-Id": "eth"})
    assert (reply.status_code, reply.content) == (404, b"404 page not found\n")
    assert "x-suppliers-tried" not in reply.headers


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ready", "/ready/eth", "/disqualified_endpoints"])
def test_operational_routes_are_for_get_only(client: httpx.Client, fleet: Fleet, path: str) -> None:
    posted = client.post(fleet[0].url + path)
    assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")
    assert client.head(fleet[0].url + path).status_code == 405
    assert client.head(fleet[0].url + path).content == b""


# the chain


def test_a_transaction_is_counted_and_then_known_to_its_gateway(client: httpx.Client, fleet: Fleet) -> None:
    sent = call("eth_sendRawTransaction", TRANSACTION)
    first = post(client, fleet[0], sent).json()["result"]
    assert first.startswith("0x")
    assert len(first) == 66
    again = post(client, fleet[0], sent)
    assert again.status_code == 200
    assert error(again) == {"code": -32000, "message": "already known"}
    assert post(client, fleet[1], sent).json()["result"] == first
    assert fleet.transactions() == {TRANSACTION: 3}
    assert fleet[0].transactions() == {TRANSACTION: 2}
    assert error(post(client, fleet[0], call("eth_sendRawTransaction")))["code"] == -32602


@pytest.mark.parametrize("method", ["eth_newFilter", "eth_newBlockFilter"])
def test_a_filter_is_known_to_its_gateway_only(client: httpx.Client, fleet: Fleet, method: str) -> None:
    made = post(client, fleet[0], call(method, {})).json()["result"]
    assert post(client, fleet[0], call("eth_getFilterChanges", made)).json()["result"] == []
    for used in ("eth_getFilterChanges", "eth_uninstallFilter"):
        reply = post(client, fleet[1], call(used, made))
        assert error(reply) == {"code": -32000, "message": "filter not found"}
    assert post(client, fleet[0], call("eth_uninstallFilter", made)).json()["result"] is True
    assert "error" in post(client, fleet[0], call("eth_getFilterChanges", made)).json()


def test_another_chain_can_answer(client: httpx.Client) -> None:
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        if asked["method"] == "wrong":
            raise LookupError("no such thing")
        return {"jsonrpc": "2.0", "id": asked["id"], "result": asked["params"]}

    with Fleet(1, path=["eth"], service_time=INSTANT, answer=answer) as fleet:
        assert post(client, fleet[0], call("eth_blockNumber", 5)).json()["result"] == [5]
        assert post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION)).json()["result"] == [TRANSACTION]
        assert fleet.transactions() == {TRANSACTION: 1}
        reply = post(client, fleet[0], call("wrong"))
        assert error(reply) == {"code": -32603, "message": "LookupError('no such thing')"}


# the modes of the instance


def test_a_failing_instance_answers_without_paths_headers(client: httpx.Client, fleet: Fleet) -> None:
    fleet[0].set_mode(Mode.FAIL, status=502)
    reply = post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION))
    assert reply.status_code == 502
    assert "x-suppliers-tried" not in reply.headers
    assert client.get(f"{fleet[0].url}/ready").status_code == 502
    assert fleet.transactions() == {}


def test_a_throttling_instance_answers_without_paths_headers(client: httpx.Client, fleet: Fleet) -> None:
    fleet[0].set_mode(Mode.THROTTLE)
    reply = post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION))
    assert reply.status_code == 429
    assert "x-suppliers-tried" not in reply.headers
    assert client.get(f"{fleet[0].url}/ready").status_code == 200
    assert fleet.transactions() == {}


def test_a_reset_comes_after_the_relay(client: httpx.Client, fleet: Fleet) -> None:
    fleet[0].set_mode(Mode.RESET)
    with pytest.raises(httpx.TransportError):
        post(client, fleet[0], call("eth_sendRawTransaction", TRANSACTION))
    assert fleet.transactions() == {TRANSACTION: 1}
    with pytest.raises(httpx.TransportError):
        client.get(f"{fleet[0].url}/ready")


def test_a_hanging_instance_has_relayed(fleet: Fleet) -> None:
    fleet[0].set_mode(Mode.HANG)
    with ask(fleet[0], call("eth_sendRawTransaction", TRANSACTION)) as sock:
        until_relayed(fleet[0], 1)
        assert fleet.transactions() == {TRANSACTION: 1}
        fleet[0].restore()
        assert sock.recv(1) == b""


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.RESET])
def test_a_transaction_in_service_has_been_relayed_when_its_instance_dies(mode: Mode) -> None:
    with Fleet(1, path=["eth"], service_time=ServiceTime.constant(3600), workers=1) as fleet:
        served = ask(fleet[0], call("eth_sendRawTransaction", "0x01"))
        until_relayed(fleet[0], 1)
        waiting = ask(fleet[0], call("eth_sendRawTransaction", "0x02"))
        while fleet[0].stats().in_flight != 2:
            pass
        fleet[0].set_mode(mode)
        for sock in (served, waiting):
            with sock, pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert fleet.transactions() == {"0x01": 1}


def test_requests_are_recorded_when_asked_for(client: httpx.Client, fleet: Fleet) -> None:
    post(client, fleet[0], call("x"))
    assert fleet[0].received() == []
    with Fleet(1, path=["eth"], service_time=INSTANT, record=True) as recording:
        post(client, recording[0], call("x"))
        (request,) = recording[0].received()
        assert json.loads(request.body) == call("x")


# the fleet


def test_in_processes_it_is_the_same(client: httpx.Client, processes: bool) -> None:
    with Fleet(2, path=["eth", "solana"], service_time=INSTANT, processes=processes) as fleet:
        fleet[0].set_service("eth", ServiceMode.NO_SESSION)
        fleet[1].set_height(7)
        assert post(client, fleet[0], call("eth_blockNumber")).status_code == 500
        assert post(client, fleet[1], call("eth_blockNumber")).json()["result"] == "0x7"
        for gateway in fleet:
            post(client, gateway, call("eth_sendRawTransaction", TRANSACTION), "solana")
        assert fleet.transactions() == Counter({TRANSACTION: 2})
        assert [gateway.stats().relays for gateway in fleet] == [1, 2]
        with pytest.raises(ValueError, match="near"):
            fleet.set_service("near", ServiceMode.OK)


@pytest.mark.parametrize("arguments", [{"share": 1.5}, {"share": -0.1}, {"factor": 0.0}])
def test_impossible_service_modes_are_refused(client: httpx.Client, fleet: Fleet, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"share|factor"):
        fleet.set_service("eth", ServiceMode.NO_SESSION, **arguments)
    assert post(client, fleet[0], call("x")).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "eth"}, "list"),
        ({"path": [""]}, "services"),
        ({"path": ["a\r\nb"]}, "services"),
        ({"path": ["eth"], "suppliers": 1}, "suppliers"),
        ({"answer": dict}, "answer"),
        ({"path": ["eth"], "answer": dict, "processes": True}, "answer"),
    ],
)
def test_impossible_fleets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fleet(1, **arguments)


def test_a_fleet_without_services_says_so() -> None:
    with Fleet(1) as fleet:
        for use in (
            lambda: fleet.set_service("eth", ServiceMode.OK),
            lambda: fleet[0].set_height(1),
            fleet.transactions,
        ):
            with pytest.raises(ValueError, match="path="):
                use()
