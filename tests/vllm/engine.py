"""The other end of `engines.py`: imports vLLM once, and forks an engine for every line of standard input."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Client, Connection
from typing import Any

__all__ = ["Answer", "Request"]

_IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.lora.request",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "droidspeak.integrations.vllm_connector.connector",
)
_MODELS = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "ExtractHiddenStatesModel",
)


@dataclass
class Request:
    """One request to an engine.

    Attributes:
        new: tokens to generate, greedily.
        cache: its `kv_transfer_params["droidspeak"]`.
        lora: folder of an adapter.
        at: engine steps that it comes after the first request.
        abort: engine step after which it is given up.
        logprobs: tokens whose logarithm of probability is told at each place; with
            `logprobs_mode="raw_logits"` it is their logit.
    """

    prompt: list[int]
    new: int = 6
    cache: dict[str, Any] = field(default_factory=dict)
    salt: str | None = None
    lora: str | None = None
    at: int = 0
    abort: int | None = None
    logprobs: int = 8


@dataclass
class Answer:
    """What came of a request; one that was given up has no tokens.

    Attributes:
        logprobs: of the likeliest tokens at each place.
        cached: prompt tokens that vLLM counts as not computed.
        told: the response's `kv_transfer_params["droidspeak"]`.
        finish: vLLM's reason.
        steps: of the engine, until it had ended.
        forwards: those of them that computed something; the others only waited.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int
    told: dict[str, Any]
    finish: str
    steps: int
    forwards: int

    @property
    def status(self) -> tuple[str, str]:
        return self.told["status"], self.told["reason"]


class _Engine:
    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**arguments)
        self._count = self._forwards = 0
        self._count_forwards()
        self._adapters: dict[str, int] = {}

    def _count_forwards(self) -> None:
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def counting(*arguments: Any, **options: Any) -> Any:
            scheduled = schedule(*arguments, **options)
            self._forwards += scheduled.total_num_scheduled_tokens > 0
            return scheduled

        scheduler.schedule = counting

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Runs until all have ended."""
        engine = self._llm.llm_engine
        names = [f"request-{self._count + n}" for n in range(len(requests))]
        self._count += len(requests)
        waiting = dict(zip(names, requests, strict=True))
        answers: dict[str, Answer] = {}
        steps, before = 0, self._forwards
        while waiting or engine.has_unfinished_requests():
            for name in [name for name, request in waiting.items() if request.at <= steps]:
                self._add(name, waiting.pop(name))
            for output in engine.step():
                if output.finished:
                    answers[output.request_id] = _answer(output, steps, self._forwards - before)
            steps += 1
            for name, request in zip(names, requests, strict=True):
                if request.abort == steps:
                    engine.abort_request([name])
                    forwards = self._forwards - before
                    answers[name] = Answer([], [], 0, {}, "given up", steps, forwards)
            if steps > _TOO_MANY:
                raise RuntimeError(f"{steps} steps, and no end")
        return [answers[name] for name in names]

    def _add(self, name: str, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        extra = {"kv_transfer_params": {"droidspeak": request.cache}} if request.cache else None
        sampling = SamplingParams(
            temperature=0,
            max_tokens=request.new,
            ignore_eos=True,
            detokenize=False,
            logprobs=request.logprobs,
            extra_args=extra,
        )
        given: dict[str, Any] = {"prompt_token_ids": request.prompt}
        if request.salt is not None:
            given["cache_salt"] = request.salt
        lora = None
        if request.lora is not None:
            number = self._adapters.setdefault(request.lora, len(self._adapters) + 1)
            lora = LoRARequest(os.path.basename(request.lora), number, request.lora)
        self._llm.llm_engine.add_request(name, given, sampling, lora_request=lora)

    def forget(self) -> bool:
        return bool(self._llm.reset_prefix_cache())

    def count(self, name: str, labels: dict[str, str]) -> int:
        found = [metric for metric in self._llm.get_metrics() if metric.name == f"vllm:{name}"]
        return sum(int(metric.value) for metric in found if labels.items() <= metric.labels.items())

    def insist(self, plan: str) -> None:
        """From now on other models' caches are used by `plan`, whatever policies say.

        No policy can say that all is recomputed: the engine prefills then.
        """
        from droidspeak.layerselect import Plan

        connector = self._llm.llm_engine.engine_core.engine_core.scheduler.connector._half._connector
        look_up = type(connector).lookup

        def insisting(*arguments: Any, **options: Any) -> Any:
            match = look_up(connector, *arguments, **options)
            return replace(match, plan=Plan.parse(plan, match.plan.layers)) if match.shared else match

        connector.lookup = insisting

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


_TOO_MANY = 20_000


def _answer(output: Any, steps: int, forwards: int) -> Answer:
    (choice,) = output.outputs
    return Answer(
        list(choice.token_ids),
        [{token: seen.logprob for token, seen in place.items()} for place in choice.logprobs],
        output.num_cached_tokens,
        (output.kv_transfer_params or {}).get("droidspeak", {}),
        str(choice.finish_reason),
        steps,
        forwards,
    )


def _serve(connection: Connection, arguments: dict[str, Any]) -> None:
    try:
        engine = _Engine(arguments)
    except BaseException as error:  # noqa: BLE001 - the test says what is expected
        traceback.print_exc()
        connection.send((False, f"{type(error).__name__}: {error}"))
        return
    connection.send((True, os.getpid()))
    while True:
        method, *values = connection.recv()
        try:
            connection.send((True, getattr(engine, method)(*values)))
        except BaseException as error:  # noqa: BLE001
            traceback.print_exc()
            connection.send((False, f"{type(error).__name__}: {error}"))
        if method == "close":
            return


def main(address: str) -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    _register_models()
    gc.freeze()  # each engine collects several times as it starts
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            _become_engine(address, **json.loads(line))


def _register_models() -> None:
    """Else vLLM looks at each model in a process of its own that imports everything anew."""
    from vllm import ModelRegistry

    for name in _MODELS:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _become_engine(address: str, log: str, environment: dict[str, str], arguments: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        with Client(address, authkey=b"engines") as connection:
            _serve(connection, arguments)
    except EOFError:
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    # Messages name these classes by the module that the tests import them from.
    sys.modules["tests.vllm.engine"] = sys.modules["__main__"]
    Request.__module__ = Answer.__module__ = "tests.vllm.engine"
    main(sys.argv[1])
