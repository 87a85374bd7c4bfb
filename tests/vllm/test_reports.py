"""What engines leave beside the store: who was served by whose cache, over the end of their processes."""

from __future__ import annotations

from droidspeak.connector.reports import counts_of, pairs_of, read_reports
from droidspeak.storage import SourceManifest

from .engines import Request
from .models import prompt, save_model, write_plan
from .stores import Disk

SIZE, LENGTH, PLAN = 64, 300, "1-2"


def test_two_engines_leave_what_they_shared(start, tmp_path):
    folders = [save_model(tmp_path / str(noise), "llama", noise=noise) for noise in (0.0, 0.3)]
    sender, receiver = map(SourceManifest.from_folder, folders)
    policies = write_plan(tmp_path / "policies", sender, receiver, PLAN)
    ids, whole = prompt(1, LENGTH), LENGTH // SIZE * SIZE
    layers = sender.architecture.layers
    with Disk(tmp_path / "store") as disk:
        options = {"tiers": [disk.url], "chunk_size": SIZE, "policies": policies, "e_layers": [1]}
        with start(folders[0], **options) as engine:
            engine.ask(Request(ids, new=1))
        with start(folders[1], **options) as engine:
            engine.ask(Request(ids, new=1))
            engine.ask(Request([7, *ids], new=1))
        reports = read_reports(disk.tier.reports())
    assert {report.engine for report in reports} == {"vllm"}
    assert all(report.ended for report in reports)
    counts = counts_of(reports)
    assert counts["count", "reasons", "cross_model_hit"] == 1
    assert counts["count", "reasons", "miss"] == 2
    (pair,) = pairs_of(reports)
    assert (pair.sender, pair.receiver) == (sender.source_id, receiver.source_id)
    assert (pair.requests, pair.tokens) == (1, whole)
    assert pair.tokens_saved == whole * (layers - 2) / layers
    assert pair.bytes_loaded > 0
    assert pair.bytes_unstored > pair.bytes_loaded
    # The worker has loaded what the scheduler has counted.
    assert counts["tier", "disk", "bytes"] > 0
