"""Needs SGLang's own classes: these tests run in the environment of `make test-vllm`."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
