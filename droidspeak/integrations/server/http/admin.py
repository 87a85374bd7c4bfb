"""Usage, eviction and configuration."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from droidspeak.config.masking import masked
from droidspeak.errors import StorageError
from droidspeak.integrations.server.http.auth import Access, Needs, NeedsDaemon
from droidspeak.integrations.server.http.refusals import RETRY_AFTER, Reason, Refusal, documented
from droidspeak.integrations.server.http.schemas import EvictAnswer, EvictRequest, TierAnswer, UsageAnswer
from droidspeak.storage import Tier

__all__ = ["router"]

router = APIRouter(tags=["administration"])


@router.get("/v1/usage", responses=documented())
def usage(access: Annotated[Access, Depends(Needs("read"))]) -> UsageAnswer:
    """What the tiers hold, and how often what has happened."""
    tiers = [_usage_of(tier) for tier in access.store.tiers]
    if not any(tier.answers for tier in tiers):
        raise Refusal(503, Reason.UNAVAILABLE, "no tier answers", RETRY_AFTER)
    return UsageAnswer(tenant=access.tenant, tiers=tiers, counters=access.store.counters.snapshot())


def _usage_of(tier: Tier) -> TierAnswer:
    try:
        return TierAnswer.of(tier.name, tier.usage())
    except StorageError:
        return TierAnswer.of(tier.name, None)


@router.post("/v1/evict", responses=documented())
def evict(access: Annotated[Access, Depends(Needs("admin"))], asked: EvictRequest) -> EvictAnswer:
    """Evict chunks of one tier, in the order of its policy; pinned ones stay."""
    return EvictAnswer(freed=access.store.evict_from(asked.tier, asked.nbytes))


@router.get("/v1/config", dependencies=[Depends(NeedsDaemon("admin"))], responses=documented())
def config(request: Request) -> dict[str, Any]:
    """The settings as they were resolved. Secrets are shown as `**********`."""
    settings: dict[str, Any] = masked(request.app.state.daemon.settings.model_dump(mode="json"))
    return settings
