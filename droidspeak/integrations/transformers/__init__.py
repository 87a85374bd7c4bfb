"""The transformers door: any decoder-only model of the `model.model.layers` shape."""

from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.door import DroidSpeak, Generation, Prefix
from droidspeak.integrations.transformers.identity import manifest_of
from droidspeak.integrations.transformers.kv import past_key_values
from droidspeak.integrations.transformers.partial import PrefixKV, capture, partial_prefill

__all__ = [
    "Decoder",
    "DroidSpeak",
    "Generation",
    "Prefix",
    "PrefixKV",
    "capture",
    "manifest_of",
    "partial_prefill",
    "past_key_values",
]
