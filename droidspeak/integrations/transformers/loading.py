"""Loading models from folders, for commands that are given folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from droidspeak.errors import UsageError

__all__ = ["eos_ids", "load_model"]


def load_model(folder: Path | str, device: str = "cpu") -> PreTrainedModel:
    """The model of a transformers folder on `device`, in its own dtype, in eval mode. Raises `UsageError`."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no model folder: needed are config.json and safetensors weights")
    try:
        dtype = AutoConfig.from_pretrained(folder).dtype
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"model {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return cast(PreTrainedModel, model.eval())


def eos_ids(model: Any) -> frozenset[int]:
    """Tokens that end an answer of `model`; none if its generation config names none."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
