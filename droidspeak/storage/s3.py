"""The S3 tier: one object per chunk in a bucket, layers by range requests.

    <prefix>/chunks/<source>/<shard>/<prefix hash>.safetensors
    <prefix>/reports/<name>.json    what the engines that use it tell of themselves

The object's user metadata (`tokens`, `header-bytes`, `e-layers`, `codec`, `salt`, `slot-bytes`) lets one
HEAD request answer `head`. A read is a HEAD (not if the chunk's header is cached), one GET of exactly the
header, and one GET for each coalesced range of the slots asked for. Every GET names the version that the
HEAD saw (If-Match): parts of an object that is replaced in between are never mixed, and one that is gone is a
miss.

Any S3-compatible endpoint serves that knows range and conditional requests. Credentials come from
boto3's usual chain: environment, shared files, instance role.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from droidspeak.errors import (
    ChunkCorrupt,
    ConfigError,
    MissingExtra,
    TierTimeout,
    TierUnavailable,
    UsageError,
)
from droidspeak.storage.container import Chunk, ChunkHeader, Slot, SlotRecord, coalesce, place
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.ranges import SideBySide, VersionedHeaders
from droidspeak.storage.reports import MOST_REPORT_BYTES, TOTAL, check_report, is_report_name
from droidspeak.storage.selection import LISTED, Selection
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, SlotBytes, Tier, TierUsage, by_source

if TYPE_CHECKING:
    from datetime import datetime

    from mypy_boto3_s3 import S3Client

    from droidspeak.storage.reports import Fold

__all__ = ["S3Tier"]

_SUFFIX = ".safetensors"
_ABSENT = {"404", "NoSuchKey", "NotFound", "412", "PreconditionFailed"}


class _Gone(Exception):
    """The version that was asked for is not there, or no longer."""


@dataclass(frozen=True, slots=True)
class _Version:
    """What a HEAD request says of an object."""

    etag: str
    nbytes: int
    metadata: Mapping[str, str]


class S3Tier(Tier):
    """Chunks in an S3 bucket. It sets no bound: lifetimes are the bucket's own lifecycle rules.

    Args:
        bucket: must exist.
        prefix: folder inside the bucket.
        endpoint: URL of an S3-compatible service; AWS if not given.
        region: of the bucket; boto3's default if not given.
        timeout: seconds to connect, and seconds of silence, before an attempt is given up.
        attempts: tries of each request, the first one included; boto3 waits up to a second or two
            between them.
        concurrency: requests at a time.

    Raises:
        MissingExtra: boto3 is not installed.
        ConfigError: boto3 refuses the endpoint, the region or the profile of its chain.
    """

    best_read = 8 << 20

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        timeout: float = 5.0,
        attempts: int = 3,
        concurrency: int = 16,
        name: str = "s3",
    ) -> None:
        self.name = name
        self._bucket = bucket
        self._folder = f"{prefix.strip('/')}/chunks/".lstrip("/")
        self._reports = f"{prefix.strip('/')}/reports/".lstrip("/")
        self._where = f"S3 bucket {bucket!r} at {endpoint or 'AWS'}"
        self._concurrency = concurrency
        self._attempts = attempts
        self._client = _connect(endpoint, region, timeout, attempts, concurrency)
        self._requests = SideBySide(concurrency, name)
        self._headers = VersionedHeaders()

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        try:
            with self._errors():
                return self._info(key)
        except _Gone:
            return None

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        """As `Tier.leading`, by concurrent HEAD requests in growing batches."""
        found: list[ChunkInfo] = []
        batch = 4
        while len(found) < len(keys):
            asked = keys[len(found) : len(found) + batch]
            for info in self._requests.all(self._sound, asked):
                if info is None:
                    return found
                found.append(info)
            batch = min(2 * batch, 4 * self._concurrency)
        return found

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        # Once more for an object that has been replaced since its header was cached.
        for _attempt in range(2):
            try:
                with self._errors():
                    return self._read(key, slots, into)
            except _Gone:
                self._headers.forget(key)
        return None

    def write(self, chunk: Chunk) -> None:
        header = chunk.header
        metadata = {
            "tokens": str(header.tokens),
            "header-bytes": str(header.data_start),
            "e-layers": ",".join(map(str, header.e_layers)),
            "codec": header.codec,
            "salt": header.labels.get("salt", ""),
            "slot-bytes": ",".join(map(str, header.slot_bytes)),
        }
        body = chunk.to_bytes()
        with self._errors():
            self._client.put_object(
                Bucket=self._bucket, Key=self._path(chunk.key), Body=body, Metadata=metadata
            )

    def delete(self, key: ChunkKey) -> bool:
        try:
            with self._errors():
                self._version(key)
        except _Gone:
            return False
        self.quarantine(key)
        return True

    def delete_unused(self, records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
        return self._requests.those(self._left, records)

    def quarantine(self, key: ChunkKey) -> None:
        self._headers.forget(key)
        with self._errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._path(key))

    def keys(self) -> Iterator[ChunkKey]:
        return (record.info.key for record in self._objects())

    def records(self) -> Iterator[ChunkRecord]:
        return self.select(Selection())

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        """As of a tier. What the listing tells is looked at first: the others take a HEAD request each."""
        listed, looked_at = selection.split(LISTED)
        return looked_at.of(self._described(listed.of(self._objects())))

    def _described(self, listed: Iterator[ChunkRecord]) -> Iterator[ChunkRecord]:
        while batch := list(islice(listed, 4 * self._concurrency)):
            found = self._requests.all(self._describe, batch)
            yield from (record for record in found if record)

    def _describe(self, listed: ChunkRecord) -> ChunkRecord | None:
        try:
            info = self.head(listed.info.key)
        except ChunkCorrupt:
            return listed  # it is there, whatever it is
        return replace(listed, info=info.held_by(self.name)) if info else None

    def sources(self) -> dict[SourceId, TierUsage]:
        return by_source((record.info.key.source, record.info.nbytes) for record in self._objects())

    def usage(self) -> TierUsage:
        """By listing the bucket: one request for each thousand objects."""
        sizes = [record.info.nbytes for record in self._objects()]
        return TierUsage(len(sizes), sum(sizes))

    def put_report(self, name: str, data: bytes) -> bool:
        check_report(name, data)
        with self._errors():
            self._client.put_object(Bucket=self._bucket, Key=self._report(name), Body=data)
        return True

    def reports(self) -> Iterator[tuple[str, bytes]]:
        return ((name, data) for name, _, data in self._documents())

    def fold_reports(self, fold: Fold) -> None:
        """As of a tier. Of two who fold at a time one does nothing: a total is replaced as it was read."""
        documents = {name: (etag, data) for name, etag, data in self._documents()}
        folded = fold({name: data for name, (_, data) in documents.items()})
        if folded is None:
            return
        check_report(TOTAL, folded.total)
        as_read: Any = {"IfMatch": documents[TOTAL][0]} if TOTAL in documents else {"IfNoneMatch": "*"}
        with suppress(_Gone), self._errors():
            self._client.put_object(
                Bucket=self._bucket, Key=self._report(TOTAL), Body=folded.total, **as_read
            )
            self._requests.all(self._delete_report, list(folded.gone))

    def close(self) -> None:
        self._requests.close()
        self._client.close()

    # Requests

    def _sound(self, key: ChunkKey) -> ChunkInfo | None:
        """As `head`; a corrupt object is a gap, so that it does not hide the chunks before it."""
        try:
            return self.head(key)
        except ChunkCorrupt:
            return None

    def _info(self, key: ChunkKey) -> ChunkInfo:
        version = self._version(key)
        try:
            tokens = int(version.metadata["tokens"])
            e_layers = tuple(int(layer) for layer in version.metadata["e-layers"].split(",") if layer)
            codec = version.metadata["codec"]
            salt, slots = version.metadata.get("salt", ""), _slot_bytes(version.metadata)
        except (KeyError, ValueError):
            # Copied here by a tool that drops user metadata.
            return ChunkInfo.of_header(self._fetch_header(key, version))
        return ChunkInfo(key, tokens, version.nbytes, e_layers, codec, None, salt, slots)

    def _version(self, key: ChunkKey) -> _Version:
        answer = self._client.head_object(Bucket=self._bucket, Key=self._path(key))
        return _Version(answer["ETag"], answer["ContentLength"], answer["Metadata"])

    def _read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None,
        into: Mapping[Slot, torch.Tensor] | None,
    ) -> Chunk:
        known = self._headers.get(key)
        # A cached header that cannot answer may be one of an object that was replaced or deleted since.
        stale = (
            known is not None and slots is not None and not (slots and set(slots) <= known[1].records.keys())
        )
        etag, header = self._find_header(key) if known is None or stale else known
        records = header.select(slots)
        placed = place(records, into)

        def fetch(group: list[SlotRecord]) -> None:
            start, end = header.data_start + group[0].start, header.data_start + group[-1].end
            self._get(key, etag, start, end, [placed[record.slot].numpy().data for record in group])

        self._requests.all(fetch, coalesce(records, self.best_read))
        return Chunk(header, placed).verify()

    def _find_header(self, key: ChunkKey) -> tuple[str, ChunkHeader]:
        version = self._version(key)
        header = self._fetch_header(key, version)
        self._headers.remember(key, version.etag, header)
        return version.etag, header

    def _fetch_header(self, key: ChunkKey, version: _Version) -> ChunkHeader:
        length = version.metadata.get("header-bytes", "")
        if not length.isdecimal():
            length = str(ChunkHeader.length(self._get_bytes(key, version, 8)))
        return ChunkHeader.parse(self._get_bytes(key, version, int(length))).expect(key, version.nbytes)

    def _get_bytes(self, key: ChunkKey, version: _Version, count: int) -> bytes:
        if version.nbytes < count:
            raise ChunkCorrupt(f"object of {key} ends after {version.nbytes} of {count} bytes", "truncated")
        data = bytearray(count)
        self._get(key, version.etag, 0, count, [memoryview(data)])
        return bytes(data)

    def _get(self, key: ChunkKey, etag: str, start: int, end: int, targets: Collection[memoryview]) -> None:
        """Fills `targets`, one after the other, with bytes `start`..`end` of the object."""
        from botocore.exceptions import IncompleteReadError, ResponseStreamingError

        for attempt in range(self._attempts if start < end else 0):
            try:
                return self._get_once(key, etag, start, end, targets)
            except (IncompleteReadError, ResponseStreamingError):
                # boto3 repeats requests, not bodies that break off.
                if attempt == self._attempts - 1:
                    raise
        return None

    def _get_once(
        self, key: ChunkKey, etag: str, start: int, end: int, targets: Collection[memoryview]
    ) -> None:
        answer = self._client.get_object(
            Bucket=self._bucket, Key=self._path(key), Range=f"bytes={start}-{end - 1}", IfMatch=etag
        )
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] != end - start:
                raise ChunkCorrupt(f"object of {key}: {answer['ContentLength']} bytes, not {end - start}")
            for target in targets:
                _fill(target, body)

    def _objects(self) -> Iterator[ChunkRecord]:
        """What the listing tells; whatever else lies in the folder is passed over."""
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._folder):
                for row in page.get("Contents", []):
                    if key := self._key(row["Key"]):
                        info = ChunkInfo(key, 0, row["Size"], (), tier=self.name)
                        yield ChunkRecord(info, created=_nanoseconds(row["LastModified"]))

    def _documents(self) -> Iterator[tuple[str, str, bytes]]:
        """Names, entity tags and contents of the reports."""
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._reports):
                paths = [row["Key"] for row in page.get("Contents", []) if row["Size"] <= MOST_REPORT_BYTES]
                names = [path.removeprefix(self._reports).removesuffix(".json") for path in paths]
                known = [name for name, path in zip(names, paths, strict=True) if self._report(name) == path]
                found = self._requests.all(self._document, list(filter(is_report_name, known)))
                yield from (document for document in found if document)

    def _document(self, name: str) -> tuple[str, str, bytes] | None:
        try:
            with self._errors():
                answer = self._client.get_object(Bucket=self._bucket, Key=self._report(name))
                with closing(answer["Body"]) as body:
                    return name, answer["ETag"], body.read()
        except _Gone:
            return None

    def _delete_report(self, name: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._report(name))

    def _report(self, name: str) -> str:
        return f"{self._reports}{name}.json"

    def _path(self, key: ChunkKey) -> str:
        return f"{self._folder}{key}{_SUFFIX}"

    def _key(self, path: str) -> ChunkKey | None:
        try:
            return ChunkKey.parse(path.removeprefix(self._folder).removesuffix(_SUFFIX))
        except UsageError:
            return None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what boto3 raises into the error tree, in one line, and absence into `_Gone`."""
        from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (ConnectTimeoutError, ReadTimeoutError) as error:
            raise TierTimeout(f"{self._where}: {_one_line(error)}") from error
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in _ABSENT:
                raise _Gone from error
            raise TierUnavailable(f"{self._where}: {_one_line(error)}") from error
        except (BotoCoreError, HTTPError) as error:
            raise TierUnavailable(f"{self._where}: {_one_line(error)}") from error


def _connect(
    endpoint: str | None, region: str | None, timeout: float, attempts: int, concurrency: int
) -> S3Client:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise MissingExtra("S3 tier", "s3") from None
    config = Config(
        connect_timeout=timeout,
        read_timeout=timeout,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        max_pool_connections=concurrency,
        # Chunks carry their own checksums, and not every S3-compatible service knows AWS's trailers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    # A session of its own: boto3's default session may not be shared between threads.
    try:
        session = boto3.session.Session()
        return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"S3 at {endpoint or 'AWS'}: {_one_line(error)}") from None


def _fill(target: memoryview, body: Any) -> None:
    filled = 0
    while filled < len(target):
        count = body.readinto(target[filled:])
        if not count:
            raise TierUnavailable(f"S3 answer ends {len(target) - filled} bytes early")
        filled += count


def _slot_bytes(metadata: Mapping[str, str]) -> SlotBytes | None:
    """Raises `ValueError` for what is no such list."""
    told = metadata.get("slot-bytes")
    if told is None:
        return None
    k, v, e = map(int, told.split(","))
    return SlotBytes(k, v, e)


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
