"""The status page, in a real browser: over stores with and without anything, and with hostile names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from datetime import UTC, datetime
from itertools import repeat

import pytest

from droidspeak.connector.reports import encoded
from droidspeak.errors import TierUnavailable
from droidspeak.storage.testing import make_chunk
from droidspeak.storage.wrappers import FaultyTier, fail
from tests.cli.browser import browser, show
from tests.cli.test_report import rows_of, text_of

from .httpclient import Serving, disk, memory, serving, store_of
from .pagestore import fill, pair, policy, report, showing, source

SCRIPT = "<script>document.title='owned'</script>"
TOKEN = "reader-0123456789abcdef"


@pytest.fixture(scope="module")
def driver():
    with browser() as opened:
        yield opened


def with_data(folder):
    for sender, receiver in (("base", "coder"), ("base", "analyst"), ("coder", "analyst")):
        policy(folder / "policies", sender, receiver)
    return showing(folder), fill


def empty(folder):
    return showing(folder), lambda served: None


def tier_down(folder):
    def broken(served: Serving) -> None:
        served.store.write(make_chunk(0))
        one = report(pair("base", "coder", 512))
        served.store.put_report(one.id, encoded(one))

    plan = {"usage": repeat(fail(TierUnavailable("gone"))), "reports": repeat(fail(TierUnavailable("no")))}
    return showing(folder, store_of(memory(), FaultyTier(disk(folder / "store"), plan))), broken


def hostile(folder):
    policy(folder / "policies", "base", "coder", names=(SCRIPT, "x" * 300))
    (folder / "policies" / f"{'<b>no'}.json").write_text("{}")

    def told(served: Serving) -> None:
        one = report(pair("base", "coder", 512), engine=SCRIPT, host=SCRIPT + '"onload="x')
        served.store.put_report(one.id, encoded(one))

    return showing(folder), told


def many(folder):
    def told(served: Serving) -> None:
        pairs = [pair(f"m{n}", f"m{n % 7}", 1000 * (n + 1)) for n in range(40)]
        for one in (report(*pairs), *(report(engine="e" * 200, host="h" * 200) for _ in range(60))):
            served.store.put_report(one.id, encoded(one))

    return showing(folder), told


STORES = {"data": with_data, "empty": empty, "down": tier_down, "hostile": hostile, "many": many}


@pytest.fixture(params=STORES)
def served(request, tmp_path):
    made, filled = STORES[request.param](tmp_path)
    with made as served:
        filled(served)
        yield served


def at(served: Serving) -> str:
    return f"http://127.0.0.1:{served.server.port}/"


def test_the_page_asks_no_other_host_and_complains_of_nothing(driver, served):
    show(driver, at(served))
    assert driver.get_log("browser") == []
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert [
        name for name in driver.execute_script(script) if not name.startswith(("data:", at(served)))
    ] == []
    page = served.client.ask("GET", "/").body.decode()
    targets = re.findall(r'(?:src|href|action|srcset)="([^"]*)"|url\(([^)]*)\)', page)
    assert all((one or other).startswith("data:") for one, other in targets)
    assert driver.title == "DroidSpeak"
    assert driver.execute_script("return document.querySelectorAll('script').length") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_sticks_out(driver, served, width, scheme):
    show(driver, at(served), width=width, scheme=scheme)
    assert driver.execute_script("return document.documentElement.scrollWidth") == width
    drawn = driver.execute_script(
        """return [...document.querySelectorAll(".tile, .cards div, figure svg")].filter(part => {
            const box = part.getBoundingClientRect()
            return box.left < 0 || box.right > innerWidth || part.scrollWidth > part.clientWidth + 1
        }).map(part => part.textContent)"""
    )
    assert drawn == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(driver, tmp_path, scheme):
    made, filled = with_data(tmp_path)
    with made as served:
        filled(served)
        show(driver, at(served), scheme=scheme)
        ratios = driver.execute_script(CONTRAST)
    assert ratios
    assert min(ratios) >= 4.5


# WCAG 2.2's contrast of each text with the nearest plain ground under it.
CONTRAST = """
const light = ([r, g, b]) => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  const [x, y, z] = [r, g, b].map(v => linear(v / 255))
  return 0.2126 * x + 0.7152 * y + 0.0722 * z
}
const parts = text => text.startsWith("rgb") ? text.match(/[0-9.]+/g).map(Number) : null
const ground = node => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parts(getComputedStyle(at).backgroundColor)
    if (colour && (colour[3] ?? 1) === 1) return colour
  }
  return [255, 255, 255]
}
const texts = "p, b, dt, dd span, th, td:not(.none), h1, h2, h3, summary, footer, .state"
return [...document.querySelectorAll(texts)]
  .filter(node => node.textContent.trim() && node.checkVisibility())
  .map(node => {
    const [one, two] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a)
    return (one + 0.05) / (two + 0.05)
  })
"""


def test_what_the_page_says(driver, tmp_path):
    made, filled = with_data(tmp_path)
    with made as served:
        filled(served)
        show(driver, at(served))
        figures = text_of(driver, "#key-figures")
        assert "49,536" in figures  # 3/4 of what base and coder gave others
        assert "24,576" in figures
        assert "80 %" in figures
        assert "24 of 30" in figures
        tiers = text_of(driver, "#tiers")
        assert "4 chunks" in tiers
        assert tiers.count("up") == 2
        assert "1 read from here" in tiers
        held = make_chunk(0).key.source
        assert [row[0] for row in rows_of(driver, "#models")] == [held[:12]]
        matrix = {row[0]: row[1:] for row in rows_of(driver, "#sharing")}
        assert matrix["base"][0].startswith("38,400")
        assert "800 MiB" in matrix["base"][0]
        assert matrix["coder"][0].startswith("20,480")
        assert "own" in matrix["coder"][0]
        assert text_of(driver, "#policies").count("→") == 3
        assert driver.execute_script("return document.querySelectorAll('.frontier .mark').length") == 12
        driver.execute_script("document.querySelector('#plans-1').open = true")
        assert ["3-4", "2 of 12", "0.930"] in rows_of(driver, "#plans-1")
        assert rows_of(driver, "#drift") == [["base → coder", "serving", "0.970", "0.0120", "40", "40"]]
        engines = rows_of(driver, "#engines")
        assert [row[0] for row in engines] == ["vllm", "transformers", "transformers"]
        assert [row[2] for row in engines] == ["running", "running", "ended"]


def test_a_tier_that_is_down_is_said_to_be(driver, tmp_path):
    made, filled = tier_down(tmp_path)
    with made as served:
        filled(served)
        show(driver, at(served))
        assert "does not answer" in text_of(driver, "#tiers")
        assert "reports cannot be read" in text_of(driver, "main")
        assert served.client.ask("GET", "/").status == 200


def test_names_are_only_text(driver, tmp_path):
    made, filled = hostile(tmp_path)
    with made as served:
        filled(served)
        show(driver, at(served))
        assert driver.title == "DroidSpeak"
        assert SCRIPT in text_of(driver, "#policies")
        assert SCRIPT in text_of(driver, "#sharing")
        assert SCRIPT in text_of(driver, "#engines")
        assert "<b>no.json" in text_of(driver, "#policies .alert")
        assert SCRIPT not in served.client.ask("GET", "/").body.decode()


def test_a_policy_that_drifted_and_one_that_changed(driver, tmp_path):
    path = policy(tmp_path / "policies", "base", "coder")
    drift = {"sender": source("base"), "receiver": source("coder"), "drifted": True, "samples": 9}
    with showing(tmp_path) as served:
        one = report(drift=[{**drift, "agreement": 0.5, "kl": 2.0, "observed": 9}])
        served.store.put_report(one.id, encoded(one))
        show(driver, at(served))
        assert "drifted: out of service" in text_of(driver, "#policies")
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "layers": 13}))
        show(driver, at(served))
        assert "was changed after it was made" in text_of(driver, "#policies")
        path.unlink()
        show(driver, at(served))
        assert "holds no policy" in text_of(driver, "#policies")


def test_figures_come_up_to_date_by_themselves(driver, tmp_path):
    made, filled = with_data(tmp_path)
    with made as served:
        filled(served)
        show(driver, at(served))
        driver.execute_script("document.querySelector('#plans-2').open = true")
        one = report(pair("base", "coder", 1_000_000))
        served.store.put_report(one.id, encoded(one))
        driver.set_script_timeout(60)
        # As the page's own clock does, without waiting for it.
        driver.execute_async_script("refresh().then(arguments[0])")
        assert "799,536" in text_of(driver, "#key-figures")
        assert driver.execute_script("return document.querySelector('#plans-2').open")
        served.server.stop(5)
        driver.execute_async_script("refresh().then(arguments[0])")
        assert "does not answer" in text_of(driver, "#now")
        assert "799,536" in text_of(driver, "#key-figures")


def test_it_works_with_scripts_off(driver, tmp_path):
    made, filled = with_data(tmp_path)
    with made as served:
        filled(served)
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        try:
            show(driver, at(served))
        finally:
            driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        assert "49,536" in text_of(driver, "#key-figures")
        refresh = re.search(r"<noscript>(.*?)</noscript>", served.client.ask("GET", "/").body.decode())
        assert refresh[1] == '<meta http-equiv="refresh" content="30">'


# Who may see it


def basic(password: str, user: str = "anyone") -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def tokens(**scopes: tuple[str, str]) -> list[dict[str, object]]:
    return [
        {"name": name, "token": f"{name}-0123456789abcdef", "scopes": [scope], "tenant": tenant}
        for name, (scope, tenant) in scopes.items()
    ]


@pytest.fixture
def guarded(tmp_path):
    policy(tmp_path / "policies", "base", "coder")
    stores = {"": store_of(disk(tmp_path / "own")), "acme": store_of(disk(tmp_path / "acme"), name="acme")}
    known = tokens(reader=("read", ""), writer=("write", ""), admin=("admin", ""), acme=("read", "acme"))
    with serving(stores, tokens=known) as served:
        update = {"policies": tmp_path / "policies"}
        served.state.settings = served.state.settings.model_copy(update=update)
        for name, tokens_shared in (("", 1024), ("acme", 2048)):
            one = report(pair("base", "coder", tokens_shared), host=f"host of {name or 'ours'}")
            served.state.stores[name].put_report(one.id, encoded(one))
        yield served


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("nobody-0123456789abcdef"),
        basic(""),
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(TOKEN.encode()).decode()},
        {"Authorization": f"Basic {TOKEN}"},
    ],
)
def test_without_a_token_a_browser_is_asked_for_one(guarded, headers):
    answer = guarded.client.ask("GET", "/", headers=headers)
    assert answer.refusal == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="DroidSpeak", charset="UTF-8"'
    assert "as password" in answer.json["error"]["message"]


def test_no_token_comes_in_by_the_address(guarded):
    assert guarded.client.ask("GET", f"/?token={TOKEN}").refusal == (401, "unauthorized")


@pytest.mark.parametrize("user", ["anyone", ""])
def test_the_token_is_the_password(guarded, user):
    assert guarded.client.ask("GET", "/", headers=basic(TOKEN, user)).status == 200
    assert guarded.as_caller(TOKEN).ask("GET", "/").status == 200


@pytest.mark.parametrize("name", ["writer", "admin"])
def test_the_page_needs_the_scope_to_read(guarded, name):
    answer = guarded.client.ask("GET", "/", headers=basic(f"{name}-0123456789abcdef"))
    assert answer.refusal == (403, "forbidden")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/usage"), ("POST", "/v1/evict"), ("POST", "/"), ("GET", "//"), ("GET", "/metrics")],
)
def test_passwords_open_the_page_alone(guarded, method, path):
    """A browser sends them along with whatever another site makes it ask."""
    answer = guarded.client.ask(method, path, headers=basic("admin-0123456789abcdef"))
    assert answer.refusal == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_tenant_sees_its_own(guarded):
    ours = guarded.client.ask("GET", "/", headers=basic(TOKEN)).body.decode()
    theirs = guarded.client.ask("GET", "/", headers=basic("acme-0123456789abcdef")).body.decode()
    assert "host of ours" in ours
    assert "host of acme" not in ours
    assert "host of acme" in theirs
    assert "host of ours" not in theirs
    assert "tenant acme" in theirs
    # Policies, and the names that they give, are the configuration's.
    assert 'id="policies"' in ours
    assert 'id="policies"' not in theirs
    assert ">coder<" in ours
    assert ">coder<" not in theirs
    other = guarded.client.ask("GET", "/?tenant=acme", headers=basic(TOKEN))
    assert other.refusal == (403, "forbidden")


def test_what_a_browser_may_do_with_it(guarded):
    headers = guarded.client.ask("GET", "/", headers=basic(TOKEN)).headers
    policies = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policies["default-src"] == "'none'"
    assert policies["frame-ancestors"] == policies["form-action"] == policies["base-uri"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    page = guarded.client.ask("GET", "/", headers=basic(TOKEN)).body.decode()
    for kind in ("style", "script"):
        text = re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policies[f"{kind}-src"] == f"'sha256-{digest}'"


def test_a_costly_tier_is_not_asked_at_every_look(tmp_path):
    asked = []

    class Costly(FaultyTier):
        def usage(self):
            asked.append(datetime.now(UTC))
            return super().usage()

    slow = Costly(disk(tmp_path), {"usage": [_late]})
    with serving(store_of(slow)) as served:
        for _ in range(5):
            assert served.client.ask("GET", "/").status == 200
    assert len(asked) == 1


def _late(call):
    time.sleep(0.3)
    return call()
