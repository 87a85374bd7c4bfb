"""The picture of the status page in the documentation, of a real daemon over what the lab's models did.

`python -m benchmarks.statuspage` writes docs/images/status.png. Three engines (the transformers door) serve
the lab's prompts from its store, by plans with the quality that the lab has measured, and headless Chromium
takes the picture.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from droidspeak.config import load_settings
from droidspeak.connector import ConnectorOptions
from droidspeak.connector.reports import counts_of, read_reports
from droidspeak.integrations.server.daemon import Daemon
from droidspeak.integrations.transformers import DroidSpeak
from droidspeak.integrations.transformers.answer import PromptEncoder
from droidspeak.integrations.transformers.loading import load_model
from droidspeak.layerselect import FrontierPoint, Plan, Policy, PolicySet
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.layerselect.drift import DriftOptions
from droidspeak.prompts import load_prompts
from droidspeak.storage import TieredStore

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "status.png"
MODELS = ("base", "analyst", "coder")
# Who has prefilled what, and who is asked after it.
SCENES = (
    ("base", "coder", 64),
    ("analyst", "analyst", 48),
    ("analyst", "base", 24),
    ("coder", "coder", 16),
    ("base", "base", 8),
)
PAIRS = (("base", "coder"), ("analyst", "base"), ("base", "analyst"))
_CHUNK_SIZE = 64
_CAPACITY = 64 << 20
_PLANS = 6
_MOST_BYTES = 300_000

Engines = Mapping[str, DroidSpeak]


def _write_policies(folder: Path, engines: Engines) -> None:
    """Plans of each pair with the quality that the lab has measured."""
    folder.mkdir()
    rows = json.loads((ROOT / "lab" / "pairs.json").read_text())
    measured = {(row["sender"], row["receiver"]): row for row in rows}
    for pair in PAIRS:
        row = measured[pair]
        plans = {"reuse": row["full_reuse"]}
        plans |= {f"{part['start']}-{part['end']}": part["exact_match"] for part in row["frontier"][:_PLANS]}
        points = tuple(
            FrontierPoint(Plan.parse(plan, row["layers"]), quality / row["full_prefill"])
            for plan, quality in plans.items()
        )
        sender, receiver = (Side.of(name, engines[name].manifest) for name in pair)
        policy = Policy(sender.source_id, receiver.source_id, points)
        write_policy(folder / f"{'-'.join(pair)}.json", policy, sender, receiver)
        for engine in engines.values():
            engine.connector.policies.add(policy)


def _engine(name: str, store: TieredStore) -> DroidSpeak:
    folder = ROOT / "lab" / "models" / name
    options = ConnectorOptions(chunk_size=_CHUNK_SIZE, report_interval=0.2)
    drift = DriftOptions(sample_rate=0.25)
    return DroidSpeak(
        load_model(str(folder)), store, PolicySet(), folder=folder, options=options, drift=drift
    )


def _play(engines: Engines, sender: str, receiver: str, count: int) -> None:
    """`sender` prefills the prefixes of some prompts, and `receiver` is asked all of them."""
    prompts = load_prompts(ROOT / "lab" / "prompts" / f"{receiver}.jsonl")[:count]
    of_each_prefix = {prompt.prefix: prompt for prompt in prompts}.values()
    for name, asked in ((sender, of_each_prefix), (receiver, prompts)):
        engine = engines[name]
        encoder = PromptEncoder(ROOT / "lab" / "models" / name, engine.model.config.vocab_size)
        for prompt in asked:
            prefix, question = encoder.encode(prompt)
            engine.prefill([*prefix, *question])
        engine.flush()


def _wait_for_reports(store: TieredStore, engines: Engines) -> None:
    """Until the engines have told of all their requests."""
    answered = sum(engine.connector.counters.get("requests") for engine in engines.values())
    while _told(store) < answered:
        time.sleep(0.1)


def _told(store: TieredStore) -> float:
    counts = counts_of(read_reports(store.reports()))
    return sum(count for path, count in counts.items() if path[:2] == ("count", "requests"))


def _take(url: str, path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is not installed")
    path.parent.mkdir(exist_ok=True)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run(
        [*command, "--window-size=1180,1960", f"--screenshot={path}", url], check=True, capture_output=True
    )


def _daemon(folder: Path) -> Daemon:
    tiers = [f"cpu://?capacity={_CAPACITY // 2}", f"disk://{folder / 'store'}?capacity={_CAPACITY}"]
    server = {"listen": "127.0.0.1:0", "http": "127.0.0.1:0"}
    return Daemon(
        load_settings(overrides={"tiers": tiers, "policies": folder / "policies", "server": server})
    )


def main() -> None:
    """Makes the picture."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as opened:
        folder = Path(temporary)
        daemon = opened.enter_context(_daemon(folder))
        store = daemon.state.stores[""]
        engines = {name: opened.enter_context(_engine(name, store)) for name in MODELS}
        _write_policies(folder / "policies", engines)
        for scene in SCENES:
            _play(engines, *scene)
        store.flush()
        _wait_for_reports(store, engines)
        _take(f"http://{daemon.addresses['http']}/", PICTURE)
    size = PICTURE.stat().st_size
    print(f"{PICTURE}: {size} bytes")
    if size > _MOST_BYTES:
        sys.exit(f"larger than {_MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
