"""The configuration of `pathlb serve`: what it takes, what it says of what it does not take, and on which line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from pathlb import ConfigError, Endpoint
from pathlb.cli import main, serve
from pathlb.serving.checks import TLS, Address
from pathlb.serving.config import SETTINGS, ServeConfig
from pathlb.serving.lines import line_of
from pathlb.serving.load import load, read
from pathlb.serving.render import render
from pathlb.serving.supervisor import Source

ENDPOINT = '[[endpoints]]\nurl = "http://10.0.0.1:3069"\n'

EVERYTHING = ServeConfig(
    endpoints=(
        Endpoint("http://10.0.0.1:3069"),
        Endpoint("https://10.0.0.2:3069/base", weight=2.5, server_hostname="gateway"),
        Endpoint("unix:///run/gateway.sock"),
    ),
    bind=Address("::", 80),
    admin=Address("127.0.0.1", 9901),
    admin_token="s3cret",
    workers=4,
    grace=12.5,
    keep_alive=60,
    access_log=True,
    policy="p2c",
    profile="path",
    services={"eth": "json_rpc", "arb.one": "rest"},
    app_address="pokt1",
    deadline=20,
    max_body=1_000_000,
    max_message=1_000,
    host="gateway.example",
    rewrite=("/rpc", "/v1"),
    trusted=("10.0.0.0/8", "::1"),
    tell=True,
    request_headers={"X-Environment": 'quo"ted \\ ü', "Cookie": None},
    response_headers={"Server": None},
    tls=TLS("/etc/chain.pem", "/etc/key.pem"),
    health={"path": "/up", "interval": 2, "statuses": [200]},
    limits={"concurrency": 500},
    retry={"statuses": [502, 503], "attempts": 2},
    timeouts={"connect": 0.25, "read": 5},
    breaker={"failures": 3},
    outlier=False,
    panic={"threshold": 0.1},
    slow_start={"window": 0},
    block_height={"lag": 5},
    jsonrpc={"split": 10},
)


def test_it_can_be_written_as_toml_and_read_back() -> None:
    text = render(EVERYTHING, comments=["from nginx.conf", "two\nlines"])
    assert text.startswith("# from nginx.conf\n# two\n# lines\n\n")
    assert read(text, "pathlb.toml") == EVERYTHING
    assert {one for one in SETTINGS if f"\n{one} = " in text or f"[{one}]" in text} == set(SETTINGS)


def test_what_is_default_is_not_written() -> None:
    assert render(ServeConfig(endpoints=("http://a:1",))) == '[[endpoints]]\nurl = "http://a:1"\n'  # type: ignore[arg-type]


@pytest.mark.parametrize("services", [["eth", "sol"], {"eth": "json_rpc"}])
def test_services_are_ids_or_ids_and_their_rpc_type(services: Any) -> None:
    config = ServeConfig(endpoints=(Endpoint("http://a"),), profile="path", services=services)
    assert list(config.services) == list(services)
    assert read(render(config), "x") == config


ERRORS = {
    "not TOML": ("bind = \n", "f.toml:1: Invalid value (column 8)"),
    "not ended": ('x = 1\ny = """a', "f.toml:2: "),
    "twice": ("workers = 1\nworkers = 2\n", "f.toml:2: Cannot overwrite a value (column 12)"),
    "no endpoints": ("workers = 1\n", "f.toml:1: endpoints: there must be at least one"),
    "an unknown key": (f"\nwrokers = 1\n{ENDPOINT}", "f.toml:2: wrokers: is no setting; did you mean 'workers'?"),
    "an unknown key, unlike any": (f"zzz = 1\n{ENDPOINT}", "f.toml:1: zzz: is no setting; there are access_log, admin"),
    "an unknown table": (f"{ENDPOINT}\n[limit]\nqueue = 1", "f.toml:4: limit: is no setting; did you mean 'limits'?"),
    "an unknown key in a table": (
        f"{ENDPOINT}[limits]\nqueu = 1",
        "f.toml:4: limits.queu: is no setting; did you mean 'queue'?",
    ),
    "a dotted key": (f"limits.queue = -1\n{ENDPOINT}", "f.toml:1: limits.queue: must be at least 0, not -1"),
    "an inline table": (f"limits = {{queue = -1}}\n{ENDPOINT}", "f.toml:1: limits.queue: must be at least 0, not -1"),
    "a quoted key": (
        f'{ENDPOINT}[request_headers]\n"a b" = "c"',
        "f.toml:4: request_headers.a b: must be a field with its value, or false to take it out, not 'c'",
    ),
    "a key of the second endpoint": (
        f"{ENDPOINT}\n{ENDPOINT}wieght = 2",
        "f.toml:6: endpoints[1].wieght: is no setting; did you mean 'weight'?",
    ),
    "an endpoint twice": (f"{ENDPOINT}{ENDPOINT}", "f.toml:4: endpoints[1].url: http://10.0.0.1:3069 is listed twice"),
    "an endpoint without url": (f"{ENDPOINT}[[endpoints]]\nweight = 1", "f.toml:3: endpoints[1]: has no url"),
    "a bad url": ('[[endpoints]]\nurl = "10.0.0.1"', "f.toml:2: endpoints[0].url: '10.0.0.1' must start with http://"),
    "a bad weight": (f"{ENDPOINT}weight = 0", "f.toml:3: endpoints[0].weight: must be a finite number above 0, not 0"),
    "a secret in a url": (
        '[[endpoints]]\nurl = "http://me:hunter2@a"',
        "f.toml:2: endpoints[0].url: must not contain user info",
    ),
    "endpoints in one table": ("[endpoints]\nurl = 1", "f.toml:1: endpoints: must be [[endpoints]] tables"),
    "a number that is none": (f'workers = "2"\n{ENDPOINT}', "f.toml:1: workers: must be a number, not '2'"),
    "a number out of range": (f"workers = 0\n{ENDPOINT}", "f.toml:1: workers: must be between 1 and 1024, not 0"),
    "no whole number": (f"max_body = 1.5\n{ENDPOINT}", "f.toml:1: max_body: must be a whole number, not 1.5"),
    "no flag": (f"access_log = 1\n{ENDPOINT}", "f.toml:1: access_log: must be true or false, not 1"),
    "no string": (f"host = 1\n{ENDPOINT}", "f.toml:1: host: must be a string, not 1"),
    "no host": (f'host = "a b"\n{ENDPOINT}', "f.toml:1: host: must be ASCII without spaces, not 'a b'"),
    "no host, but a path": (
        f'host = "a/b"\n{ENDPOINT}',
        "f.toml:1: host: must be a host, with or without a port, not 'a/b'",
    ),
    "no address": (f'bind = "8080"\n{ENDPOINT}', "f.toml:1: bind: must be HOST:PORT, not '8080'"),
    "no port": (f'bind = "a:b"\n{ENDPOINT}', "f.toml:1: bind: must be HOST:PORT, with a port up to 65535, not 'a:b'"),
    "a port too high": (f'admin = "a:65536"\n{ENDPOINT}', "f.toml:1: admin: must be HOST:PORT, with a port up to"),
    "a bare IPv6 address": (
        f'bind = "::1:80"\n{ENDPOINT}',
        "f.toml:1: bind: must be HOST:PORT, with an IPv6 address in",
    ),
    "a policy nobody has": (
        f'policy = "leastconn"\n{ENDPOINT}',
        "f.toml:1: policy: must be 'least-connections', 'p2c' or 'round-robin', not 'leastconn'; did you mean 'least-c",
    ),
    "a profile nobody has": (f'profile = "nginx"\n{ENDPOINT}', "f.toml:1: profile: must be 'path', not 'nginx'"),
    "services without a profile": (f'services = ["eth"]\n{ENDPOINT}', "f.toml:1: services: needs profile = 'path'"),
    "an RPC-Type nobody has": (
        f'profile = "path"\n{ENDPOINT}[services]\neth = "jsonrpc"',
        "f.toml:5: services.eth: must be one of json_rpc, rest, comet_bft, websocket, grpc, not 'jsonrpc'",
    ),
    "no service id": (f'profile = "path"\nservices = ["e/h"]\n{ENDPOINT}', "f.toml:2: services: 'e/h' is not a"),
    "a list that is none": (f'trusted = "10.0.0.0/8"\n{ENDPOINT}', "f.toml:1: trusted: must be a list of strings"),
    "no network": (f'trusted = ["10.0.0.0/99"]\n{ENDPOINT}', "f.toml:1: trusted: '10.0.0.0/99' is not a network"),
    "a rewrite of one": (f'rewrite = ["/a"]\n{ENDPOINT}', "f.toml:1: rewrite: must be a prefix and what to put in"),
    "no path": (f'rewrite = ["/a", "b"]\n{ENDPOINT}', "f.toml:1: rewrite: must be two paths, not"),
    "fields that are none": (
        f"request_headers = 1\n{ENDPOINT}",
        "f.toml:1: request_headers: must be a table of fields",
    ),
    "where a request goes": (
        f'{ENDPOINT}[request_headers]\nX-A = "1"\nHost = "x"',
        "f.toml:5: request_headers.Host: says where a message goes or ends",
    ),
    "where a reply ends": (
        f'{ENDPOINT}[response_headers]\nConnection = "close"',
        "f.toml:4: response_headers.Connection: says where a message goes or ends",
    ),
    "a table that is none": (f"limits = 1\n{ENDPOINT}", "f.toml:1: limits: must be a table, not 1"),
    "half of a TLS listener": (
        f'{ENDPOINT}[tls]\nkey = "k"',
        "f.toml:3: tls: needs certificate and key, two PEM files",
    ),
    "no certificate": (
        f'{ENDPOINT}[tls]\ncertificate = "/no.pem"\nkey = "/no.key"',
        "f.toml:4: tls.certificate: /no.pem: No such file or directory",
    ),
    "contradicting settings": (
        f"{ENDPOINT}[retry]\nwait_base = 3",
        "f.toml:3: retry.wait_max: must be at least wait_base (3 s)",
    ),
    "a health path": (f'{ENDPOINT}[health]\npath = "up"', "f.toml:4: health.path: must start with /"),
    "a status": (f"{ENDPOINT}[health]\nstatuses = [99]", "f.toml:4: health.statuses: must be between 200 and 599"),
    "no status": (f"{ENDPOINT}[health]\nstatuses = [[200]]", "f.toml:4: health.statuses: must be a number, not [200]"),
    "nested too deeply": (f"x = {'[' * 100_000}\n{ENDPOINT}", "f.toml: is nested too deeply"),
    "health and nothing": (f"health = true\n{ENDPOINT}", "f.toml:1: health: must be a table, not True"),
    "a timeout": (f"{ENDPOINT}[timeouts]\nread = 0", "f.toml:4: timeouts.read: must be at least 0.001, not 0"),
    "no address of an app": (
        f'profile = "path"\napp_address = "a/b"\n{ENDPOINT}',
        "f.toml:2: app_address: 'a/b' is not an address",
    ),
}


@pytest.mark.parametrize(("text", "told"), ERRORS.values(), ids=ERRORS)
def test_every_error_names_the_file_and_the_line(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.toml").write_text(text)
    assert main(["serve", "--config", "f.toml"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"pathlb: {told}")
    assert output.err.count("\n") == 1
    assert "hunter2" not in output.err


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read(f'policy = "p2d"\n{ENDPOINT}[limits]\nqueue = -1\nconcurrency = 0\n[breaker]\nfailure = 1', "f.toml")
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        ["f.toml:1", "policy"],
        ["f.toml:6", "limits.concurrency"],
        ["f.toml:8", "breaker.failure"],
    ]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_bytes(b"workers = 1\nhost = '\xff'")
    with pytest.raises(ConfigError, match=r"f\.toml:2: is not UTF-8"):
        load(str(file))


def test_a_file_that_is_being_written_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(ENDPOINT)
    source = Source(str(file), {})
    source.read()
    assert not source.has_changed()
    with file.open("w") as draft:
        for line in ("workers = 2\n", "access_log = true\n", ENDPOINT):
            draft.write(line)
            draft.flush()
            assert not source.has_changed()
    assert source.has_changed()  # it is as it was at the last look
    assert source.read().workers == 2
    assert not source.has_changed()
    file.unlink()
    assert not source.has_changed()
    assert source.has_changed()


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(f'{ENDPOINT}[tls]\ncertificate = "chain.pem"\nkey = "/abs/key.pem"')
    assert load(str(file)).tls == TLS(str(tmp_path / "chain.pem"), "/abs/key.pem")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 1),
        (("b", "c"), 4),
        (("b", "nothing", "at all"), 3),
        (("list", 0, "x"), 7),
        (("list", 1), 8),
        (("list", 1, "sub", "y"), 11),
        (("list", 1, "x"), 9),
        (("dotted", "key", "z"), 2),
        (("nowhere",), 1),
    ],
)
def test_where_a_setting_is(path: tuple[str | int, ...], line: int) -> None:
    text = """a = 1
dotted . "key".z = 2
[b]
c = 3

[[list]]
x = 4
[[ list ]]
x = 5 # [list]
[list.sub]
y = 6
"""
    assert line_of(text, path) == line


# --- the command line


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.read_flags(parser.parse_args(arguments))


def test_the_command_line_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHLB_ADMIN_TOKEN", "from the environment".replace(" ", "-"))
    file = tmp_path / "f.toml"
    file.write_text(f'policy = "p2c"\nworkers = 3\nbind = "0.0.0.0:80"\n{ENDPOINT}')
    config = Source(str(file), parse("--config", str(file), "--bind", "127.0.0.1:0", "--workers", "2")).read()
    assert (config.policy, config.workers, config.bind) == ("p2c", 2, Address("127.0.0.1", 0))
    assert config.admin_token == "from-the-environment"
    assert "from-the-environment" not in repr(config)


def test_everything_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATHLB_ADMIN_TOKEN", raising=False)
    given = parse(
        *("http://a:1", "unix:///b", "--bind", "[::1]:8080", "--admin", "9901", "--admin-token", "t", "--workers", "2"),
        *("--policy", "round-robin", "--profile", "path", "--service", "eth", "--service", "sol", "--access-log"),
    )
    config = Source(None, given).read()
    assert config == ServeConfig(
        endpoints=(Endpoint("http://a:1"), Endpoint("unix:///b")),
        bind=Address("::1", 8080),
        admin=Address("127.0.0.1", 9901),
        admin_token="t",
        workers=2,
        policy="round-robin",
        profile="path",
        services={"eth": None, "sol": None},
        access_log=True,
    )
    assert str(config.bind) == "[::1]:8080"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "URL: give the instances, or --config FILE"),
        (["http://a", "ftp://b"], "URL 2: 'ftp://b' must start with http://, https:// or unix://"),
        (
            ["http://a", "--bind", "8080"],
            "--bind: must be HOST:PORT, not '8080' (0.0.0.0 stands for every IPv4 address",
        ),
        (["http://a", "--admin", "x"], "--admin: must be HOST:PORT, with a port up to 65535, not 'x'"),
        (["http://a", "--workers", "0"], "--workers: must be between 1 and 1024, not 0"),
        (
            ["http://a", "--policy", "random"],
            "--policy: must be 'least-connections', 'p2c' or 'round-robin', not 'rand",
        ),
        (["http://a", "--service", "e/h"], "--service: 'e/h' is not a service id"),
        (["http://a", "--profile", "nginx"], "--profile: must be 'path', not 'nginx'"),
        (["http://a", "--service", "eth"], "--service: needs --profile path: only PATH has services"),
        (["--config", "/no/such.toml"], "/no/such.toml: cannot be read: No such file or directory"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"pathlb: {told}")


def test_endpoints_come_from_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.toml"
    file.write_text(f"workers = 1\n{ENDPOINT}")
    assert main(["serve", "http://a", "--config", str(file)]) == 2
    told = f"pathlb: {file}:2: endpoints: are given on the command line as well; give them in one place\n"
    assert capsys.readouterr().err == told


def test_built_in_code_the_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^limits\.queue: must be at least 0"):
        ServeConfig(endpoints=(Endpoint("http://a"),), limits={"queue": -1})


def test_the_example_has_it_right() -> None:
    """examples/pathlb.toml, which documents every setting."""
    path = Path(__file__).parents[2] / "examples" / "pathlb.toml"
    config = read(path.read_text(), str(path))
    assert (config.workers, config.profile, len(config.endpoints)) == (2, "path", 2)
