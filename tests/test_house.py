"""The walls of the house: who may import whom, what is exported, and the tree of errors."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import droidspeak
from droidspeak import errors

PACKAGE = Path(droidspeak.__file__).parent

# What each part may import of the others. Those of `GROUND` lie under the ground floor.
GROUND = {"errors", "lazy", "logs", "prompts", "tracing"}
MAY_IMPORT = {
    "errors": set(),
    "lazy": set(),
    "logs": set(),
    "tracing": set(),
    "prompts": {"errors"},
    "storage": GROUND,
    "layerselect": GROUND,
    "connector": GROUND | {"storage", "layerselect"},
    "config": GROUND | {"storage", "layerselect", "connector"},
    "telemetry": GROUND | {"storage", "layerselect", "connector"},
    "integrations": GROUND | {"storage", "layerselect", "connector", "config", "telemetry"},
}
# The command line is the front of the house: it opens every door. The doors do not know each other.
DOORS = {"transformers", "vllm_connector", "lmcache_plugin", "server", "sglang_backend"}

EXPORTS = {
    "droidspeak": ["DroidSpeakError", "__version__"],
    "droidspeak.layerselect": [
        "Action",
        "CacheBlend",
        "Costs",
        "FrontierPoint",
        "Group",
        "MapFile",
        "Measures",
        "Method",
        "Plan",
        "Policy",
        "PolicySet",
        "Requirement",
        "ReuseOne",
        "Score",
        "Situation",
        "Thresholds",
        "choose",
        "predicted_ttft",
    ],
    "droidspeak.connector": [
        "Connector",
        "ConnectorOptions",
        "LayerStream",
        "Match",
        "Outcome",
        "Reason",
        "SaveSession",
        "Status",
    ],
    "droidspeak.storage": [
        "DEFAULT_CHUNK_SIZE",
        "Architecture",
        "Chunk",
        "ChunkHeader",
        "ChunkInfo",
        "ChunkKey",
        "Codec",
        "Counters",
        "Limits",
        "Mismatch",
        "PrefixHasher",
        "Slot",
        "SlotKind",
        "SourceId",
        "SourceManifest",
        "Tier",
        "TierUsage",
        "TieredStore",
        "WriteBackOptions",
        "cache_folder",
        "require_compatible",
    ],
    "droidspeak.telemetry": ["METRICS", "MetricRow", "metrics_table"],
    "droidspeak.integrations.transformers": [
        "Decoder",
        "DroidSpeak",
        "Generation",
        "Prefix",
        "PrefixKV",
        "capture",
        "manifest_of",
        "partial_prefill",
        "past_key_values",
    ],
}

TREE = {
    "DroidSpeakError": ("Exception",),
    "UsageError": ("DroidSpeakError", "ValueError"),
    "ConfigError": ("UsageError",),
    "PromptError": ("UsageError",),
    "PolicyError": ("UsageError",),
    "MapsUnusable": ("UsageError",),
    "MissingExtra": ("UsageError", "ImportError"),
    "IdentityError": ("DroidSpeakError", "ValueError"),
    "UnknownIdentity": ("IdentityError",),
    "Incompatible": ("IdentityError",),
    "StorageError": ("DroidSpeakError",),
    "ChunkCorrupt": ("StorageError", "ValueError"),
    "ChunkIncomplete": ("StorageError", "LookupError"),
    "TierUnavailable": ("StorageError", "OSError"),
    "TierClosed": ("TierUnavailable",),
    "TierTimeout": ("StorageError", "TimeoutError"),
    "TierFull": ("StorageError",),
    "NotFound": ("DroidSpeakError", "LookupError"),
    "Declined": ("DroidSpeakError",),
    "LoadFailed": ("DroidSpeakError",),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of the droidspeak modules that `path` imports anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("droidspeak.")}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_downwards(path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    used = {name.split(".")[1] for name in imports(path)}
    used &= {part_of(module) for module in modules()}
    assert used - {part} <= MAY_IMPORT[part]


def test_no_door_stands_on_another():
    for path in (PACKAGE / "integrations").rglob("*.py"):
        door = path.relative_to(PACKAGE / "integrations").parts[0]
        if door not in DOORS:
            continue
        doors = {name.split(".")[2] for name in imports(path) if name.startswith("droidspeak.integrations.")}
        assert doors & DOORS <= {door}, path


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_names(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(EXPORTS[name])
    assert all(hasattr(module, exported) for exported in module.__all__)


def test_error_tree():
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert {name: tuple(base.__name__ for base in cls.__bases__) for name, cls in classes.items()} == TREE
    assert sorted(errors.__all__) == sorted(TREE)
    assert all(name in (errors.__doc__ or "") for name in TREE)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("droidspeak.storage", ["torch", "numpy", "pydantic"]),
        ("droidspeak.storage.disk", ["torch", "numpy", "pydantic"]),
        ("droidspeak.storage.tiered", ["transformers", "boto3", "fastapi", "lmcache", "urllib3", "vllm"]),
        ("droidspeak.layerselect", ["torch", "transformers"]),
        ("droidspeak.connector.connector", ["transformers", "boto3", "opentelemetry"]),
        ("droidspeak.config", ["torch", "numpy", "transformers", "yaml", "droidspeak.layerselect.artifact"]),
        ("droidspeak.telemetry", ["prometheus_client", "torch", "opentelemetry"]),
        ("droidspeak.integrations.transformers", ["lmcache", "vllm"]),
    ],
)
def test_optional_parts_are_not_imported(module, forbidden):
    code = f"import {module}, sys; print([name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    ["store ls", "store ls --sort size:desc", "store df -v", "store top", "--help", "store --help"],
)
def test_looking_at_a_disk_store_needs_no_torch(tmp_path, arguments):
    from droidspeak.storage.disk import DiskTier
    from droidspeak.storage.testing import make_chunk

    with DiskTier(tmp_path, min_free=0) as tier:
        tier.write(make_chunk(0))
    words = arguments.split() + ([] if "--help" in arguments else ["--store", f"disk://{tmp_path}"])
    code = (
        "import sys; from droidspeak.integrations.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'droidspeak.config', 'fastapi'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert "Usage" in result.stdout or make_chunk(0).key.source[:12] in result.stdout


def test_lazy_parts_have_what_they_name():
    for name in ("droidspeak.storage", "droidspeak.connector"):
        module = importlib.import_module(name)
        assert set(module.__all__) <= set(dir(module))
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing
        # The type checker's imports, and those that happen, name the same places.
        tree = ast.parse(Path(module.__file__ or "").read_text())
        named = {
            alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(name)
            for alias in node.names
        }
        assert sorted(named) == sorted(module.__all__)
        for exported, place in named.items():
            assert getattr(importlib.import_module(place), exported) is getattr(module, exported)


def test_root_links_show_the_parts():
    root = PACKAGE.parent
    for part in ("connector", "storage", "layerselect", "integrations"):
        assert (root / part).is_symlink()
        assert (root / part).resolve() == (PACKAGE / part).resolve()


def test_modules_and_functions_stay_small():
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
