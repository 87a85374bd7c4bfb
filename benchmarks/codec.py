"""`zstd` on the KV cache of the lab's models."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import interleaved, table
from droidspeak.integrations.transformers import capture
from droidspeak.integrations.transformers.answer import PromptEncoder
from droidspeak.prompts import load_prompts
from droidspeak.storage.codecs import get_codec

_LAB = Path(__file__).parents[1] / "lab"


def _kv(name: str) -> dict[str, torch.Tensor]:
    folder = _LAB / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompts = load_prompts(_LAB / "prompts" / f"{name}.jsonl")
    encoder = PromptEncoder(folder, model.config.vocab_size)
    prefixes = {tuple(encoder.encode(prompt)[0]) for prompt in prompts}
    layers = [layer for prefix in sorted(prefixes) for layer in capture(model, torch.tensor(prefix)).layers]
    return {
        "K": torch.cat([k.flatten() for k, _ in layers]),
        "V": torch.cat([v.flatten() for _, v in layers]),
    }


def _row(kind: str, tensor: torch.Tensor) -> list[str]:
    codec = get_codec("zstd")
    stored, out = codec.encode(tensor), torch.empty_like(tensor)
    series = interleaved(
        {"encode": lambda: codec.encode(tensor), "decode": lambda: codec.decode(stored, out)}, rounds=5
    )
    assert torch.equal(out.view(torch.int16), tensor.view(torch.int16))
    return [
        kind,
        f"{tensor.nbytes / 2**20:.1f}",
        f"{tensor.nbytes / stored.numel():.2f}",
        series["encode"].rate(tensor.nbytes),
        series["decode"].rate(tensor.nbytes),
    ]


def run() -> str:
    """The section of the report."""
    rows = [
        _row(f"{name}, {kind}", tensor) for name in ("base", "coder") for kind, tensor in _kv(name).items()
    ]
    columns = ["bfloat16 cache of", "MiB", "ratio", "encode GB/s", "decode GB/s"]
    return "## zstd\n\nOne thread, level 1, byte planes.\n\n" + table(columns, rows)
