"""The error tree. A miss is a value (`None`); a failure is an exception from this tree.

DroidSpeakError
├── UsageError (ValueError)             the caller's mistake: one line for people, exit status 2
│   ├── ConfigError                     a configuration key, URL or option that is not allowed
│   ├── PromptError                     a prompt file or row that cannot be used
│   ├── PolicyError                     a policy file that cannot be used, or is for another pair
│   ├── MapsUnusable                    fitted maps that are missing, altered, or for another model
│   └── MissingExtra (ImportError)      an optional part is not installed; names the extra
├── IdentityError (ValueError)          two sides that may not share; nothing is ever guessed
│   ├── UnknownIdentity                 weights, tokenizer or architecture cannot be identified
│   └── Incompatible                    identified, but different; carries the `reason`
├── StorageError                        something is wrong with a tier or with what it holds
│   ├── ChunkCorrupt (ValueError)       bytes that are not the chunk that was stored
│   ├── ChunkIncomplete (LookupError)   a chunk without the slots that were asked for
│   ├── TierUnavailable (OSError)       the tier cannot be reached, read or written
│   │   └── TierClosed                  and will not be any more: its owner has closed it
│   ├── TierTimeout (TimeoutError)      the tier did not answer before its deadline
│   └── TierFull                        no room, and nothing may be evicted
├── NotFound (LookupError)              what the caller named is not there
├── Declined                            a change that needs a yes did not get one
└── LoadFailed                          a layer stream that cannot go on; carries the `reason`
"""

from __future__ import annotations

__all__ = [
    "ChunkCorrupt",
    "ChunkIncomplete",
    "ConfigError",
    "Declined",
    "DroidSpeakError",
    "IdentityError",
    "Incompatible",
    "LoadFailed",
    "MapsUnusable",
    "MissingExtra",
    "NotFound",
    "PolicyError",
    "PromptError",
    "StorageError",
    "TierClosed",
    "TierFull",
    "TierTimeout",
    "TierUnavailable",
    "UnknownIdentity",
    "UsageError",
]


class DroidSpeakError(Exception):
    """Root of everything that DroidSpeak raises on purpose."""


class UsageError(DroidSpeakError, ValueError):
    """The caller's mistake. The message names what is wrong and what is allowed."""


class ConfigError(UsageError):
    """A configuration key, URL or option that is not allowed."""


class PromptError(UsageError):
    """A prompt file or row that cannot be used."""


class MapsUnusable(UsageError):
    """Fitted maps that are missing, not what was fitted, or for a model of another shape."""


class PolicyError(UsageError):
    """A policy file that cannot be read or written, was changed, or is for another pair."""


class MissingExtra(UsageError, ImportError):
    """An optional part is not installed."""

    def __init__(self, part: str, extra: str) -> None:
        super().__init__(f"{part} needs an optional part: pip install 'droidspeak[{extra}]'")
        self.extra = extra


class IdentityError(DroidSpeakError, ValueError):
    """Two sides that may not share a cache."""


class UnknownIdentity(IdentityError):
    """Weights, tokenizer or architecture that cannot be identified: never a match."""


class Incompatible(IdentityError):
    """Both sides are identified and differ; `reason` is a `droidspeak.storage.Mismatch`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StorageError(DroidSpeakError):
    """Something is wrong with a tier or with what it holds."""


class ChunkCorrupt(StorageError, ValueError):
    """Bytes that are not the chunk that was stored: checksum, shape, key or length differ.

    `kind` tells `truncated` and `wrong_key` from all else that is `corrupt`.
    """

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind


class ChunkIncomplete(StorageError, LookupError):
    """A sound chunk that lacks slots that were asked for (an E layer, usually)."""


class TierUnavailable(StorageError, OSError):
    """The tier cannot be reached, read or written."""


class TierClosed(TierUnavailable):
    """The tier was closed by who opened it: it does not get better by waiting."""


class TierTimeout(StorageError, TimeoutError):
    """The tier did not answer before its deadline."""


class TierFull(StorageError):
    """No room for the chunk, and nothing that may be evicted."""


class NotFound(DroidSpeakError, LookupError):
    """What the caller named is not there."""


class Declined(DroidSpeakError):
    """A change that needs a yes was answered with no, or there is nobody to ask."""


class LoadFailed(DroidSpeakError):
    """A layer stream that cannot go on; `reason` says why (`droidspeak.connector.Reason`)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
