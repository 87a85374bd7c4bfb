"""DroidSpeak: share KV caches between fine-tuned variants of one model (arXiv 2411.02820).

`storage` keeps chunks in tiers, `layerselect` decides what to reuse and what to recompute,
`connector` serves engines layer by layer, `integrations` are the doors.
"""

from droidspeak.errors import DroidSpeakError

__all__ = ["DroidSpeakError", "__version__"]

__version__ = "0.1.0"
