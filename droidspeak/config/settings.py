"""All settings, and what is opened from them.

Later sources win: defaults, YAML file (`DROIDSPEAK_CONFIG` or an argument), `DROIDSPEAK_*` environment
(`DROIDSPEAK_SERVER__LISTEN` for a key of a section), what the caller passes (an engine's extra
configuration, command line flags). With none of them it works: CPU memory, and disk under the user's
cache folder.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from droidspeak.config.environment import AsText, environment_values
from droidspeak.config.serving import ServerSettings
from droidspeak.connector.options import ConnectorOptions
from droidspeak.errors import ConfigError, UsageError
from droidspeak.layerselect.drift import DriftOptions
from droidspeak.storage.digests import cache_folder
from droidspeak.storage.guard import Limits
from droidspeak.storage.keys import DEFAULT_CHUNK_SIZE
from droidspeak.storage.tier import Tier
from droidspeak.storage.urls import open_tier_late, parse_size

if TYPE_CHECKING:
    from droidspeak.layerselect import PolicySet, Requirement
    from droidspeak.storage.tiered import TieredStore

__all__ = ["Settings", "load_settings", "open_policies", "open_store", "open_tiers"]

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_SECRET = ("salt", "token", "sha256")


class LimitSettings(BaseModel):
    """Deadlines of a tier in seconds, and when a failing one is tried again."""

    model_config = _FROZEN

    read_deadline: float = Field(Limits.read_deadline, gt=0)
    write_deadline: float = Field(Limits.write_deadline, gt=0)
    cooldown: float = Field(Limits.cooldown, gt=0)
    max_cooldown: float = Field(Limits.max_cooldown, gt=0)
    threads: int = Field(Limits.threads, gt=0)


class DriftSettings(BaseModel):
    """`droidspeak.layerselect.drift.DriftOptions`."""

    model_config = _FROZEN

    sample_rate: float = DriftOptions.sample_rate
    recovery_rate: float = DriftOptions.recovery_rate
    window: int = DriftOptions.window
    least: int = DriftOptions.least
    margin: float = DriftOptions.margin


class VllmSettings(BaseModel):
    """`DroidSpeakConnector` inside vLLM.

    Attributes:
        load: `sync`: within the step that admits a request, layer by layer. `async`: between steps; the
            request waits, and others are held up for one piece of work at most.
    """

    model_config = _FROZEN

    load: Literal["sync", "async"] = "sync"


class Settings(BaseModel):
    """Everything that can be configured.

    Attributes:
        tiers: from fast to slow, each a URL or a mapping (`droidspeak.storage.urls`); in the
            environment URLs with blanks between them.
        chunk_size: tokens per chunk; all processes that share must agree.
        codec: of what is saved, `raw` or `zstd`.
        salt: this tenant's secret; other salts' caches do not exist here.
        policies: folder of policy files; without one, no model uses another one's cache.
        quality_floor: least quality of a plan, as a share of full prefill's.
        slo: seconds until the first token that leave time to recompute more; the fastest plan if `None`.
        load_deadline: seconds until a request stops waiting for the store.
        loaders: threads per request that read and decode.
        load_memory: bytes of host memory that are kept from one load for the next.
        degrees: tensor-parallel degrees of other engines whose chunks are read too.
        report_interval: seconds between the reports that an engine leaves beside the store; 0 for none.
        promote: copy what slower tiers gave into faster ones.
        write_queue: bytes that may wait in front of each slower tier.
        limits: per tier name.
        drift: how often requests are checked for drift.
        server: of the daemon only (`droidspeak.config.ServerSettings`).
        vllm: of engines of vLLM only.
    """

    model_config = _FROZEN

    tiers: Annotated[tuple[str | dict[str, Any], ...], AsText] = Field(
        default_factory=lambda: ("cpu://?capacity=1GiB", f"disk://{cache_folder() / 'store'}?capacity=20GiB"),
        min_length=1,
    )
    chunk_size: int = DEFAULT_CHUNK_SIZE
    codec: str = "raw"
    salt: str = ""
    policies: Path | None = None
    quality_floor: float = Field(0.95, ge=0, le=1)
    slo: float | None = Field(None, gt=0, allow_inf_nan=False)
    load_deadline: float = Field(30.0, gt=0)
    loaders: int = Field(2, gt=0, le=64)
    load_memory: str | int = "256MiB"
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    report_interval: float = Field(5.0, ge=0, allow_inf_nan=False)
    promote: bool = True
    write_queue: str | int = "1GiB"
    limits: dict[str, LimitSettings] = {}
    drift: DriftSettings = DriftSettings()
    server: ServerSettings = ServerSettings()
    vllm: VllmSettings = VllmSettings()

    @field_validator("tiers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split()) if isinstance(value, str) else value

    @property
    def connector_options(self) -> ConnectorOptions:
        """What the connector needs of this."""
        return ConnectorOptions(
            chunk_size=self.chunk_size,
            codec=self.codec,
            load_deadline=self.load_deadline,
            loaders=self.loaders,
            load_memory=parse_size(self.load_memory),
            degrees=self.degrees,
            report_interval=self.report_interval,
        )

    @property
    def requirement(self) -> Requirement:
        """What plans must reach, unless a request says otherwise."""
        from droidspeak.layerselect import Requirement

        return Requirement(self.quality_floor, self.slo)

    @property
    def drift_options(self) -> DriftOptions:
        """What the drift guard needs of this."""
        return DriftOptions(**self.drift.model_dump())


def load_settings(file: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings as resolved from all sources.

    Args:
        file: YAML file; `DROIDSPEAK_CONFIG` if `None`.
        overrides: win over everything else, unless their value is `None`. Sections are merged.

    Raises:
        ConfigError: naming the key, what is wrong, and what is allowed.
    """
    path = configuration_file(file)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    values = _merged(read_yaml(path) if path else {}, environment_values(Settings))
    try:
        settings = Settings.model_validate(_merged(values, given))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    _check(settings)
    return settings


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with what `over` says; sections of both are merged."""
    both = {
        key: _merged(under[key], value)
        for key, value in over.items()
        if isinstance(value, Mapping) and isinstance(under.get(key), Mapping)
    }
    return {**under, **over, **both}


def open_store(settings: Settings) -> TieredStore:
    """The store that `settings` describe; a tier that cannot be opened yet is tried again when used.

    Raises:
        ConfigError, MissingExtra: a tier that is described wrongly, or whose extra is missing.
    """
    return _store(settings, [open_tier_late(tier) for tier in settings.tiers], settings.limits)


def open_tiers(settings: Settings, tiers: Sequence[str | dict[str, Any]], name: str) -> TieredStore:
    """A store over other `tiers` than the settings' own, all else as they say. Raises as `open_store`."""
    opened = [open_tier_late(tier) for tier in tiers]
    # The settings' limits may be for tiers that this store does not have.
    known = {tier.name: settings.limits[tier.name] for tier in opened if tier.name in settings.limits}
    return _store(settings, opened, known, name)


def _store(
    settings: Settings, tiers: Sequence[Tier], limits: Mapping[str, LimitSettings], name: str = "store"
) -> TieredStore:
    # Imported where it is opened: who reads the configuration only does not wait for torch.
    from droidspeak.storage.tiered import TieredStore, WriteBackOptions

    return TieredStore(
        tiers,
        limits={name: Limits(**limit.model_dump()) for name, limit in limits.items()},
        name=name,
        promote=settings.promote,
        write_back=WriteBackOptions(capacity=parse_size(settings.write_queue)),
    )


def open_policies(settings: Settings) -> PolicySet:
    """The policies of the folder that `settings` name; files that are refused are in its `refused`.

    Raises:
        PolicyError: the folder cannot be read.
    """
    from droidspeak.layerselect import PolicySet

    return PolicySet() if settings.policies is None else PolicySet.from_folder(settings.policies)


def _check(settings: Settings) -> None:
    try:
        _ = settings.connector_options, settings.drift_options
        parse_size(settings.write_queue)
    except UsageError as error:
        raise ConfigError(str(error)) from None


def configuration_file(file: Path | str | None = None) -> Path | None:
    """The file that settings are read from: the one that is given, else that of `DROIDSPEAK_CONFIG`."""
    path = file or os.environ.get("DROIDSPEAK_CONFIG")
    return Path(path) if path else None


def read_yaml(path: Path) -> dict[str, Any]:
    """What a configuration file says. Raises `ConfigError`."""
    # Imported where it is used: short commands without a file do not wait for it.
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration {path} must be a mapping of keys, not a {type(content).__name__}")
    return content


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_fields_at(first["loc"][:-1])))
        return f"unknown configuration key {path!r}; allowed: {allowed}"
    told = f"configuration key {path!r}: {first['msg'].removeprefix('Value error, ')}"
    # A section as a whole may hold secrets, and is too long for one line.
    scalar = isinstance(first["input"], str | int | float) and first["loc"][-1] not in _SECRET
    return f"{told}, not {first['input']!r}" if scalar else told


def _fields_at(place: Sequence[int | str]) -> Collection[str]:
    """The keys that are allowed in the section at `place`."""
    model: type[BaseModel] = Settings
    for part in place:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return model.model_fields


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model in a field's annotation, however it is wrapped."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)
