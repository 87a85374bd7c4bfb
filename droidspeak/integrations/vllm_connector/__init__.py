"""The vLLM door: cross-model sharing between vLLM engines.

vLLM loads `DroidSpeakConnector` from here by name; nothing of vLLM is imported before that.
"""

from typing import Any

__all__ = ["DroidSpeakConnector"]


def __getattr__(name: str) -> Any:
    if name == "DroidSpeakConnector":
        from droidspeak.integrations.vllm_connector.connector import DroidSpeakConnector

        return DroidSpeakConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
