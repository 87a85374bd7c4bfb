"""Share a prefix between two models with your own generate loop: python examples/own_loop.py"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from droidspeak.connector import ConnectorOptions
from droidspeak.integrations.transformers import DroidSpeak
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.prompts import load_prompts
from droidspeak.storage import SourceManifest, TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier

LAB = Path(__file__).parents[1] / "lab"
SENDER, RECEIVER = LAB / "models" / "coder", LAB / "models" / "base"
OPTIONS = ConnectorOptions(chunk_size=16)


def main() -> None:
    """The sender prefills; the receiver recomputes layers 0-2 and answers."""
    sender, receiver = SourceManifest.from_folder(SENDER), SourceManifest.from_folder(RECEIVER)
    plan = Plan.parse("0-2", sender.architecture.layers)
    policies = PolicySet([Policy.fixed(sender.source_id, receiver.source_id, plan)])
    tokenizer = AutoTokenizer.from_pretrained(RECEIVER)
    prompt = load_prompts(LAB / "prompts" / "base.jsonl")[0]
    ids = tokenizer(f"{prompt.prefix} {prompt.question}", return_tensors="pt").input_ids[0]

    with (
        tempfile.TemporaryDirectory() as folder,
        TieredStore([MemoryTier(capacity=1 << 28), DiskTier(Path(folder))]) as store,
    ):
        model = AutoModelForCausalLM.from_pretrained(SENDER, dtype=torch.bfloat16).eval()
        with DroidSpeak(model, store, policies, folder=SENDER, options=OPTIONS) as droid:
            print("sender:", droid.prefill(ids).outcome.reason)

        model = AutoModelForCausalLM.from_pretrained(RECEIVER, dtype=torch.bfloat16).eval()
        with DroidSpeak(model, store, policies, folder=RECEIVER, options=OPTIONS) as droid:
            prefix = droid.prefill(ids)
            print(f"receiver: {prefix.outcome.reason}, {prefix.tokens} of {len(ids)} tokens, plan {plan}")
            said = greedy(model, prefix.past_key_values, ids[None, prefix.tokens :])
            print(f"{prompt.question} -> {tokenizer.decode(said)} (right: {prompt.answer})")


def greedy(model: PreTrainedModel, cache: DynamicCache, step: torch.Tensor) -> list[int]:
    """Any generate loop: the cache is an ordinary one."""
    said: list[int] = []
    with torch.no_grad():
        while len(said) < 8:
            step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            if int(step) == model.generation_config.eos_token_id:
                break
            said.append(int(step))
    return said


if __name__ == "__main__":
    main()
