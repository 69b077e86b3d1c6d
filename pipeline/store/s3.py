"""Objects in S3, or in a store that speaks its protocol. The only boto3.

What is asked of S3 is asked again if the connection breaks, if S3 fails or is too busy (`Patience`). An answer may be
lost after the work was done; so a write bears a mark, by which it is known as ours when the next try is refused. Bodies
travel with a checksum: to S3 with the MD5 that every endpoint knows, back with the SHA-256 that was put beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
from botocore.session import Session
from botocore.utils import calculate_md5
from urllib3.exceptions import HTTPError

from pipeline.credentials import redacted
from pipeline.errors import ConfigError, RunError
from pipeline.store.copies import copies_in
from pipeline.store.objects import Stat

TRIES = 10  # of a request; the knob is AWS_MAX_ATTEMPTS, or max_attempts of the profile
REFUSED_TRIES = 5  # of one that is refused: under load S3 refuses what it allows a second later
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
CONNECT_S, ANSWER_S = 10, 30  # so that a heart skips one beat, not four, where S3 falls silent
REFUSALS = {"AccessDenied", "Forbidden", "403"}  # that may mean anything; a wrong signature is no such thing
PASSING = {  # whatever their status
    "BadDigest",  # it was damaged on its way
    "IncompleteBody",
    "ConditionalRequestConflict",  # another write is under way
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
}
CLIENTS = threading.Lock()  # boto3 makes clients for one thread at a time
WRITER, SHA256 = "writer", "sha256"  # metadata of what is written here
PARTS = TransferConfig(max_io_queue=32)  # chunks of 256 KiB that wait for the disk: a part, in place of three


class S3Error(OSError):
    """S3 refused a request, or cannot be reached."""


class Patience:
    """How often a request is made, and how long is waited in between: a random time below one that doubles.

    In place of botocore's own modes: those share out so many retries among all threads of a process, and ten parts of
    one file use them up in a second; and to them a refusal is final.
    """

    def __init__(self, tries: int) -> None:
        self.tries = tries

    def wait_s(self, response: Any, attempts: int, caught_exception: Exception | None, **_: Any) -> float | None:
        """Return the seconds to wait before the next try; None if there is none. Called by botocore."""
        passing = isinstance(caught_exception, ConnectionError | HTTPClientError)
        tries = self.tries if passing else 1
        if response is not None:
            status, code = response[0].status_code, response[1].get("Error", {}).get("Code", "")
            if code in PASSING or status == 429 or (status >= 500 and status != 501):
                tries = self.tries
            elif status == 403 and code in REFUSALS:
                tries = min(REFUSED_TRIES, self.tries)
        return self.pause_s(attempts) if attempts < tries else None

    @staticmethod
    def pause_s(attempts: int) -> float:
        """Return the seconds to wait after so many attempts."""
        return random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempts - 1)))  # noqa: S311


class Bucket:
    """Objects below a prefix of a bucket; endpoint, region and credentials as boto3 finds them."""

    remote = True

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.patience = Patience(Session().get_config_variable("max_attempts") or TRIES)
        settings = BotoConfig(
            request_checksum_calculation="when_required",  # other endpoints refuse those they do not know
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=CONNECT_S,
            read_timeout=ANSWER_S,
        )
        with self._explained(), CLIENTS:
            self.client: Any = boto3.client("s3", config=settings)
        if redacted(endpoint := self.client.meta.endpoint_url) != endpoint:  # which Ray would pickle, and errors name
            raise ConfigError(
                f"The S3 endpoint {redacted(endpoint)} was given with a user or a password, which it does not take. "
                "Set AWS_ENDPOINT_URL to the endpoint alone, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY beside it."
            )
        events = self.client.meta.events
        events.register("needs-retry.s3", self.patience.wait_s)
        for write in ("PutObject", "UploadPart"):
            events.register(f"before-call.s3.{write}", _add_digest)

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def read(self, name: str) -> bytes:
        with self._explained(name):
            body: bytes = self._fetch(name)["Body"]
        return body

    def _fetch(self, name: str, **wanted: str) -> dict[str, Any]:
        """Return S3's answer to a request for an object, its `Body` as bytes. Raises boto3's errors."""
        for attempt in count(1):
            answer: dict[str, Any] = self.client.get_object(**self._at(name), **wanted)
            try:
                answer["Body"] = answer["Body"].read()
                _check(answer, wanted)
                return answer
            except (BotoCoreError, HTTPError):  # the answer broke off, which boto3 does not mend once it has begun
                if attempt >= self.patience.tries:
                    raise
            time.sleep(self.patience.pause_s(attempt))
        raise AssertionError

    def write(self, name: str, data: bytes) -> None:
        with self._explained():
            self.client.put_object(**self._at(name), Body=data, Metadata=_marks(data))

    def create(self, name: str, data: bytes) -> bool:
        return self._conditional(name, data, IfNoneMatch="*")

    def swap(self, name: str, expected: bytes, data: bytes) -> bool:
        try:
            with self._explained(name):
                current = self._fetch(name)
        except FileNotFoundError:
            return False
        return bool(current["Body"] == expected) and self._conditional(name, data, IfMatch=current["ETag"])

    def _conditional(self, name: str, data: bytes, **condition: str) -> bool:
        """Write if the condition holds; False if it does not."""
        marks = _marks(data)
        try:
            with self._explained():
                self.client.put_object(**self._at(name), Body=data, Metadata=marks, **condition)
        except S3Error as error:
            if _status(error) != 412 and _code(error) != "NoSuchKey":  # what was to be replaced is gone
                raise
            return self._wrote(name, marks)
        return True

    def _wrote(self, name: str, marks: dict[str, str]) -> bool:
        """Tell whether the object is the one that bears our mark: of our first try, whose answer was lost."""
        try:
            with self._explained(name):
                there = self.client.head_object(**self._at(name))["Metadata"]
        except FileNotFoundError:
            return False
        return bool(there.get(WRITER) == marks[WRITER])

    def upload(self, name: str, path: Path) -> None:
        marks = {WRITER: uuid.uuid4().hex}
        try:
            with self._explained():
                extra = {"Metadata": marks}
                self.client.upload_file(str(path), **self._at(name), ExtraArgs=extra, Config=PARTS)
        except S3Error as error:
            if _code(error) != "NoSuchUpload" or not self._wrote(name, marks):  # it may have been completed before
                raise

    def local(self, name: str, scratch: Path) -> Path:
        def fetch(path: Path) -> None:
            with self._explained(name):
                self.client.download_file(self.bucket, self.prefix + name, str(path), Config=PARTS)

        return copies_in(scratch).get(f"{self.bucket}/{self.prefix}{name}", fetch)

    def open(self, name: str, etag: str, size: int) -> io.RawIOBase:
        """Return a file of which each read fetches its own range. A read raises RunError if the ETag is another."""
        return _Ranges(self, name, etag, size)

    def read_range(self, name: str, etag: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end` of the object of an ETag."""
        with self._explained(name):
            body: bytes = self._fetch(name, IfMatch=etag, Range=f"bytes={start}-{end - 1}")["Body"]
        return body

    def sizes(self, prefix: str) -> dict[str, int]:
        return self._listed("Size", prefix)

    def stats(self, prefix: str) -> dict[str, Stat]:
        listed = self._pages("list_objects_v2", "Contents", prefix)
        return {
            item["Key"][len(self.prefix) :]: Stat(item["Size"], item["LastModified"].timestamp()) for item in listed
        }

    def versions(self, prefix: str) -> dict[str, str]:
        """Return the ETag of every object whose name starts with `prefix`."""
        return self._listed("ETag", prefix)

    def _listed(self, field: str, prefix: str) -> dict[str, Any]:
        listed = self._pages("list_objects_v2", "Contents", prefix)
        return {item["Key"][len(self.prefix) :]: item[field] for item in listed}

    def folders(self, prefix: str) -> list[str]:
        listed = self._pages("list_objects_v2", "CommonPrefixes", prefix, Delimiter="/")
        return [item["Prefix"].split("/")[-2] for item in listed]

    def _pages(self, call: str, entries: str, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        wanted = {"Bucket": self.bucket, "Prefix": self.prefix + prefix, **more}
        with self._explained():
            for page in self.client.get_paginator(call).paginate(**wanted):
                yield from page.get(entries, [])

    def delete(self, name: str) -> None:
        with self._explained():
            self.client.delete_object(**self._at(name))

    def delete_below(self, prefix: str) -> None:
        for name in self.sizes(prefix):
            self.delete(name)

    def delete_unfinished(self, prefix: str, given_up: Callable[[str], bool]) -> None:
        for upload in self._pages("list_multipart_uploads", "Uploads", prefix):
            if not given_up(upload["Key"].removeprefix(self.prefix + prefix)):
                continue
            with contextlib.suppress(FileNotFoundError), self._explained(upload["Key"]):  # another has ended it
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def free_bytes(self) -> int | None:
        return None

    def arrow(self, name: str) -> tuple[str, pyarrow.fs.FileSystem]:
        meta = self.client.meta
        return f"{self.bucket}/{self.prefix}{name}", ArrowFiles(
            meta.region_name, meta.endpoint_url, self.patience.tries
        )

    def flaw(self, name: str) -> str | None:
        try:
            if not self.create(name, b"first") or self.create(name, b"second"):
                return "it writes in spite of If-None-Match"
            stale = self.versions(name)[name]
            if not self.swap(name, b"first", b"second") or self._conditional(name, b"third", IfMatch=stale):
                return "it writes in spite of If-Match"
        except S3Error as error:
            if _status(error) != 501:
                raise
            return f"it has no conditional writes ({error})"
        return None

    @contextlib.contextmanager
    def _explained(self, name: str | None = None) -> Iterator[None]:
        """Turn boto3's errors into S3Error, and the absence of the object `name` into FileNotFoundError."""
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error, HTTPError) as error:
            if name is not None and _status(error) == 404 and _code(error) != "NoSuchBucket":
                raise FileNotFoundError(name) from error
            said = str(error).rstrip(".")
            if _status(error) == 403:
                tries = _answer(error)["ResponseMetadata"].get("RetryAttempts", 0) + 1
                said += f". It was asked {tries} times: see which credentials boto3 finds, and what they allow"
            elif isinstance(error, ConnectionError | HTTPClientError):
                said += f". It was tried {self.patience.tries} times, or as often as AWS_MAX_ATTEMPTS says"
            raise S3Error(f"{said}.") from error


class ArrowFiles(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """S3 for readers through Arrow, which forgets how often to try when it is pickled. Each process finds the
    credentials by itself."""

    def __init__(self, region: str, endpoint: str, tries: int) -> None:
        strategy = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=tries)
        super().__init__(region=region, endpoint_override=endpoint, retry_strategy=strategy)
        self._given = region, endpoint, tries

    def __reduce__(self) -> tuple[type[ArrowFiles], tuple[str, str, int]]:
        return ArrowFiles, self._given


class _Ranges(io.RawIOBase):
    """An object as a file to read from, as long as it is the one of an ETag."""

    def __init__(self, bucket: Bucket, name: str, etag: str, size: int) -> None:
        self._bucket, self._name, self._etag, self._size, self._position = bucket, name, etag, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if self._position >= end:
            return 0
        try:
            data = self._bucket.read_range(self._name, self._etag, self._position, end)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or _status(error) == 412:
                uri = f"s3://{self._bucket.bucket}/{self._bucket.prefix}{self._name}"
                raise RunError(f"{uri} changed after the plan was made. Give the command again.") from error
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class DamagedAnswerError(BotoCoreError):  # type: ignore[misc]
    """What arrived is not what was written."""

    fmt = "An object arrived damaged: its SHA-256 is {arrived}, and it was written with {written}"


def _marks(data: bytes) -> dict[str, str]:
    """Return the metadata of an object that is written: a mark of this write, and its checksum."""
    return {WRITER: uuid.uuid4().hex, SHA256: hashlib.sha256(data).hexdigest()}


def _check(answer: dict[str, Any], wanted: dict[str, str]) -> None:
    """Raise DamagedAnswerError unless a whole object is the one that was written; one that others wrote is believed."""
    written, arrived = answer["Metadata"].get(SHA256), hashlib.sha256(answer["Body"]).hexdigest()
    if "Range" not in wanted and written not in (None, arrived):
        raise DamagedAnswerError(arrived=arrived, written=written)


def _add_digest(params: dict[str, Any], **_: Any) -> None:
    """Have S3 check that what arrives is what was sent."""
    params["headers"]["Content-MD5"] = calculate_md5(params["body"])


def _answer(error: BaseException | None) -> dict[str, Any]:
    """Return the answer of S3 that made an error, or made the error before it; an empty one if none did."""
    while error is not None and not isinstance(error, ClientError):
        error = error.__cause__ or (error.__context__ if isinstance(error, Boto3Error) else None)
    return error.response if error is not None else {}


def _status(error: Exception) -> int:
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))
