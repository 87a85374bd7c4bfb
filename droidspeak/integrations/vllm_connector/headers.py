"""What became of a request in the head of its response, whatever form the answer has.

    --middleware droidspeak.integrations.vllm_connector.headers.OutcomeHeader

    X-DroidSpeak: applied;reason=cross_model_hit;exact_tokens=0;shared_tokens=704;plan="0-2";source="<id>"

A list of RFC 8941 with one item for each prompt of the request, in one line. A request of more than 16
prompts gets none: clients and proxies bound the length of heads. vLLM drops the field `kv_transfer_params`
from streams and some others of its answers. What the scheduler's half knows of a request when its prompt
has been computed comes with the connector's statistics, in the step that brings the first token: so it is
there before anything of the answer is sent, and the head waits until then.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

__all__ = ["OutcomeHeader", "Outcomes", "header_of"]

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# vLLM names the n-th prompt `NAME-n` or `NAME_n`, its n-th sample `n_NAME`, and puts random digits after all.
_ENGINE_NAME = re.compile(r"(?:[0-9]+_)?(?P<whole>(?P<name>.+?)(?:[-_](?P<prompt>[0-9]+))?)-[0-9a-f]{8}")
_MOST = 4096
_MOST_PROMPTS = 16


class Outcomes:
    """Of the last requests, by the name in their response and the number of their prompt. Of one thread."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._known: OrderedDict[str, dict[int, Mapping[str, Any]]] = OrderedDict()

    def put(self, engine_name: str, outcome: Mapping[str, Any]) -> None:
        """Keeps the outcome of a request under vLLM's internal name of it."""
        if (match := _ENGINE_NAME.fullmatch(engine_name)) is None:
            return
        # Who names requests may have put a number at the end, where vLLM puts that of the prompt.
        self._known.setdefault(match["whole"], {})[0] = outcome
        self._known.setdefault(match["name"], {})[int(match["prompt"] or 0)] = outcome
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def take(self, name: str) -> list[Mapping[str, Any]]:
        """Outcomes of a request's prompts, in their order; empty if nothing is known."""
        found = self._known.pop(name, {})
        return [found[prompt] for prompt in sorted(found)]


OUTCOMES = Outcomes()
"""Those of this API server."""


class OutcomeHeader:
    """ASGI middleware that gives each response the header `X-DroidSpeak`, if its outcome is known."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head: Message | None = None

        async def send_later(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                head = message
                return
            if head is not None:
                started, head = head, None
                await send({**started, "headers": [*started.get("headers", ()), *_headers(scope)]})
            await send(message)

        await self._app(scope, receive, send_later)


def _headers(scope: Message) -> list[tuple[bytes, bytes]]:
    # vLLM's own note of the request; routes that compute nothing have none.
    noted = scope.get("state", {}).get("request_metadata")
    outcomes = OUTCOMES.take(noted.request_id) if noted is not None else []
    if not 0 < len(outcomes) <= _MOST_PROMPTS:
        return []
    return [(b"x-droidspeak", ", ".join(map(header_of, outcomes)).encode("ascii"))]


def header_of(outcome: Mapping[str, Any]) -> str:
    """One item of the list: the status with all else as parameters."""
    parts = [str(outcome["status"]), f"reason={outcome['reason']}"]
    parts += [f"{name}={outcome[name]}" for name in ("exact_tokens", "shared_tokens")]
    parts += [f'{name}="{outcome[name]}"' for name in ("plan", "source") if outcome[name] is not None]
    return ";".join(parts)
