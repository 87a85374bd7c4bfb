"""The policy file: a policy, where it comes from, and whom it is for.

    write_profile_policy(path, profile, sender, receiver)    what a profile found
    write_policy(path, policy, sender, receiver)             plans that somebody vouches for
    read_policy(path), read_artifact(path)

One JSON object, format `droidspeak-policy-1`; its schema is `docs/schemas/policy-1.json`. It carries its own
digest, and each side its manifest, whose digest is the side's source id: a file that was changed by hand is
refused, and a side cannot pass for another one. Maps lie beside the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
)

from droidspeak import __version__
from droidspeak.errors import PolicyError, UsageError
from droidspeak.layerselect import measures as measured
from droidspeak.layerselect.plan import Plan
from droidspeak.layerselect.policy import Costs, FrontierPoint, MapFile, Policy, Thresholds
from droidspeak.layerselect.profile import Profile

__all__ = [
    "FORMAT",
    "Artifact",
    "PointPart",
    "Side",
    "read_artifact",
    "read_pair",
    "read_policy",
    "schema",
    "write_policy",
    "write_profile_policy",
]

FORMAT = "droidspeak-policy-1"

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
_NotNegative = Annotated[FiniteFloat, Field(ge=0)]


@dataclass(frozen=True)
class Side:
    """One model of a pair.

    Attributes:
        name: for people.
        manifest: all that its KV cache depends on, as plain JSON values: weights, tokenizer, adapter,
            architecture, layout.
    """

    name: str
    manifest: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, manifest: Any) -> Side:
        """From a `droidspeak.storage.SourceManifest`."""
        return cls(name, dataclasses.asdict(manifest))

    @property
    def source_id(self) -> str:
        """As `SourceManifest.source_id`: SHA-256 of the manifest's canonical JSON, 64 hex digits."""
        return _sha256(self.manifest)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SidePart(_Part):
    """One model: its source id is the SHA-256 of `manifest` as canonical JSON."""

    name: str
    source_id: _Digest
    manifest: dict[str, JsonValue]

    @property
    def side(self) -> Side:
        return Side(self.name, self.manifest)


class ScorePart(_Part):
    """One prompt: task metric, divergence in nats, share of answer tokens that are the receiver's own."""

    quality: _NotNegative
    kl: FiniteFloat
    agreement: _Share


class MeasuresPart(_Part):
    """Means over prompts, the 95 % interval of quality, and the worst prompt."""

    prompts: int = Field(ge=1)
    quality: _NotNegative
    low: _NotNegative
    high: _NotNegative
    kl: FiniteFloat
    agreement: _Share
    worst_prompt: str
    worst: ScorePart

    def content(self) -> measured.Measures:
        """As the rest of the package knows it."""
        worst = measured.Score(**self.worst.model_dump())
        return measured.Measures(**{**self.model_dump(), "worst": worst})


class PointPart(_Part):
    """A plan, and its quality as a share of full prefill's."""

    plan: str
    quality: FiniteFloat
    measures: MeasuresPart | None = None

    def content(self, layers: int) -> FrontierPoint:
        """As the rest of the package knows it. Raises `UsageError`."""
        measures = None if self.measures is None else self.measures.content()
        return FrontierPoint(Plan.parse(self.plan, layers), self.quality, measures)


class ThresholdsPart(_Part):
    """Beyond these the pair has drifted: least token agreement, greatest divergence in nats."""

    agreement: _Share
    kl: _NotNegative


class CostsPart(_Part):
    """Prefill time in seconds; see `droidspeak.layerselect.Costs`."""

    per_token: _NotNegative
    per_token_pair: _NotNegative
    per_mapped_token: _NotNegative
    suffix: _NotNegative


class MapsPart(_Part):
    """A safetensors file in the folder of the policy."""

    file: str = Field(pattern=r"^[^/\\\x00]+$")
    sha256: _Digest


class PromptsPart(_Part):
    """Which prompts were used: ids, and a digest of their content."""

    ids: tuple[str, ...]
    digest: _Digest


class ProfilePart(_Part):
    """How the plans were found, and what both models do on their own."""

    search: Literal["fast", "full"]
    metric: str
    granularity: int = Field(ge=1)
    calibration: PromptsPart
    held_out: PromptsPart
    full_prefill: MeasuresPart
    sender_alone: MeasuresPart
    map_features: str | None = None
    warnings: tuple[str, ...] = ()
    machine: dict[str, JsonValue] = {}


class Artifact(_Part):
    """A policy file. `profile` is `null` for plans that somebody vouches for."""

    format: Literal["droidspeak-policy-1"] = "droidspeak-policy-1"
    sender: SidePart
    receiver: SidePart
    layers: int = Field(ge=1, le=10_000)
    frontier: tuple[PointPart, ...] = Field(min_length=1)
    thresholds: ThresholdsPart
    costs: CostsPart | None = None
    codec: str | None = None
    maps: MapsPart | None = None
    profile: ProfilePart | None = None
    versions: dict[str, str]
    created: AwareDatetime
    digest: _Digest

    def policy(self, folder: Path) -> Policy:
        """What serving needs of this, with maps in `folder`.

        Raises:
            UsageError: plans or sides that make no policy.
        """
        return Policy(
            self.sender.source_id,
            self.receiver.source_id,
            tuple(point.content(self.layers) for point in self.frontier),
            thresholds=Thresholds(**self.thresholds.model_dump()),
            costs=None if self.costs is None else Costs(**self.costs.model_dump()),
            codec=self.codec,
            maps=None if self.maps is None else MapFile(folder / self.maps.file, self.maps.sha256),
        )

    def require_pair(self, sender: Side, receiver: Side) -> None:
        """Passes if this is the policy of that pair.

        Raises:
            PolicyError: naming the side that is another one, and what of it differs.
        """
        for role, mine, given in (("sender", self.sender, sender), ("receiver", self.receiver, receiver)):
            if mine.source_id != given.source_id:
                raise PolicyError(
                    f"this policy is for another {role}, {mine.name}: {given.name} differs in "
                    f"{', '.join(_differences(mine.manifest, given.manifest))}; profile the pair"
                )


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises `PolicyError` as `read_artifact`."""
    return _read(path)[1]


def read_artifact(path: Path) -> Artifact:
    """Everything in a policy file, checked.

    Raises:
        PolicyError: in one line, why the file is no policy, or not the one that was written.
    """
    return _read(path)[0]


def write_profile_policy(path: Path, profile: Profile, sender: Side, receiver: Side) -> Policy:
    """Writes what a profile found, all or nothing; its maps must lie beside `path` already.

    Raises:
        PolicyError: sides that are not the profile's, maps elsewhere, or a place that cannot be written.
    """
    provenance = profile.provenance
    return _write(
        path,
        profile.policy,
        sender,
        receiver,
        profile=_profile_part(profile),
        versions=provenance.get("versions", {}),
        created=provenance.get("created"),
    )


def write_policy(path: Path, policy: Policy, sender: Side, receiver: Side) -> Policy:
    """Writes plans that nobody has profiled and the caller vouches for; otherwise as the above."""
    return _write(path, policy, sender, receiver)


def read_pair(path: Path) -> tuple[str | None, str | None]:
    """Source ids of sender and receiver that a file names, however broken the rest of it is."""
    with suppress(PolicyError):
        content = _parse(path)
        return _named_id(content.get("sender")), _named_id(content.get("receiver"))
    return None, None


def schema() -> dict[str, Any]:
    """JSON schema of a policy file."""
    return Artifact.model_json_schema()


# --- reading ---


def _read(path: Path) -> tuple[Artifact, Policy]:
    content = _parse(path)
    if content.get("format") != FORMAT:
        raise PolicyError(f"policy {path}: format {content.get('format')!r:.60}; allowed is {FORMAT}")
    if content.get("digest") != _digest_of(content):
        raise PolicyError(f"policy {path} was changed after it was made: its digest differs")
    artifact = _validated(path, content)
    for part in (artifact.sender, artifact.receiver):
        if part.side.source_id != part.source_id:
            raise PolicyError(f"policy {path}: source id of {part.name} is not that of its manifest")
    try:
        return artifact, artifact.policy(path.parent)
    except UsageError as error:
        raise PolicyError(f"policy {path}: {error}") from None


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise PolicyError(f"policy {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise PolicyError(f"policy {path} is not JSON") from None
    if not isinstance(content, dict):
        raise PolicyError(f"policy {path} is not a JSON object")
    return content


def _validated(path: Path, content: Mapping[str, Any]) -> Artifact:
    try:
        return Artifact.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PolicyError(f"policy {path}: {place}: {first['msg']}") from None


def _named_id(side: Any) -> str | None:
    found = side.get("source_id") if isinstance(side, dict) else None
    return found if isinstance(found, str) else None


def _differences(mine: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*mine, *given} if mine.get(key) != given.get(key))


# --- writing ---


def _write(
    path: Path,
    policy: Policy,
    sender: Side,
    receiver: Side,
    *,
    profile: dict[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    created: str | None = None,
) -> Policy:
    if (policy.sender, policy.receiver) != (sender.source_id, receiver.source_id):
        raise PolicyError(f"policy {path}: {sender.name} -> {receiver.name} is not the pair of its plans")
    content: dict[str, Any] = {
        "format": FORMAT,
        "sender": _side_part(sender),
        "receiver": _side_part(receiver),
        "layers": policy.layers,
        "frontier": [_point_part(point) for point in policy.frontier],
        "thresholds": dataclasses.asdict(policy.thresholds),
        "costs": policy.costs and dataclasses.asdict(policy.costs),
        "codec": policy.codec,
        "maps": policy.maps and _maps_part(path, policy.maps),
        "profile": profile,
        "versions": {"droidspeak": __version__, **(versions or {})},
        "created": created or datetime.now(tz=UTC).isoformat(timespec="seconds"),
    }
    content["digest"] = _digest_of(content)
    _validated(path, content)
    _replace(path, json.dumps(content, indent=1) + "\n")
    return read_policy(path)


def _side_part(side: Side) -> dict[str, Any]:
    return {"name": side.name, "source_id": side.source_id, "manifest": dict(side.manifest)}


def _point_part(point: FrontierPoint) -> dict[str, Any]:
    found = point.measures and dataclasses.asdict(point.measures)
    return {"plan": str(point.plan), "quality": point.quality, "measures": found}


def _maps_part(path: Path, maps: MapFile) -> dict[str, str]:
    if maps.path.resolve().parent != path.resolve().parent:
        raise PolicyError(f"policy {path}: its maps {maps.path} must lie in the same folder")
    return {"file": maps.path.name, "sha256": maps.sha256}


def _profile_part(profile: Profile) -> dict[str, Any]:
    return {
        "search": profile.search,
        "metric": profile.metric,
        "granularity": profile.granularity,
        "calibration": dataclasses.asdict(profile.calibration),
        "held_out": dataclasses.asdict(profile.held_out),
        "full_prefill": dataclasses.asdict(profile.full_prefill.measures),
        "sender_alone": dataclasses.asdict(profile.sender_alone),
        "map_features": profile.map_features,
        "warnings": list(profile.warnings),
        "machine": profile.provenance.get("machine", {}),
    }


def _replace(path: Path, text: str) -> None:
    """All or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise PolicyError(f"policy {path} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _digest_of(content: Mapping[str, Any]) -> str:
    return _sha256({key: value for key, value in content.items() if key != "digest"})


def _sha256(value: Any) -> str:
    """Of the canonical JSON, as `droidspeak.storage.digests.canonical` writes it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
