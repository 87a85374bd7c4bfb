"""The remote tier: the chunks of another DroidSpeak daemon, over its HTTP side.

A lookup is one POST for up to 4096 keys. A read is one GET of the header (not if it is cached), and one
GET for each coalesced range of the slots asked for, concurrently. Every range names the version that the
header is of (If-Match): parts of a chunk that is replaced in between are never mixed.

How long a header is says its own beginning. The first request asks for as many bytes as the last header
had, which is right for all chunks of one model and size; what is missing takes one more. Asking for more
to be sure would make the daemon read slots that nobody wants, and those of other systems are large.

    POST /v1/leading                    head, leading
    GET, PUT, DELETE /v1/chunks/KEY     read, write, delete
    PUT, DELETE /v1/chunks/KEY/pin      pin, unpin
    POST /v1/chunks/KEY/quarantine      quarantine
    GET /v1/chunks, /v1/usage           keys, records, usage
    POST /v1/evict                      evict
    GET, PUT /v1/reports                put_report, reports
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from http import HTTPStatus
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from droidspeak.errors import ChunkIncomplete, ConfigError, TierUnavailable
from droidspeak.storage.container import Chunk, ChunkHeader, Slot, SlotRecord, coalesce, place
from droidspeak.storage.daemonclient import Changed, DaemonClient, Forbidden, NotThere, fill
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.ranges import SideBySide, VersionedHeaders
from droidspeak.storage.reports import MOST_REPORT_BYTES, check_report
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, SlotBytes, Tier, TierUsage

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

__all__ = ["RemoteTier"]

_DEFAULT_PORT = 65433
_LEAST_GUESS = 8
_KEYS_AT_ONCE = 4096
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class RemoteTier(Tier):
    """Chunks of another daemon, from any thread. Nothing is asked before the first call, so the daemon may
    come later. It sets no bound of its own: the daemon evicts as it is configured.

    Args:
        host, port: of the daemon's HTTP side.
        tls: speak HTTPS; the certificate must be for `host`.
        ca: PEM file of the authorities that may have signed the daemon's certificate; the system's if
            not given.
        token: a secret of the daemon's `server.tokens`, or
        token_file: the file that holds it. With neither, the environment's `DROIDSPEAK_TOKEN`, if set.
        tenant: whose chunks, for tokens that may choose; the token's own tenant if not given.
        timeout: seconds to connect, and seconds of silence, before a request is given up.
        concurrency: requests at a time.

    Raises:
        MissingExtra: urllib3 is not installed.
        ConfigError: two tokens, one that cannot be sent, or a file that cannot be read.
    """

    best_read = 8 << 20

    def __init__(
        self,
        host: str,
        port: int = _DEFAULT_PORT,
        *,
        tls: bool = False,
        ca: Path | None = None,
        token: str | None = None,
        token_file: Path | None = None,
        tenant: str | None = None,
        timeout: float = 5.0,
        concurrency: int = 8,
        name: str = "remote",
    ) -> None:
        if ca and not tls:
            raise ConfigError("ca is for TLS; allowed with tls=true")
        self.name = name
        self._client = DaemonClient(
            host,
            port,
            tls=tls,
            ca=ca,
            token=_find_token(token, token_file),
            tenant=tenant,
            timeout=timeout,
            connections=concurrency,
        )
        self._requests = SideBySide(concurrency, name)
        self._headers = VersionedHeaders()
        self._guess = _LEAST_GUESS

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        run = self.leading([key])
        return run[0] if run else None

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        found: list[ChunkInfo] = []
        while len(found) < len(keys):
            asked = keys[len(found) : len(found) + _KEYS_AT_ONCE]
            run = self._leading(asked)
            found += run
            if len(run) < len(asked):
                break
        return found

    def _leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        answer = self._client.json("POST", "/v1/leading", {"keys": [str(key) for key in keys]})
        with self._understood():
            run = [_info(row) for row in answer["chunks"]]
            if [info.key for info in run] != list(keys[: len(run)]):
                raise ValueError("other chunks than those asked for")
        return run

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        # Once more for a chunk that has been replaced since its header was cached.
        for _attempt in range(2):
            try:
                return self._read(key, slots, into)
            except Changed:
                self._headers.forget(key)
            except NotThere:
                break
        self._headers.forget(key)
        return None

    def _read(
        self, key: ChunkKey, slots: Collection[Slot] | None, into: Mapping[Slot, torch.Tensor] | None
    ) -> Chunk:
        etag, header, records = self._locate(key, slots)
        placed = place(records, into)

        def fetch(group: list[SlotRecord]) -> None:
            start, end = header.data_start + group[0].start, header.data_start + group[-1].end
            targets = [placed[record.slot].numpy().data for record in group]
            self._fetch(key, etag, start, end, targets)
            for record, stored in zip(group, targets, strict=True):
                header.check(record, stored)

        self._requests.all(fetch, coalesce(records, self.best_read))
        return Chunk(header, placed)

    def _locate(
        self, key: ChunkKey, slots: Collection[Slot] | None
    ) -> tuple[str, ChunkHeader, list[SlotRecord]]:
        """The version and the header of `key`, and the records of `slots`."""
        if held := self._headers.get(key):
            # A header that lacks a slot may be out of date.
            with suppress(ChunkIncomplete):
                records = held[1].select(slots)
                # Where nothing needs to be fetched, no request would find out that the chunk is gone.
                if any(record.nbytes for record in records):
                    return *held, records
        etag, header = self._find_header(key)
        self._headers.remember(key, etag, header)
        return etag, header, header.select(slots)

    def _find_header(self, key: ChunkKey) -> tuple[str, ChunkHeader]:
        etag, total, data = self._client.call(lambda: self._open(key))
        self._guess = length = ChunkHeader.length(data)
        if len(data) < length <= total:
            rest = bytearray(length - len(data))
            self._fetch(key, etag, len(data), length, [memoryview(rest)])
            data += rest
        return etag, ChunkHeader.parse(data[:length]).expect(key, total)

    def _open(self, key: ChunkKey) -> tuple[str, int, bytes]:
        """The version of `key`, its bytes in all, and the first of them."""
        guess = self._guess
        headers = {"Range": f"bytes=0-{guess - 1}"}
        with self._client.answer("GET", _path(key), headers=headers) as answer:
            start, end, total = self._range(answer)
            etag = answer.headers.get("ETag", "")
            if start or end != min(total, guess) or not etag.startswith('"'):
                self._client.foreign(f"bytes {start}-{end - 1} of {total}, ETag {etag[:99]!r}")
            data = bytearray(end)
            fill(memoryview(data), answer)
        return etag, total, bytes(data)

    def _fetch(self, key: ChunkKey, etag: str, start: int, end: int, targets: Collection[memoryview]) -> None:
        """Fills `targets`, one after the other, with bytes `start`..`end` of the version `etag`."""
        headers = {"Range": f"bytes={start}-{end - 1}", "If-Match": etag}

        def exchange() -> None:
            with self._client.answer("GET", _path(key), headers=headers) as answer:
                got = self._range(answer)[:2]
                if got != (start, end):
                    self._client.foreign(f"bytes {got[0]}-{got[1] - 1} for {start}-{end - 1}")
                for target in targets:
                    fill(target, answer)

        if start < end:
            self._client.call(exchange)

    def _range(self, answer: BaseHTTPResponse) -> tuple[int, int, int]:
        """First byte, end, and bytes of the whole object, of a range answer."""
        told = answer.headers.get("Content-Range", "")
        match = _RANGE.fullmatch(told)
        first, last, total = map(int, match.groups()) if match else (0, -1, 0)
        if answer.status != HTTPStatus.PARTIAL_CONTENT or not first <= last < total:
            self._client.foreign(f"status {answer.status}, range {told[:99]!r}")
        return first, last + 1, total

    def write(self, chunk: Chunk) -> None:
        body = chunk.buffers()
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(chunk.header.nbytes)}
        self._done("PUT", _path(chunk.key), headers=headers, body=body)
        self._guess = chunk.header.data_start
        self._headers.forget(chunk.key)

    def delete(self, key: ChunkKey) -> bool:
        self._headers.forget(key)
        return self._done("DELETE", _path(key))

    def delete_unused(self, records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
        return self._requests.those(self._left, records)

    def quarantine(self, key: ChunkKey) -> None:
        self._headers.forget(key)
        self._done("POST", f"{_path(key)}/quarantine")

    def verify_stored(self, key: ChunkKey) -> str | None:
        """What the daemon finds wrong with its copies of `key`, read in full; `None` if nothing."""
        try:
            answer = self._client.json("POST", f"{_path(key)}/verify", of_chunk=True)
        except NotThere:
            return None
        with self._understood():
            return None if answer["ok"] else str(answer["found"])

    def pin(self, key: ChunkKey) -> bool:
        return self._done("PUT", f"{_path(key)}/pin")

    def unpin(self, key: ChunkKey) -> bool:
        return self._done("DELETE", f"{_path(key)}/pin")

    def _done(self, method: str, path: str, **options: Any) -> bool:
        """Makes a change; whether the chunk is there."""
        try:
            self._client.done(method, path, **options)
        except NotThere:
            return False
        return True

    def keys(self) -> Iterator[ChunkKey]:
        for line in self._client.lines("/v1/chunks", "detail=false"):
            with self._understood():
                key = ChunkKey.parse(json.loads(line)["key"])
            yield key

    def records(self) -> Iterator[ChunkRecord]:
        """Of each of the daemon's tiers, `info.tier` is `NAME/ITS NAME`."""
        for line in self._client.lines("/v1/chunks", "copies=true"):
            with self._understood():
                record = self._record(json.loads(line))
            yield record

    def _record(self, row: Mapping[str, Any]) -> ChunkRecord:
        tier, pinned, hits = row["tier"], row.get("pinned"), row.get("hits")
        info = _info(row).held_by(self.name if tier is None else f"{self.name}/{tier}")
        return ChunkRecord(
            info,
            _nanoseconds(row.get("created")),
            _nanoseconds(row.get("used")),
            None if hits is None else index(hits),
            None if pinned is None else bool(pinned),
        )

    def by_tier(self) -> dict[str, TierUsage]:
        """Of the daemon's tiers that answer; `NAME/ITS NAME`."""
        return {f"{self.name}/{name}": usage for name, usage in self._tiers().items()}

    def daemon_counters(self) -> dict[str, dict[str, int]]:
        """What the daemon's store has counted since it started: by event and its tier."""
        answer = self._client.json("GET", "/v1/usage")
        with self._understood():
            return {
                str(event): {str(tier): index(count) for tier, count in by_tier.items()}
                for event, by_tier in answer["counters"].items()
            }

    def usage(self) -> TierUsage:
        """Of the daemon's tiers that answer: chunks of the one that holds most; bytes and capacities of all
        together. Raises `TierUnavailable` if none does."""
        tiers = self._tiers().values()
        if not tiers:
            raise TierUnavailable(f"{self._client.where}: no tier answers")
        capacities = [tier.capacity for tier in tiers if tier.capacity is not None]
        return TierUsage(
            max(tier.chunks for tier in tiers),
            sum(tier.nbytes for tier in tiers),
            sum(capacities) if len(capacities) == len(tiers) else None,
        )

    def evict(self, nbytes: int) -> int:
        """From each of the daemon's tiers. Nothing where the token has no `admin` scope: then the daemon's
        room is not this caller's affair."""
        if nbytes <= 0:
            return 0
        freed = 0
        for tier in self._tiers():
            with suppress(Forbidden):
                answer = self._client.json("POST", "/v1/evict", {"tier": tier, "nbytes": nbytes}, attempts=1)
                with self._understood():
                    freed += index(answer["freed"])
        return freed

    def _tiers(self) -> dict[str, TierUsage]:
        answer = self._client.json("GET", "/v1/usage")
        with self._understood():
            return {
                row["name"]: TierUsage(
                    index(row["chunks"]), index(row["nbytes"]), _count(row, "capacity"), _count(row, "pinned")
                )
                for row in answer["tiers"]
                if row["chunks"] is not None
            }

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Inside, an answer of the daemon is taken apart."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            self._client.foreign(
                f"an answer that cannot be read ({type(error).__name__}: {str(error)[:200]})"
            )

    def put_report(self, name: str, data: bytes) -> bool:
        check_report(name, data)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        return self._done("PUT", f"/v1/reports/{name}", headers=headers, body=data)

    def reports(self) -> Iterator[tuple[str, bytes]]:
        """As of a tier; the daemon folds them itself."""
        for line in self._client.lines("/v1/reports", "", longest=2 * MOST_REPORT_BYTES):
            with self._understood():
                row = json.loads(line)
                name, data = str(row["name"]), json.dumps(row["report"]).encode()
            yield name, data

    def close(self) -> None:
        self._requests.close()
        self._client.close()


def _path(key: ChunkKey) -> str:
    return f"/v1/chunks/{key}"


def _info(row: Mapping[str, Any]) -> ChunkInfo:
    codec = row["codec"]
    if not isinstance(codec, str):
        raise TypeError("a codec that is no text")
    e_layers = tuple(index(layer) for layer in row["e_layers"])
    salt, slots = row.get("salt", ""), row.get("slots")
    if not isinstance(salt, str):
        raise TypeError("a salt's tag that is no text")
    by_kind = None if slots is None else SlotBytes(*(index(slots[kind]) for kind in SlotBytes._fields))
    key = ChunkKey.parse(row["key"])
    return ChunkInfo(key, index(row["tokens"]), index(row["nbytes"]), e_layers, codec, None, salt, by_kind)


def _count(row: Mapping[str, Any], name: str) -> int | None:
    # Older daemons do not tell all.
    return None if row.get(name) is None else index(row[name])


def _nanoseconds(told: Any) -> int | None:
    """Since the epoch, of a time in ISO 8601."""
    if told is None:
        return None
    moment = datetime.fromisoformat(told)
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def _find_token(token: str | None, file: Path | None) -> str | None:
    if token is not None and file is not None:
        raise ConfigError("token and token_file; one is allowed")
    if file is None:
        return token if token is not None else os.environ.get("DROIDSPEAK_TOKEN") or None
    try:
        return file.read_text().strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"token_file {file}: {getattr(error, 'strerror', None) or 'no text'}") from None
