"""Engines of vLLM for tests, each in a process of its own, since the connector is one per process.

    with Nursery(folder) as nursery, nursery.start(model, tiers=[...]) as engine:
        (answer,) = engine.ask(Request(token_ids))

One process imports vLLM, and every engine is forked from it: that saves each the imports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .engine import Answer, Request

__all__ = ["Answer", "Engine", "Failed", "Nursery", "Request"]

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM compiles one function of its sampler even in eager mode.
    "TORCHDYNAMO_DISABLE": "1",
}


class Failed(Exception):
    """The engine's own error, in its words."""


class Engine:
    """One `vllm.LLM` in another process.

    Attributes:
        log: what it printed.
    """

    def __init__(self, connection: Connection, log: Path) -> None:
        self._connection, self.log = connection, log
        self._pid: int = self._answer()

    def ask(self, *requests: Request) -> list[Answer]:
        """Answers to requests that run together."""
        answers: list[Answer] = self._call("ask", requests)
        return answers

    def forget(self) -> bool:
        """Empties vLLM's own prefix cache; whether all blocks were free."""
        return bool(self._call("forget"))

    def tell(self, *requests: Request) -> list[Answer]:
        """Answers to requests that run one by one."""
        return [self.ask(request)[0] for request in requests]

    def insist(self, plan: str) -> None:
        """From now on other models' caches are used by `plan`, whatever policies say."""
        self._call("insist", plan)

    def count(self, name: str, **labels: str) -> int:
        """vLLM's counter `vllm:NAME`, all that have these labels together."""
        return int(self._call("count", name, labels))

    def said(self, text: str) -> bool:
        """Whether it printed `text`."""
        return text in self.log.read_text()

    def close(self) -> None:
        """Ends the engine, after it has saved what it was saving. Calling it twice is fine."""
        if self._connection.closed:
            return
        try:
            self._call("close")
        finally:
            self._connection.close()
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, *message: Any) -> Any:
        self._connection.send(message)
        return self._answer()

    def _answer(self) -> Any:
        try:
            well, answer = self._connection.recv()
        except EOFError:
            raise AssertionError(f"the engine is gone: {self.log.read_text()[-3000:]}") from None
        if not well:
            raise Failed(answer)
        return answer


class Nursery:
    """Starts engines; `folder` takes their logs and vLLM's own cache."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._listener = Listener(None, "AF_UNIX", authkey=b"engines")
        environment = {**os.environ, **_ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / "vllm")}
        self._log = (folder / "nursery.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("engine.py")), str(self._listener.address)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
        )

    def start(
        self,
        model: Path,
        *,
        role: str = "kv_both",
        e_layers: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        engine: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> Engine:
        """An engine that serves `model`; `extra` is the connector's configuration.

        Args:
            e_layers: whose E it captures.
            engine: arguments of `vllm.LLM`.

        Raises:
            Failed: it does not start.
        """
        self._count += 1
        log = self._folder / f"{self._count}.log"
        order = {
            "log": str(log),
            "environment": dict(environment or {}),
            "arguments": {**_arguments(model, role, e_layers, extra), **(engine or {})},
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Engine(self._listener.accept(), log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()
        self._listener.close()


def _arguments(model: Path, role: str, e_layers: Sequence[int], extra: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "block_size": 32,
        "num_gpu_blocks_override": 256,
        "disable_log_stats": False,
        "kv_transfer_config": {
            "kv_connector": "DroidSpeakConnector",
            "kv_connector_module_path": "droidspeak.integrations.vllm_connector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": dict(extra),
        },
    }
    if e_layers:
        arguments["speculative_config"] = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(e_layers)}},
        }
    return arguments
