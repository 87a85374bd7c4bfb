"""What a request says of its cache, and what is known of it while it runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from droidspeak.connector import Match, Outcome, Reason
from droidspeak.integrations.vllm_connector.messages import LoadReport
from droidspeak.layerselect import Requirement
from droidspeak.storage import SourceManifest

__all__ = ["PARAMETERS", "RequestOptions", "RequestState"]

_log = logging.getLogger(__name__)

PARAMETERS = "droidspeak"
"""Key of our part in a request's and a response's `kv_transfer_params`."""


class RequestOptions(BaseModel):
    """`kv_transfer_params: {"droidspeak": {...}}` of one request.

    Attributes:
        load: use the store at all.
        share: use other models' caches.
        save: keep what is prefilled.
        quality_floor, slo: what the plan must reach, instead of the engine's settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    load: bool = True
    share: bool = True
    save: bool = True
    quality_floor: float | None = Field(default=None, ge=0, le=1)
    slo: float | None = Field(default=None, gt=0)

    @classmethod
    def of(cls, parameters: Mapping[str, Any] | None) -> RequestOptions:
        """Of a request's `kv_transfer_params`; parameters that are wrong ask for nothing, and are logged."""
        given = (parameters or {}).get(PARAMETERS)
        if given is None:
            return cls()
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, (PARAMETERS, *first["loc"])))
            _log.warning("kv_transfer_params %s: %s; this request uses no cache", place, first["msg"])
            return cls(load=False, share=False, save=False)

    def requirement(self, default: Requirement) -> Requirement:
        """What plans must reach for this request."""
        return Requirement(
            default.quality_floor if self.quality_floor is None else self.quality_floor,
            default.slo if self.slo is None else self.slo,
        )


@dataclass
class RequestState:
    """One request, in the scheduler.

    Attributes:
        source: the model it runs on, adapters included.
        tokens: of the prompt.
        match: the last lookup's, `None` before there was one.
        looked_up: when that was, on the monotonic clock.
        admitted: vLLM has given it blocks; until then it waits.
        covered: vLLM's own prefix cache held all that the match has.
        ordered: its chunks are being loaded, or have been.
        approximate: another model's KV is in its blocks, so nothing of it is exact from there on.
        adapter: its LoRA in vLLM's numbers, 0 for none.
        doubtful: it may have been computed with another request's adapter.
        report: of its load, `None` before it has ended.
        failure: a load failed; the request asks for no other one.
        saved: leading chunks that need no saving any more.
        told: its outcome has been told to the API server.
    """

    options: RequestOptions
    source: SourceManifest | None
    salt: str
    tokens: tuple[int, ...]
    match: Match | None = None
    looked_up: float = 0.0
    admitted: bool = False
    covered: bool = False
    ordered: bool = False
    approximate: bool = False
    adapter: int = 0
    doubtful: bool = False
    failure: Reason | None = None
    report: LoadReport | None = None
    saved: int = 0
    told: bool = False

    @property
    def settled(self) -> bool:
        """Whether the outcome is known: what was to be loaded has come, or has failed."""
        return self.admitted and not (self.ordered and self.report is None)

    @property
    def outcome(self) -> Outcome:
        """The answer to the request, as far as it is known."""
        match = self.match
        report = self.report or LoadReport(0, 0.0)
        loaded = report.bytes_loaded, report.wait_seconds
        if self.failure is not None:
            return Outcome(self.failure, len(self.tokens), 0, 0, None, None, *loaded)
        if not self.options.load:
            return Outcome(Reason.OPTED_OUT, len(self.tokens))
        if match is None:
            return Outcome(Reason.MISS, len(self.tokens))
        if not match:
            return Outcome(match.reason, len(self.tokens))
        if not self.ordered:
            # One that was given up before it was admitted has used nothing.
            return Outcome(Reason.EXACT_HIT if self.covered else Reason.MISS, len(self.tokens))
        return Outcome(
            match.reason,
            len(self.tokens),
            match.exact_tokens,
            match.shared_tokens,
            match.plan,
            match.source,
            *loaded,
        )
