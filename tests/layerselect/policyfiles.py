"""Policy files as another program, or a person with an editor, might write them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(content: dict[str, Any]) -> str:
    """As docs/policy.md describes it."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def remake(path: Path, **keys: Any) -> None:
    """Changes keys of a policy file, and its digest with them."""
    content = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({**content, "digest": digest(content)}))
