"""Only where vLLM is installed (`make test-vllm`): engines on tiny models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

INSTALLED = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if INSTALLED else ["*.py"]

if INSTALLED:
    import torch

    from droidspeak.storage import SourceManifest

    from .engines import Engine, Nursery
    from .models import save_model
    from .stores import Disk


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    """Where engines come from."""
    with Nursery(tmp_path_factory.mktemp("engines")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def start(nursery) -> Iterator[Callable[..., Engine]]:
    """Starts engines that end with the module at the latest: `Nursery.start`."""
    with ExitStack() as engines:
        yield lambda *args, **options: engines.enter_context(nursery.start(*args, **options))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A sender's and a receiver's model."""
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "sender"), save_model(root / "receiver", noise=0.3)


@pytest.fixture(scope="session")
def manifests(folders) -> tuple[SourceManifest, SourceManifest]:
    """Who the sender and the receiver are, by their folders."""
    sender, receiver = (SourceManifest.from_folder(folder) for folder in folders)
    return sender, receiver


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[Disk]:
    """A store on disk for the module's engines."""
    with Disk(tmp_path_factory.mktemp("disk") / "store") as disk:
        yield disk
