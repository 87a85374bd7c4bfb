"""Every configuration in `examples/lmcache` and `docs/lmcache.md` is loaded by LMCache and works."""

from __future__ import annotations

import re

import yaml

from .processes import ROOT, check, report_of

EXAMPLES = sorted((ROOT / "examples" / "lmcache").glob("*.yaml"))
PAGE = ROOT / "docs" / "lmcache.md"


def blocks() -> list[str]:
    """The YAML of the page."""
    return re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def plugs_us_in(text: str) -> bool:
    config = yaml.safe_load(text)
    return "droidspeak" in [*config.get("storage_plugins", []), *config.get("remote_storage_plugins", [])]


def test_the_page_and_the_examples_show_each_way():
    texts = [*blocks(), *(path.read_text() for path in EXAMPLES)]
    for text in blocks():
        assert plugs_us_in(text) or "remote_url" in yaml.safe_load(text), text
    assert sum(map(plugs_us_in, texts)) >= 5
    assert any(yaml.safe_load(text).get("remote_url", "").startswith("lm://") for text in texts)


def test_they_work(tmp_path):
    files = [path for path in EXAMPLES if plugs_us_in(path.read_text())]
    for number, text in enumerate(filter(plugs_us_in, blocks())):
        path = tmp_path / f"page-{number}.yaml"
        path.write_text(text)
        files.append(path)
    check(report_of("config_cases.py", tmp_path / "work", *files))
