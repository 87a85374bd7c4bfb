"""The whole `lmcache server` with our L2 adapter, and a client over ZMQ: the road of an engine on CPU."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import torch

from .l2_objects import (
    SECONDS,
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
    RequestClientFactory,
    chunk_files,
    eventually,
)
from .test_l2_manager import adapter_json, environment

LMCACHE = Path(sys.executable).with_name("lmcache")
CHUNK, CHUNKS = 16, 4
LAYOUT = {
    "block_size": CHUNK,
    "num_layers": 2,
    "hidden_dim_size": 64,
    "dtype_str": "bfloat16",
    "use_mla": False,
}


def free_ports(count):
    """Ports that nobody listens on now; LMCache does not tell which one it got for port 0."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Server:
    def __init__(self, folder, log):
        port, http = free_ports(2)
        self.address, self.http = f"tcp://127.0.0.1:{port}", f"http://127.0.0.1:{http}"
        command = [LMCACHE, "server", "--host", "127.0.0.1", "--port", str(port), "--http-host", "127.0.0.1"]
        command += ["--http-port", str(http), "--disable-metrics", "--chunk-size", str(CHUNK)]
        command += ["--supported-transfer-mode", "engine_driven", "--shm-name", "", "--l1-size-gb", "0.25"]
        command += ["--no-l1-use-lazy", "--eviction-policy", "LRU"]
        command += ["--l2-adapter", adapter_json(tiers=[f"disk://{folder}"])]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
        assert eventually(self.answers), log.read_text()[-4000:]

    def answers(self):
        try:
            return self.get("/status")["is_healthy"]
        except OSError:
            return False

    def get(self, path):
        return self.call("GET", path)

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.http + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(10)


class Engine:
    """What the engine's worker and scheduler ask of the server."""

    def __init__(self, server):
        self.client = RequestClientFactory.create(server.address)
        payload = RegisterEngineDrivenContextPayload(
            instance_id=1, model_name="org/model", world_size=1, num_physical_slots=CHUNK, **LAYOUT
        )
        self.client.register_kv_cache_engine_driven_context(payload).result(SECONDS)

    def key(self, request, salt=""):
        tokens = list(range(CHUNK * CHUNKS))
        return IPCCacheServerKey.from_token_ids(
            "org/model", 1, 0, tokens, 0, len(tokens), request, cache_salt=salt
        )

    def lookup(self, key):
        """Leading chunks that are in L1 now."""
        self.client.lookup(key.no_worker_id_version(), 1).result(SECONDS)
        return self.client.wait_prefetch_status(key.request_id, SECONDS).result(SECONDS)

    def store(self, key, chunks):
        self.client.prepare_store(key, 1).result(SECONDS)
        return self.client.commit_store(key, 1, pickle.dumps(chunks)).result(SECONDS)

    def retrieve(self, key):
        answer = self.client.prepare_retrieve(key, 1).result(SECONDS)
        self.client.commit_retrieve(key, 1).result(SECONDS)
        return pickle.loads(answer.data) if answer.success else None

    def close(self):
        self.client.close()


def test_a_prefix_goes_through_the_server_and_comes_back(tmp_path):
    chunks = [torch.randn(2, 2, CHUNK, 64).to(torch.bfloat16) for _ in range(CHUNKS)]
    folder = tmp_path / "store"
    with Server(folder, tmp_path / "log") as server, closing(Engine(server)) as engine:
        assert engine.lookup(engine.key("first")) == 0
        assert engine.store(engine.key("first"), chunks)
        assert eventually(lambda: len(chunk_files(folder)) == CHUNKS)
        (status,) = server.get("/status")["storage_manager"]["l2_adapters"]
        assert status["type"] == "DroidSpeakL2Adapter"
        engine.client.clear(True).result(SECONDS)
        assert engine.lookup(engine.key("second")) == CHUNKS
        assert all(map(torch.equal, engine.retrieve(engine.key("second")), chunks))
        assert engine.lookup(engine.key("third", salt="other")) == 0

        first = server.get("/cache/objects?page_size=3")
        assert len(first["entries"]) == 3
        rest = server.get(f"/cache/objects?page_token={quote(first['next_page_token'])}")
        entries = first["entries"] + rest["entries"]
        assert [entry["size_bytes"] for entry in entries] == [chunks[0].nbytes] * CHUNKS
        body = {"tier": "all", "keys": [entry["key"] for entry in entries]}
        assert server.call("DELETE", "/cache/objects", body)["ok"]
        assert chunk_files(folder) == []
        assert engine.lookup(engine.key("fourth")) == 0
        server.process.terminate()
        server.process.wait(SECONDS)
        assert list((folder / "writers").iterdir()) == [], "the adapter was closed"
