"""What plug-ins are told, and what is said when that is wrong."""

from __future__ import annotations

import pytest

from droidspeak.config.opening import open_store_from, release_store
from droidspeak.errors import ConfigError
from droidspeak.integrations.lmcache_plugin.options import PluginOptions, name_of_plugin
from droidspeak.storage import Chunk, ChunkKey
from droidspeak.storage.objects import object_chunk, object_key

from .processes import run

PREFIX = "storage_plugin.droidspeak."
MODULE = "droidspeak.integrations.lmcache_plugin.storage"


def parse(**options) -> PluginOptions:
    return PluginOptions.parse({PREFIX + key: value for key, value in options.items()}, PREFIX)


def test_what_users_write():
    options = parse(
        module_path=MODULE,
        class_name="DroidSpeakStorage",
        tiers=["cpu://?capacity=1MiB"],
        codec="zstd",
        salt="tenant",
        identity="weights",
        assembly_capacity="2MiB",
    )
    assert options.store == {"tiers": ["cpu://?capacity=1MiB"], "codec": "zstd", "salt": "tenant"}
    assert (options.codec, options.salt, options.identity) == ("zstd", "tenant", "weights")
    assert options.assembly_capacity == 2 << 20
    assert options.check == "lookup"


def test_other_plugins_keys_are_not_ours():
    extra = {f"{PREFIX}codec": "zstd", "storage_plugin.other.codec": "nonsense", "save_only_first_rank": True}
    assert PluginOptions.parse(extra, PREFIX).codec == "zstd"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teirs": ["cpu://"]}, ["'teirs'", "allowed", "tiers", "identity"]),
        ({"tiers": []}, ["'tiers'"]),
        ({"codec": "gzip"}, ["gzip", "raw", "zstd"]),
        ({"check": "never"}, ["'check'", "lookup, load", "'never'"]),
        ({"identity": 7}, ["'identity'", "text", "7"]),
        ({"assembly_timeout": 0}, ["'assembly_timeout'", "above 0", "0"]),
        ({"assembly_timeout": "soon"}, ["'assembly_timeout'", "'soon'"]),
        ({"assembly_capacity": "much"}, ["size", "'much'"]),
        ({"config": 5}, ["'config'", "YAML file"]),
        ({"config": "/not/there.yaml"}, ["/not/there.yaml"]),
    ],
)
def test_refused_in_one_line_that_names_the_key(options, words):
    with pytest.raises(ConfigError) as error:
        parse(**options)
    told = str(error.value)
    assert "\n" not in told
    assert told.startswith(PREFIX)
    assert all(word in told for word in words), told


def test_a_configuration_file(tmp_path):
    path = tmp_path / "droidspeak.yaml"
    path.write_text('tiers: ["cpu://?capacity=1MiB"]\ncodec: zstd\n')
    assert parse(config=str(path)).codec == "zstd"
    assert parse(config=str(path), codec="raw").codec == "raw"


def test_the_name_of_a_plugin():
    path = (MODULE, "DroidSpeakStorage")
    extra = {
        "storage_plugin.kv.module_path": MODULE,
        "storage_plugin.kv.class_name": "DroidSpeakStorage",
        "storage_plugin.other.module_path": "elsewhere",
        "storage_plugin.other.class_name": "DroidSpeakStorage",
    }
    assert name_of_plugin(extra, "storage_plugin", path) == "kv"
    twice = extra | {"storage_plugin.other.module_path": MODULE}
    with pytest.raises(ConfigError, match="exactly one NAME, not kv, other"):
        name_of_plugin(twice, "storage_plugin", path)
    with pytest.raises(ConfigError, match="exactly one NAME, not none"):
        name_of_plugin(None, "storage_plugin", path)


def chunk(name: bytes = b"name") -> tuple[ChunkKey, Chunk]:
    torch = pytest.importorskip("torch")
    key = object_key("test", "owner", name)
    return key, object_chunk(key, {0: torch.zeros(8)}, labels={})


def test_one_store_for_one_configuration():
    options = {"tiers": ["cpu://?capacity=1MiB"]}
    one, two = open_store_from(options), open_store_from({**options, "codec": "zstd", "salt": "tenant"})
    other = open_store_from({"tiers": ["cpu://?capacity=2MiB"]})
    assert one is two
    assert other is not one
    key, stored = chunk()
    one.write(stored)
    release_store(one)
    assert two.head(key), "closed while it is used"
    release_store(two)
    again = open_store_from(options)
    assert again is not one
    assert again.head(key) is None
    release_store(again)
    release_store(again)  # not counted twice
    release_store(other)


def test_without_lmcache_one_line_says_what_to_install():
    code = f"""
import sys

class NotInstalled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "lmcache":
            raise ModuleNotFoundError("No module named 'lmcache'", name=name)

sys.meta_path.insert(0, NotInstalled)
for module in ("{MODULE}", "droidspeak.integrations.lmcache_plugin.remote"):
    try:
        __import__(module)
    except ImportError as error:
        print(type(error).__name__, error)
"""
    done = run("-c", code)
    line = "MissingExtra the LMCache plug-in needs an optional part: pip install 'droidspeak[lmcache]'"
    assert done.stdout.splitlines() == [line, line], done.stderr
