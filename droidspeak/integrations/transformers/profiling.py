"""Profiling a pair of model folders: identity, prompts, maps, then the profiler."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from droidspeak import __version__
from droidspeak.errors import PromptError, UsageError
from droidspeak.integrations.transformers.answer import PromptEncoder
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.evaluate import BenchSpec, encode_units
from droidspeak.integrations.transformers.fitting import MIN_TOKENS, fit_maps
from droidspeak.integrations.transformers.kv import empty_cache
from droidspeak.integrations.transformers.loading import load_model
from droidspeak.layerselect import MapFile
from droidspeak.layerselect.journal import Journal, Runner
from droidspeak.layerselect.mapfeatures import MapFeatures
from droidspeak.layerselect.profile import Profile
from droidspeak.layerselect.profiler import Pair, ProfileOptions, Profiler, contiguous_groups, split
from droidspeak.layerselect.tasks import Result, Task, Unit, digest_of
from droidspeak.prompts import Prompt, load_prompts
from droidspeak.storage import SourceManifest, require_compatible

__all__ = ["Observe", "PairJob", "require_disjoint"]

Observe = Callable[[str, int, int], None]
"""Told a title, and how many of its tasks are done, of how many."""


@dataclass(frozen=True)
class PairJob:
    """One ordered pair to profile.

    Attributes:
        sender, receiver: transformers folders.
        calibration, held_out: prompt files, nothing in both.
        map_features: kinds of maps to try; none for plain plans only.
        max_new_tokens: longest answer.
        threads: of each worker; torch's choice if `None`.
        device: where workers put their models.
    """

    sender: Path
    receiver: Path
    calibration: Path
    held_out: Path
    options: ProfileOptions
    map_features: tuple[MapFeatures, ...] = tuple(MapFeatures)
    max_new_tokens: int = 32
    threads: int | None = None
    device: str = "cpu"

    def check(self) -> None:
        """Everything that can be wrong before a model is loaded.

        Raises:
            UsageError, IdentityError: in one line, what and what is allowed.
        """
        sender, receiver = self.manifests
        require_compatible(sender, receiver)
        if sender.source_id == receiver.source_id:
            raise UsageError(
                "sender and receiver are the same model: its own cache is exact, no plan is needed"
            )
        require_disjoint(*self._prompts)
        _ = self.units

    @cached_property
    def manifests(self) -> tuple[SourceManifest, SourceManifest]:
        """Of sender and receiver."""
        return SourceManifest.from_folder(self.sender), SourceManifest.from_folder(self.receiver)

    @cached_property
    def units(self) -> tuple[list[Unit], list[Unit]]:
        """Calibration and held-out prompts, encoded for the receiver."""
        config = self._config
        encoder = PromptEncoder(self.receiver, config.vocab_size)
        room = config.max_position_embeddings - self.max_new_tokens
        calibration, held_out = (encode_units(prompts, encoder, max_tokens=room) for prompts in self._prompts)
        return calibration, held_out

    @property
    def spec(self) -> BenchSpec:
        """What a worker needs."""
        return BenchSpec(
            self.sender, self.receiver, self.options.metric, self.max_new_tokens, self.threads, self.device
        )

    @property
    def pair(self) -> Pair:
        sender, receiver = self.manifests
        return Pair(
            sender.source_id,
            receiver.source_id,
            self.sender.resolve().name,
            self.receiver.resolve().name,
            receiver.architecture.layers,
        )

    def journal(self, folder: Path) -> Journal:
        """Where this job keeps its results until it is done."""
        calibration, held_out = self.units
        job = {
            "droidspeak": __version__,
            "sender": self.pair.sender,
            "receiver": self.pair.receiver,
            "calibration": digest_of(calibration),
            "held_out": digest_of(held_out),
            "metric": self.options.metric,
            "max_new_tokens": self.max_new_tokens,
        }
        return Journal(folder, job)

    def fit(self, folder: Path) -> dict[str, MapFile]:
        """Maps of each kind, fitted on half of the calibration prefixes; kept in `folder`.

        Empty if there are too few tokens to fit them on.
        """
        prefixes = [unit.prefix for unit in self.fitted]
        if not prefixes:
            return {}
        kept = {kind: folder / f"maps-{kind}.safetensors" for kind in self.map_features}
        if not all(path.is_file() for path in kept.values()):
            self._fit(prefixes, kept)
        return {str(kind): MapFile(path, _sha256(path)) for kind, path in kept.items()}

    def refit(self, folder: Path, kind: str) -> MapFile:
        """Maps of one kind, fitted on all calibration prefixes; kept in `folder`."""
        path = folder / f"maps-{kind}-all.safetensors"
        if not path.is_file():
            self._fit([unit.prefix for unit in self.units[0]], {MapFeatures(kind): path})
        return MapFile(path, _sha256(path))

    def _fit(self, prefixes: Sequence[tuple[int, ...]], kept: dict[MapFeatures, Path]) -> None:
        starts = {group.start for group in contiguous_groups(self.pair.layers, self.options.granularity)}
        sender, receiver = (Decoder(load_model(side, self.device)) for side in (self.sender, self.receiver))
        maps = fit_maps(
            sender,
            receiver,
            [torch.tensor(prefix) for prefix in prefixes],
            tuple(kept),
            e_layers=sorted(starts - {0}),
            pair=(self.pair.sender, self.pair.receiver),
        )
        for kind, fitted in maps.items():
            fitted.save(kept[kind])

    @cached_property
    def fitted(self) -> list[Unit]:
        """Calibration prompts that maps are fitted on, and that plans are therefore not chosen by."""
        if not self.map_features:
            return []
        fitted, others = split(self.units[0])
        enough = others and sum(len(unit.prefix) for unit in fitted) >= MIN_TOKENS
        return fitted if enough else []

    def profile(self, journal: Journal, runner: Runner, observe: Observe) -> Profile:
        """Measures what is not in `journal` and draws the conclusions. Raises `UsageError`."""
        calibration, held_out = self.units
        fitted = self.fitted
        chosen_by = split(calibration)[1] if fitted else calibration
        profiler = Profiler(
            self.pair,
            replace(self.options, blend=not self._windowed),
            lambda title, tasks: _observed(journal.run(tasks, runner), title, len(tasks), observe),
            chosen_by,
            held_out,
            self.fit(journal.folder),
            lambda kind: self.refit(journal.folder, kind),
        )
        profile = profiler.profile()
        if self.map_features and not fitted:
            tokens = sum(len(unit.prefix) for unit in calibration)
            warning = f"no maps: half of {tokens} calibration tokens is fewer than the {MIN_TOKENS} they need"
            profile = replace(profile, warnings=(*profile.warnings, warning))
        return profile

    @property
    def _windowed(self) -> bool:
        return any(layer.is_sliding for layer in empty_cache(self._config).layers)

    @cached_property
    def _config(self) -> Any:
        try:
            return AutoConfig.from_pretrained(self.receiver).get_text_config()
        except (OSError, ValueError) as error:
            raise UsageError(f"model {self.receiver}: {' '.join(str(error).split())[:300]}") from None

    @cached_property
    def _prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        return load_prompts(self.calibration), load_prompts(self.held_out)


def require_disjoint(calibration: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Raises `PromptError` if a prompt of one set is in the other, by id or by its prefix."""
    ids = {prompt.id for prompt in calibration}
    prefixes = {prompt.prefix: prompt.id for prompt in calibration}
    for prompt in held_out:
        if prompt.id in ids:
            raise PromptError(f"prompt {prompt.id} is in both sets; calibration and held-out share none")
        if prompt.prefix in prefixes:
            raise PromptError(
                f"prompt {prompt.id} has the prefix of calibration prompt {prefixes[prompt.prefix]}; "
                "calibration and held-out share none"
            )


def _observed(
    results: Iterable[tuple[Task, Result]], title: str, total: int, observe: Observe
) -> Iterable[tuple[Task, Result]]:
    observe(title, 0, total)
    for done, pair in enumerate(results, 1):
        observe(title, done, total)
        yield pair


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
