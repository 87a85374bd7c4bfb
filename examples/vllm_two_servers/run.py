"""Two vLLM servers of two models: the first prefills, the second starts from what the first has computed.

    .venv-vllm/bin/python examples/vllm_two_servers/run.py
    .venv-vllm/bin/python examples/vllm_two_servers/run.py --sender A --receiver B --policies FOLDER \\
        --prompts P.jsonl

Without arguments: two models of the lab, of which the receiver recomputes layers 0-2. Everything
is written to a temporary folder, and both servers end with this script.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import APIConnectionError, OpenAI

from droidspeak.layerselect import Plan, Policy
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import SourceManifest

ROOT = Path(__file__).parents[2]
# The first three keep everything on this machine. One thread per engine: two of them share a few cores.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    **os.environ,
}
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--block-size", "32"]
CHUNK = 64


def write_fixed_policy(folder: Path, sender: Path, receiver: Path, plan: str) -> Path:
    """A folder with one policy: `plan`, which you vouch for. `droidspeak profile` finds plans."""
    mine, theirs = (SourceManifest.from_folder(path) for path in (sender, receiver))
    folder.mkdir()
    policy = Policy.fixed(mine.source_id, theirs.source_id, Plan.parse(plan, mine.architecture.layers))
    write_policy(folder / "pair.json", policy, Side.of(sender.name, mine), Side.of(receiver.name, theirs))
    return folder


def flags(role: str, model: Path, policies: Path, tier: str) -> list[str]:
    """What `droidspeak vllm-args` says."""
    command = [sys.executable, "-m", "droidspeak", "vllm-args", "--role", role, "--model", str(model)]
    command += ["--policies", str(policies), "--tier", tier, "--chunk-size", str(CHUNK)]
    return shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@dataclass(frozen=True)
class Server:
    """One vLLM server, and a client of it."""

    process: subprocess.Popen[bytes]
    log: Path
    client: OpenAI

    def await_ready(self) -> None:
        """Returns when it answers; exits with the end of its log if it ends instead."""
        while self.process.poll() is None:
            try:
                self.client.models.list()
            except APIConnectionError:
                time.sleep(0.5)
            else:
                return
        sys.exit(f"the server ended:\n{self.log.read_text()[-2000:]}")


@contextmanager
def starting(model: Path, arguments: list[str], log: Path) -> Iterator[Server]:
    """A server that is starting; it ends afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*SERVER, "--model", str(model), "--served-model-name", "it", "--port", str(port), *arguments]
    print(f"starting {model.name} on port {port}", flush=True)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=ENVIRONMENT)
    try:
        yield Server(process, log, OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"))
    finally:
        process.terminate()
        process.wait()


def ask(server: Server, prompt: str, tokens: int, **options: Any) -> tuple[str, dict[str, Any], float]:
    """The answer, what became of the cache, and milliseconds."""
    started = time.perf_counter()
    answer = server.client.completions.create(
        model="it",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"add_special_tokens": False, "kv_transfer_params": {"droidspeak": options}},
    ).model_dump()
    milliseconds = 1e3 * (time.perf_counter() - started)
    return answer["choices"][0]["text"].strip(), answer["kv_transfer_params"]["droidspeak"], milliseconds


def parsed() -> argparse.Namespace:
    models = ROOT / "lab" / "models"
    parser = argparse.ArgumentParser(description="Two vLLM servers that share.")
    parser.add_argument("--sender", type=Path, default=models / "coder", help="model folder")
    parser.add_argument("--receiver", type=Path, default=models / "base", help="model folder")
    parser.add_argument("--policies", type=Path, help="folder of policy files; without it --plan is followed")
    parser.add_argument("--plan", default="0-2", help="layers to recompute, such as 0-2, or reuse")
    parser.add_argument("--prompts", type=Path, default=ROOT / "lab" / "prompts" / "base.jsonl")
    parser.add_argument("--count", type=int, default=6, help="prompts to ask")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    lines = options.prompts.read_text().splitlines()
    rows = [json.loads(line) for line in lines[:: max(1, len(lines) // options.count)]][: options.count]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        sides = options.sender, options.receiver
        policies = options.policies or write_fixed_policy(folder / "policies", *sides, options.plan)
        servers = []
        for role, model in zip(("sender", "receiver"), sides, strict=True):
            arguments = flags(role, model, policies, f"disk://{folder}/store?capacity=10GiB")
            servers.append(stack.enter_context(starting(model, arguments, folder / f"{role}.log")))
        sender, receiver = servers
        for server in servers:
            server.await_ready()
        for row in rows:
            ask(sender, row["prefix"], 1)
        time.sleep(2)  # what has been prefilled is stored in the background
        report(receiver, rows)


def report(receiver: Server, rows: list[dict[str, str]]) -> None:
    """Each prompt with the sender's cache, and with none."""
    ask(receiver, rows[0]["question"], 1)  # an engine's first request is a slow one
    for row in rows:
        prompt = f"{row['prefix']} {row['question']}"
        said, told, shared = ask(receiver, prompt, 8)
        own, _, full = ask(receiver, prompt, 8, load=False)
        plan = f"plan {told['plan']}, {told['shared_tokens']} tokens shared, {shared:.0f} ms"
        print(f"\n{row['question']}  (expected: {row['answer']})")
        print(f"  {said:<24} {told['status']}, {told['reason']}: {plan}")
        print(f"  {own:<24} without the store: {full:.0f} ms")


if __name__ == "__main__":
    main()
