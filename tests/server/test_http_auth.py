"""Who may do what: tokens, scopes, tenants, certificates, and pages in a browser."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import urllib3

from droidspeak.config import Address, TlsSettings, load_settings
from droidspeak.errors import ConfigError
from droidspeak.integrations.server.http import HttpServer, make_app
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage.testing import make_chunk

from .certificates import authority, self_signed, signed_by
from .httpclient import HttpClient, Serving, memory, path_of, say, serving, store_of

CHUNK = make_chunk(1)
LARGE = make_chunk(2, layers=16, e_layers=(), tokens=8192)
PATH = path_of(CHUNK.key)


def token_of(name: str) -> str:
    return f"{name}-0123456789abcdef"


def token(name: str, *scopes: str, tenant: str = "") -> dict[str, Any]:
    return {"name": name, "token": token_of(name), "scopes": list(scopes), "tenant": tenant}


TOKENS = [
    token("reader", "read"),
    token("writer", "write"),
    token("admin", "admin"),
    token("all", "read", "write", "admin"),
    token("acme", "read", "write", "admin", tenant="acme"),
    token("acme-reader", "read", tenant="acme"),
    {
        "name": "hashed",
        "sha256": hashlib.sha256(token_of("hashed").encode()).hexdigest(),
        "scopes": ["read"],
    },
]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Serving]:
    """A default tenant and `acme`, both in memory; tokens are needed."""
    stores = {"": store_of(memory()), "acme": store_of(memory(), name="acme")}
    with serving(stores, tokens=TOKENS) as served:
        yield served


REPORT = {
    "id": "0" * 32,
    "engine": "mine",
    "started": "2026-11-01T00:00:00Z",
    "updated": "2026-11-01T00:00:00Z",
}


class Endpoint(NamedTuple):
    method: str
    path: str
    scope: str | None
    whole_daemon: bool = False
    body: Any = None


ENDPOINTS = [
    Endpoint("GET", "/healthz", None),
    Endpoint("GET", "/readyz", None),
    Endpoint("GET", "/metrics", "read", whole_daemon=True),
    Endpoint("GET", "/openapi.json", "any"),
    Endpoint("GET", "/v1/usage", "read"),
    Endpoint("GET", "/v1/chunks", "read"),
    Endpoint("GET", "/v1/objects?name=x", "read"),
    Endpoint("POST", "/v1/leading", "read", body={"keys": []}),
    Endpoint("HEAD", PATH, "read"),
    Endpoint("GET", PATH, "read"),
    Endpoint("PUT", PATH, "write", body=CHUNK.to_bytes()),
    Endpoint("DELETE", PATH, "write"),
    Endpoint("PUT", PATH + "/pin", "write"),
    Endpoint("DELETE", PATH + "/pin", "write"),
    Endpoint("POST", PATH + "/verify", "read"),
    Endpoint("POST", PATH + "/quarantine", "write"),
    Endpoint("POST", "/v1/evict", "admin", body={"tier": "cpu", "nbytes": 1}),
    Endpoint("GET", "/v1/config", "admin", whole_daemon=True),
    Endpoint("GET", "/v1/reports", "read"),
    Endpoint("PUT", f"/v1/reports/{REPORT['id']}", "write", body=REPORT),
    Endpoint("GET", "/", "read"),
]
IDS = [f"{endpoint.method} {endpoint.path.split('?')[0].replace(PATH, 'KEY')}" for endpoint in ENDPOINTS]


def test_every_endpoint_is_in_the_matrix():
    state = DaemonState(load_settings(overrides={"tiers": ["cpu://"]}), {})
    described = {
        f"{method.upper()} {path}"
        for path, operations in make_app(state).openapi()["paths"].items()
        for method in operations
    }
    shown = {name.replace("KEY", "/v1/chunks/{source}/{shard}/{prefix}") for name in IDS}
    shown = {name.replace(REPORT["id"], "{id}") for name in shown}
    assert shown - {"GET /openapi.json"} == described


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
@pytest.mark.parametrize("name", ["reader", "writer", "admin", "acme-reader"])
def test_a_scope_opens_its_endpoints_and_no_other(guarded, endpoint, name):
    guarded.store.write(CHUNK)
    guarded.state.stores["acme"].write(CHUNK)
    answer = guarded.as_caller(token_of(name)).ask(endpoint.method, endpoint.path, endpoint.body)
    scope = {"reader": "read", "writer": "write", "admin": "admin", "acme-reader": "read"}[name]
    allowed = endpoint.scope in (None, "any", scope) and not (endpoint.whole_daemon and name == "acme-reader")
    assert answer.status in ((200, 204, 404) if allowed else (403,))
    if answer.status == 403 and endpoint.method != "HEAD":
        assert answer.refusal == (403, "forbidden")


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer ", f"Bearer {token_of('nobody')}", "Basic YTpi"])
def test_without_a_known_token_only_health_answers(guarded, endpoint, shown):
    headers = {} if shown is None else {"Authorization": shown}
    answer = guarded.client.ask(endpoint.method, endpoint.path, endpoint.body, headers)
    if endpoint.scope is None:
        assert answer.status == 200
        return
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic" if endpoint.path == "/" else "Bearer")
    if endpoint.method != "HEAD":
        assert answer.refusal == (401, "unauthorized")


def test_a_path_that_is_not_there_is_no_secret_and_no_way_in(guarded):
    assert guarded.client.ask("GET", "/v1/nothing").refusal == (401, "unauthorized")
    assert guarded.as_caller(token_of("reader")).ask("GET", "/v1/nothing").refusal == (404, "not_found")


@pytest.mark.parametrize("spelling", ["bearer {}", "BEARER  {}", "Bearer {} "])
def test_the_scheme_is_spelt_any_way(guarded, spelling):
    headers = {"Authorization": spelling.format(token_of("hashed"))}
    assert guarded.client.ask("GET", "/v1/usage", headers=headers).status == 200


def test_a_body_without_a_token_is_not_read(guarded):
    """The answer comes though not one byte of the body does."""
    answer = say(guarded.server.port, f"PUT {PATH} HTTP/1.1", "Content-Length: 100000")
    assert answer.refusal == (401, "unauthorized")
    assert guarded.state.budget.held == 0


# Tenants


def test_tenants_are_apart(guarded):
    ours, theirs = guarded.as_caller(token_of("all")), guarded.as_caller(token_of("acme"))
    for client in (ours, theirs):
        client.ask("DELETE", PATH)
    theirs.put(CHUNK)
    assert theirs.ask("GET", PATH).body == CHUNK.to_bytes()
    assert ours.ask("GET", PATH).refusal == (404, "not_found")
    assert ours.ask("GET", "/v1/chunks").body == b""
    assert str(CHUNK.key).encode() in theirs.ask("GET", "/v1/chunks").body
    usage = [client.ask("GET", "/v1/usage").json for client in (ours, theirs)]
    assert [told["tenant"] for told in usage] == ["", "acme"]
    assert [told["tiers"][0]["chunks"] for told in usage] == [0, 1]
    assert ours.ask("GET", "/v1/usage?tenant=acme").json == theirs.ask("GET", "/v1/usage").json


@pytest.mark.parametrize(
    ("name", "tenant", "expected"),
    [
        ("all", "acme", 200),
        ("all", "", 200),
        ("all", "nobody", 404),
        ("reader", "acme", 403),
        ("reader", "nobody", 403),
        ("reader", "", 200),
        ("acme", "", 403),
        ("acme", "nobody", 403),
        ("acme", "acme", 200),
    ],
)
def test_naming_a_tenant(guarded, name, tenant, expected):
    answer = guarded.as_caller(token_of(name)).ask("GET", f"/v1/usage?tenant={tenant}")
    assert answer.status == expected
    if expected != 200:
        assert answer.refusal[1] == {403: "forbidden", 404: "unknown_tenant"}[expected]


def test_without_tokens_everyone_here_may_do_everything():
    stores = {"": store_of(memory()), "acme": store_of(memory(), name="acme")}
    with serving(stores) as served:
        for endpoint in ENDPOINTS:
            assert served.client.ask(endpoint.method, endpoint.path, endpoint.body).status in (200, 204, 404)
        assert served.client.ask("GET", "/v1/usage?tenant=acme").json["tenant"] == "acme"
        assert served.client.ask("GET", "/v1/usage?tenant=x").refusal == (404, "unknown_tenant")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:65433", 200),
        ("[::1]", 200),
        ("evil.example:65433", 403),
        ("localhost.evil.example", 403),
        ("[evil]", 403),
        ("", 403),
    ],
)
def test_without_tokens_a_page_in_a_browser_cannot_ask(host, status):
    """A page's own name may lead here (DNS rebinding); the browser then says it as Host."""
    with serving(store_of(memory())) as served:
        assert served.client.ask("GET", "/v1/usage", headers={"Host": host}).status == status
        assert served.client.ask("GET", "/healthz", headers={"Host": host}).status == 200


# Configuration


def test_the_configuration_shows_no_secret(guarded):
    told = guarded.as_caller(token_of("all")).ask("GET", "/v1/config")
    assert told.json["server"]["max_connections"] == 1024
    shown = {row["name"]: row for row in told.json["server"]["tokens"]}
    assert shown["reader"]["token"] == shown["hashed"]["sha256"] == "*" * 10
    assert shown["reader"]["scopes"] == ["read"]
    secrets = [row["sha256"] if "sha256" in row else row["token"] for row in TOKENS]
    assert not [secret for secret in secrets if secret.encode() in told.body]


def test_secrets_of_tiers_and_the_salt_are_not_shown():
    store = store_of(memory())
    with serving(store) as served:
        tier = {"kind": "droidspeak", "host": "far", "token": "tell-nobody"}
        update = {"salt": "tell-nobody", "tiers": (tier,)}
        served.state.settings = served.state.settings.model_copy(update=update)
        told = served.client.ask("GET", "/v1/config")
        assert b"tell-nobody" not in told.body
        assert told.json["salt"] == told.json["tiers"][0]["token"] == "*" * 10
        assert told.json["tiers"][0]["host"] == "far"


# TLS


def https(port: int, path: str = "/healthz", **certificates: Any) -> tuple[int, bytes]:
    """Status and body of a GET over TLS."""
    with urllib3.PoolManager(retries=False, timeout=60, **certificates) as pool:
        answer = pool.request("GET", f"https://127.0.0.1:{port}{path}")
        return answer.status, answer.data


def test_tls(tmp_path):
    certificate, key = self_signed(tmp_path)
    with serving(store_of(memory()), tls=TlsSettings(certificate=certificate, key=key)) as served:
        served.store.write(LARGE)
        got = https(served.server.port, path_of(LARGE.key), ca_certs=str(certificate))
        assert got == (200, LARGE.to_bytes())
        with pytest.raises(urllib3.exceptions.SSLError):
            https(served.server.port)
        with pytest.raises(urllib3.exceptions.HTTPError):
            HttpClient(served.server.port).ask("GET", "/healthz")
        assert https(served.server.port, ca_certs=str(certificate))[0] == 200


def test_client_certificates(tmp_path):
    certificate, key = self_signed(tmp_path)
    ours, theirs = authority(tmp_path / "ours"), authority(tmp_path / "theirs")
    tls = TlsSettings(certificate=certificate, key=key, client_ca=ours.certificate)

    def ask(**shown: Any) -> int:
        return https(served.server.port, ca_certs=str(certificate), **shown)[0]

    with serving(store_of(memory()), tls=tls) as served:
        for signer, welcome in [(ours, True), (theirs, False), (None, False)]:
            shown = {}
            if signer:
                files = signed_by(signer, signer.certificate.parent)
                shown = {"cert_file": str(files[0]), "key_file": str(files[1])}
            if welcome:
                assert ask(**shown) == 200
            else:
                with pytest.raises((urllib3.exceptions.HTTPError, ssl.SSLError, OSError)):
                    ask(**shown)


@pytest.mark.parametrize("spoilt", ["missing", "garbage", "not-its-key"])
def test_a_certificate_that_cannot_be_used(tmp_path, spoilt):
    certificate, key = self_signed(tmp_path)
    if spoilt == "missing":
        key = tmp_path / "nowhere.pem"
    elif spoilt == "garbage":
        certificate.write_text("garbage")
    else:
        (tmp_path / "other").mkdir()
        key = self_signed(tmp_path / "other")[1]
    state = DaemonState(load_settings(overrides={"tiers": ["cpu://"]}), {})
    tls = TlsSettings(certificate=certificate, key=key)
    with pytest.raises(ConfigError, match=r"^TLS: .*\.pem") as raised:
        HttpServer(state, Address(host="127.0.0.1", port=0), tls).start()
    assert "\n" not in str(raised.value)
