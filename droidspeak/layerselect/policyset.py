"""The policies that one process follows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from droidspeak.errors import PolicyError
from droidspeak.layerselect.artifact import read_artifact, read_pair
from droidspeak.layerselect.policy import Policy

__all__ = ["PolicySet", "Refusal"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """A policy file that is not followed.

    Attributes:
        reason: one line.
        sender, receiver: source ids that it names, as far as they can be read.
    """

    path: Path
    reason: str
    sender: str | None
    receiver: str | None


class PolicySet:
    """Policies by pair; a later policy of a pair replaces the earlier one. Threads may share it.

    Attributes:
        refused: files of the folder that are not followed.
    """

    def __init__(self, policies: Iterable[Policy] = (), refused: Iterable[Refusal] = ()) -> None:
        self._by_pair: dict[tuple[str, str], Policy] = {}
        self.refused = tuple(refused)
        for policy in policies:
            self.add(policy)

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """Every `*.json` of `folder`; of two policies of one pair the later made counts.

        A file that is no sound policy stops nothing: it is logged, and kept in `refused`.

        Raises:
            PolicyError: the folder cannot be read.
        """
        folder = Path(folder)
        try:
            paths = sorted(path for path in folder.iterdir() if _is_policy(path))
        except OSError as error:
            raise PolicyError(f"policies {folder} cannot be read: {error.strerror}") from None
        found, refused = [], []
        for path in paths:
            try:
                artifact = read_artifact(path)
                found.append((artifact.created, path.name, artifact.policy(folder)))
            except PolicyError as error:
                _log.warning("%s; its pair does not share", error)
                refused.append(Refusal(path, str(error), *read_pair(path)))
        return cls([policy for _, _, policy in sorted(found, key=lambda row: row[:2])], refused)

    def add(self, policy: Policy) -> None:
        self._by_pair[policy.sender, policy.receiver] = policy

    def get(self, sender: str, receiver: str) -> Policy | None:
        return self._by_pair.get((sender, receiver))

    def for_receiver(self, receiver: str) -> list[Policy]:
        """Policies for caches that `receiver` uses, in the order in which their pairs were added."""
        return [policy for policy in self._policies() if policy.receiver == receiver]

    def for_sender(self, sender: str) -> list[Policy]:
        """Policies for caches of `sender`, in the order in which their pairs were added."""
        return [policy for policy in self._policies() if policy.sender == sender]

    def refused_senders(self, receiver: str) -> list[str]:
        """Source ids of senders whose policy for `receiver` was refused, and that have no other."""
        return [
            refusal.sender
            for refusal in self.refused
            if refusal.sender is not None
            and refusal.receiver == receiver
            and self.get(refusal.sender, receiver) is None
        ]

    def names(self, model: str) -> bool:
        """Whether some policy is for caches of `model`, or for caches that it uses."""
        return any(model in pair for pair in list(self._by_pair))

    def transition_layers(self, sender: str) -> frozenset[int]:
        """Layers whose E some policy needs from `sender`."""
        needed = [policy.transition_layers for policy in self._policies() if policy.sender == sender]
        return frozenset().union(*needed)

    def __len__(self) -> int:
        return len(self._by_pair)

    def _policies(self) -> list[Policy]:
        # In one step: another thread may add a policy meanwhile.
        return list(self._by_pair.values())


def _is_policy(path: Path) -> bool:
    return path.suffix == ".json" and not path.name.startswith(".")
