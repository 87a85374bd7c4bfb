from __future__ import annotations

import time

import pytest

from droidspeak.config import load_settings, open_policies, open_store
from droidspeak.errors import ConfigError, PolicyError, StorageError
from droidspeak.layerselect import Requirement
from droidspeak.layerselect.drift import DriftOptions
from droidspeak.storage.testing import make_chunk


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("DROIDSPEAK_CONFIG", "DROIDSPEAK_TIERS", "DROIDSPEAK_CODEC", "DROIDSPEAK_CHUNK_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_works_without_configuration(tmp_path):
    with open_store(load_settings()) as store:
        assert [tier.name for tier in store.tiers] == ["cpu", "disk"]
    assert (tmp_path / "cache" / "droidspeak" / "store").is_dir()


def test_later_sources_win(monkeypatch, tmp_path):
    file = tmp_path / "droidspeak.yaml"
    file.write_text("chunk_size: 64\ncodec: zstd\nquality_floor: 0.5\n")
    monkeypatch.setenv("DROIDSPEAK_CONFIG", str(file))
    monkeypatch.setenv("DROIDSPEAK_CHUNK_SIZE", "128")
    settings = load_settings(overrides={"quality_floor": 0.9, "salt": None})
    assert (settings.chunk_size, settings.codec, settings.quality_floor) == (128, "zstd", 0.9)
    monkeypatch.delenv("DROIDSPEAK_CONFIG")
    settings = load_settings(file)
    assert (settings.chunk_size, settings.codec, settings.quality_floor) == (128, "zstd", 0.5)


def test_tiers_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DROIDSPEAK_TIERS", f"cpu://?capacity=1MiB disk://{tmp_path}/store")
    with open_store(load_settings()) as store:
        assert [tier.name for tier in store.tiers] == ["cpu", "disk"]


@pytest.mark.parametrize(
    ("variables", "key", "value"),
    [
        ({"droidspeak_codec": "zstd"}, "codec", "zstd"),
        ({"DROIDSPEAK_SALT": "[1]"}, "salt", "[1]"),
        ({"DROIDSPEAK_DEGREES": "[1, 2]"}, "degrees", [1, 2]),
        ({"DROIDSPEAK_DRIFT": '{"window": 16}', "DROIDSPEAK_DRIFT__WINDOW": "32"}, "drift.window", 32),
        ({"DROIDSPEAK_LIMITS__DISK__THREADS": "3"}, "limits.disk.threads", 3),
        ({"DROIDSPEAK_SERVER__HTTP": "[::1]:7001"}, "server.http", {"host": "::1", "port": 7001}),
        ({"DROIDSPEAK_SERVER__HTTP": "null"}, "server.http", None),
        ({"DROIDSPEAK_SERVER__LISTEN": "127.0.0.1:7"}, "server.listen.port", 7),
        ({"DROIDSPEAK_SERVER__TENANTS__ACME__TIERS": '["cpu://"]'}, "server.tenants.acme.tiers", ["cpu://"]),
        ({"DROIDSPEAK_NOTHING": "of ours"}, "codec", "raw"),
    ],
)
def test_the_environment(monkeypatch, variables, key, value):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    found = load_settings().model_dump(mode="json")
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("DROIDSPEAK_DRIFT", "many", "environment DROIDSPEAK_DRIFT, or a key of it: allowed is JSON"),
        ("DROIDSPEAK_SERVER__TOKENS", "[", "environment DROIDSPEAK_SERVER, or a key"),
        ("DROIDSPEAK_SERVER__PORT", "1", "unknown configuration key 'server.port'; allowed: acknowledge"),
        ("DROIDSPEAK_TIERS", "", "configuration key 'tiers'"),
    ],
)
def test_an_environment_that_cannot_be(monkeypatch, name, text, says):
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert str(caught.value).startswith(says)


def test_sections_of_all_sources_are_merged(monkeypatch, tmp_path):
    file = tmp_path / "droidspeak.yaml"
    file.write_text("drift: {window: 16, least: 2, margin: 0.5}\nlimits: {disk: {threads: 2}}\n")
    monkeypatch.setenv("DROIDSPEAK_DRIFT__LEAST", "4")
    monkeypatch.setenv("DROIDSPEAK_LIMITS", '{"s3": {"threads": 3}}')
    settings = load_settings(file, {"drift": {"margin": 0.25}})
    assert (settings.drift.window, settings.drift.least, settings.drift.margin) == (16, 4, 0.25)
    assert {name: limit.threads for name, limit in settings.limits.items()} == {"disk": 2, "s3": 3}


def test_a_folder_that_cannot_be_used_does_not_keep_the_process_from_starting(tmp_path, caplog):
    place = tmp_path / "store"
    place.write_text("a file where a folder should be")
    settings = load_settings(
        overrides={"tiers": [f"disk://{place}"], "limits": {"disk": {"cooldown": 0.01, "max_cooldown": 0.02}}}
    )
    chunk = make_chunk(seed=1)
    with open_store(settings) as store:
        with pytest.raises(StorageError):
            store.leading([chunk.key])
        assert [record.message.count(str(place)) for record in caplog.records] == [1]
        place.unlink()
        time.sleep(0.1)
        store.write(chunk)
        store.flush()
        assert store.read(chunk.key) is not None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"chunk_sise": 64}, "unknown configuration key 'chunk_sise'; allowed: "),
        ({"chunk_size": 100}, "powers of two from 16"),
        ({"chunk_size": "many"}, "'chunk_size'"),
        ({"codec": "gzip"}, "allowed: raw, zstd"),
        ({"quality_floor": 2}, "'quality_floor'"),
        ({"slo": 0}, "'slo'"),
        ({"slo": "inf"}, "'slo'"),
        ({"tiers": []}, "'tiers'"),
        ({"write_queue": "1 parsec"}, "1 parsec"),
        ({"load_memory": "some"}, "not a size: 'some'"),
        ({"limits": {"disk": {"read_deadlin": 1}}}, "read_deadlin"),
        ({"drift": {"sample_rate": 2}}, "drift sample_rate 2.0: allowed is 0 to 1"),
        ({"drift": {"window": 4}}, "drift least 8: allowed is 2 to the window, 4"),
        ({"drift": {"rate": 1}}, "drift.rate"),
    ],
)
def test_bad_values_are_named_in_one_line(overrides, says):
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides=overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_drift(monkeypatch):
    assert load_settings().drift_options == DriftOptions()
    monkeypatch.setenv("DROIDSPEAK_DRIFT", '{"sample_rate": 0.5}')
    assert load_settings().drift_options == DriftOptions(sample_rate=0.5)


def test_policies(monkeypatch, tmp_path):
    assert len(open_policies(load_settings())) == 0
    monkeypatch.setenv("DROIDSPEAK_POLICIES", str(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    policies = open_policies(load_settings())
    assert [refusal.path.name for refusal in policies.refused] == ["broken.json"]
    with pytest.raises(PolicyError, match="cannot be read"):
        open_policies(load_settings(overrides={"policies": tmp_path / "none"}))


def test_requirement(monkeypatch):
    assert load_settings().requirement == Requirement()
    monkeypatch.setenv("DROIDSPEAK_SLO", "0.5")
    assert load_settings(overrides={"quality_floor": 0.9}).requirement == Requirement(0.9, 0.5)


@pytest.mark.parametrize(
    ("content", "says"), [("a: [", "is not YAML"), ("- 1", "must be a mapping"), ("1: 2", "key '1'")]
)
def test_bad_files(tmp_path, content, says):
    file = tmp_path / "droidspeak.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_settings(file)
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "none.yaml")


def test_the_server_section(tmp_path):
    file = tmp_path / "droidspeak.yaml"
    file.write_text(
        "server:\n  listen: 0.0.0.0:7000\n  http: '[::1]:7001'\n  in_flight: 2GiB\n"
        "  tenants: {acme: {tiers: ['cpu://?capacity=1MiB']}}\n"
    )
    server = load_settings(file).server
    assert str(server.listen) == "0.0.0.0:7000"
    assert not server.listen.loopback
    assert str(server.http) == "[::1]:7001"
    assert server.http is not None
    assert server.http.loopback
    assert server.in_flight == 2 << 30


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"listen": "nowhere"}, "HOST:PORT"),
        ({"listen": "localhost:70000"}, "65535"),
        ({"port": 1}, "unknown configuration key 'server.port'; allowed: acknowledge"),
        ({"tenants": {"a": {"tiers": ["cpu://"], "quota": 1}}}, "allowed: listen, tiers"),
        ({"tenants": {"../a": {"tiers": ["cpu://"]}}}, "letters, digits"),
        ({"tenants": {"a": {"tiers": []}}}, "server.tenants.a.tiers"),
        ({"http": "0.0.0.0:1"}, "needs tokens"),
        ({"tokens": [{"name": "x"}]}, "exactly one of"),
        ({"tokens": [{"name": "x", "token": "short-secret"}]}, "16 characters"),
        ({"tokens": [{"name": "x", "token": "a-secret-that-is-long", "tenant": "b"}]}, "unknown tenant 'b'"),
        ({"tokens": [{"name": "x", "token": "a-secret-that-is-long", "scopes": ["root"]}]}, "'read'"),
        ({"max_object": "2GiB"}, "2147483647"),
        ({"in_flight": "1MiB"}, "at least max_object"),
        ({"in_flight": "a lot"}, "not a size"),
    ],
)
def test_a_wrong_server_section_is_told_in_one_line(section, told):
    with pytest.raises(ConfigError) as error:
        load_settings(overrides={"server": section})
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
