"""A match: which chunks serve which tokens of a prompt.

tokens   | 0 .. exact | .. shared            | .. end of prompt |
served by| own chunks | another model's, by  | prefill          |
         |            | the plan             |                  |
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from droidspeak.connector.status import Reason
from droidspeak.layerselect import Plan, Policy
from droidspeak.storage import ChunkInfo, SourceManifest

__all__ = ["Match"]


@dataclass(frozen=True)
class Match:
    """What a lookup found.

    Attributes:
        receiver: `None` if the model could not be identified; then there are no chunks.
        reason: what the outcome will be if loading succeeds; why there are no chunks, without any.
        length: tokens of the prompt.
        exact: the receiver's own leading chunks.
        shared: chunks of `source` after them, to be used by `plan` of `policy`.
        withheld: the match that the drift guard keeps back, for a shadow prefill to try.
        predicted_ttft: seconds to the first token by the costs of `policy`, if it has any.
    """

    receiver: SourceManifest | None
    reason: Reason
    length: int
    chunk_size: int
    exact: tuple[ChunkInfo, ...] = ()
    shared: tuple[ChunkInfo, ...] = ()
    plan: Plan | None = None
    source: str | None = None
    policy: Policy | None = None
    withheld: Match | None = None
    predicted_ttft: float | None = None

    @property
    def exact_tokens(self) -> int:
        return len(self.exact) * self.chunk_size

    @property
    def shared_tokens(self) -> int:
        return len(self.shared) * self.chunk_size

    @property
    def tokens(self) -> int:
        """Leading tokens that need no prefill."""
        return self.exact_tokens + self.shared_tokens

    def __bool__(self) -> bool:
        return bool(self.exact or self.shared)

    def up_to_missing_e(self, e_layers: Collection[int]) -> Match:
        """Itself, less the own chunks from the first that lacks E of one of `e_layers`.

        Prefilling those again saves them with E, once: chunks that were stored before a policy asked
        for E would otherwise never serve it. A match that shares is left as it is.
        """
        count = next(
            (n for n, info in enumerate(self.exact) if not set(e_layers) <= set(info.e_layers)),
            len(self.exact),
        )
        if self.shared or count == len(self.exact):
            return self
        return replace(self, exact=self.exact[:count]) if count else self.without_chunks(Reason.E_MISSING)

    def without_chunks(self, reason: Reason) -> Match:
        """The match of a prompt that is prefilled after all, because of `reason`."""
        nothing = Match(self.receiver, reason, self.length, self.chunk_size)
        return replace(nothing, withheld=self.withheld)
