"""Real processes: OpenAI servers of vLLM with flags of `droidspeak vllm-args`, and our daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Answer", "Daemon", "Server", "ask", "events", "serving", "start", "wait_for"]

PATIENCE = 120.0
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # vLLM compiles one function of its sampler even in eager mode.
    "TORCHDYNAMO_DISABLE": "1",
}
_ENGINE = ["--enforce-eager", "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "4"]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Returns when `condition` holds; fails with `what` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def flags(*arguments: object) -> list[str]:
    """As `droidspeak vllm-args ARGUMENTS` prints them."""
    command = [sys.executable, "-m", "droidspeak", "vllm-args", *map(str, arguments), "--format", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return list(json.loads(done.stdout)["flags"])


@dataclass
class Server:
    """`python -m vllm.entrypoints.openai.api_server` of one model."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def await_ready(self) -> None:
        """Returns when it answers; fails with the end of its log if it ends instead."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health", timeout=5).status_code == httpx.codes.OK
            return False

        wait_for(ready, f"the server of {self.log.stem}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            # The engine is a child of the server, and all are one group that we have started.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


def start(model: Path, role: str, log: Path, *arguments: object) -> Server:
    """A server that is starting; `arguments` are those of `vllm-args`."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *_ENGINE]
    command += ["--served-model-name", "it", "--host", "127.0.0.1", "--port", str(port)]
    command += flags("--role", role, "--model", model, *arguments)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=ENVIRONMENT, start_new_session=True)
    return Server(process, port, log)


@contextmanager
def serving(*servers: Server) -> Iterator[None]:
    """Waits until all are there, and stops them in the end."""
    try:
        for server in servers:
            server.await_ready()
        yield
    finally:
        for server in servers:
            server.stop()


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and what our connector told of the request."""

    tokens: list[int]
    told: dict[str, Any]

    @property
    def status(self) -> tuple[str, str]:
        return self.told["status"], self.told["reason"]


def ask(server: Server, prompt: Sequence[int], tokens: int = 8, **options: Any) -> Answer:
    """A completion by OpenAI's own client; `options` are the request's `droidspeak` ones."""
    extra: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    if options:
        extra["kv_transfer_params"] = {"droidspeak": options}
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        answer = client.completions.create(
            model="it", prompt=list(prompt), max_tokens=tokens, temperature=0, extra_body=extra
        ).model_dump()
    (choice,) = answer["choices"]
    return Answer(choice["token_ids"], answer["kv_transfer_params"]["droidspeak"])


def events(server: Server) -> dict[tuple[str, str], int]:
    """`vllm:droidspeak_events_total` on the server's `/metrics`, by event and label."""
    text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
    return {
        (sample.labels["event"], sample.labels["label"]): int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:droidspeak_events_total"
    }


class Daemon:
    """`droidspeak serve` over a folder.

    Attributes:
        port: of its HTTP side; it is the same after a restart.
    """

    def __init__(self, folder: Path) -> None:
        self._tier = f"disk://{folder}?min_free=0"
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"droidspeak://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "droidspeak", "serve", "127.0.0.1", "0", "--tier", self._tier]
        command += ["--http", f"127.0.0.1:{self.port}", "--log-level", "error"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready.startswith("READY"), ready
        self.port = int(ready.rpartition(":")[2])

    def freeze(self) -> None:
        """It is there, and does nothing any more."""
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Ends it by SIGKILL; one that is dead already stays so."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
