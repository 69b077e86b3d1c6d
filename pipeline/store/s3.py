"""Objects in S3, or in a store that speaks its protocol. The only boto3."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs
from boto3.exceptions import Boto3Error
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.credentials import redacted
from pipeline.errors import ConfigError, RunError
from pipeline.store.copies import copies_in
from pipeline.store.objects import Stat

CONFLICT_RETRIES = 6
READ_TRIES = 3


class S3Error(OSError):
    """S3 refused a request, or cannot be reached."""


class Bucket:
    """Objects below a prefix of a bucket; endpoint and credentials as boto3 finds them."""

    remote = True

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        settings = BotoConfig(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "adaptive", "max_attempts": 10},
        )
        with _explained():
            self.client: Any = boto3.client("s3", config=settings)
        if redacted(endpoint := self.client.meta.endpoint_url) != endpoint:  # which Ray would pickle, and errors name
            raise ConfigError(
                f"The S3 endpoint {redacted(endpoint)} was given with a user or a password, which it does not take. "
                "Set AWS_ENDPOINT_URL to the endpoint alone, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY beside it."
            )

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def read(self, name: str) -> bytes:
        with _explained(name):
            body: bytes = self.client.get_object(**self._at(name))["Body"].read()
        return body

    def write(self, name: str, data: bytes) -> None:
        with _explained():
            self.client.put_object(**self._at(name), Body=data)

    def create(self, name: str, data: bytes) -> bool:
        return self._conditional(name, data, IfNoneMatch="*")

    def swap(self, name: str, expected: bytes, data: bytes) -> bool:
        try:
            with _explained(name):
                current = self.client.get_object(**self._at(name))
                content = current["Body"].read()
        except FileNotFoundError:
            return False
        return content == expected and self._conditional(name, data, IfMatch=current["ETag"])

    def _conditional(self, name: str, data: bytes, **condition: str) -> bool:
        """Write if the condition holds; False if it does not."""
        for attempt in range(CONFLICT_RETRIES):
            try:
                with _explained():
                    self.client.put_object(**self._at(name), Body=data, **condition)
                return True
            except S3Error as error:
                if _status(error) == 412:
                    return False
                if _status(error) != 409 or attempt == CONFLICT_RETRIES - 1:  # 409: another write is under way
                    raise
            time.sleep(0.2 * 2**attempt)
        return False

    def upload(self, name: str, path: Path) -> None:
        with _explained():
            self.client.upload_file(str(path), **self._at(name))

    def local(self, name: str, scratch: Path) -> Path:
        def fetch(path: Path) -> None:
            with _explained(name):
                self.client.download_file(self.bucket, self.prefix + name, str(path))

        return copies_in(scratch).get(f"{self.bucket}/{self.prefix}{name}", fetch)

    def open(self, name: str, etag: str, size: int) -> io.RawIOBase:
        """Return a file of which each read fetches its own range. A read raises RunError if the ETag is another."""
        return _Ranges(self.client, self._at(name), etag, size)

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
        with _explained():
            for page in self.client.get_paginator(call).paginate(**wanted):
                yield from page.get(entries, [])

    def delete(self, name: str) -> None:
        with _explained():
            self.client.delete_object(**self._at(name))

    def delete_below(self, prefix: str) -> None:
        for name in self.sizes(prefix):
            self.delete(name)

    def delete_unfinished(self, prefix: str, given_up: Callable[[str], bool]) -> None:
        with _explained():
            for upload in self._pages("list_multipart_uploads", "Uploads", prefix):
                if not given_up(upload["Key"].removeprefix(self.prefix + prefix)):
                    continue
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def free_bytes(self) -> int | None:
        return None

    def arrow(self, name: str) -> tuple[str, pyarrow.fs.FileSystem]:
        filesystem = pyarrow.fs.S3FileSystem(  # each process finds the credentials by itself
            region=self.client.meta.region_name, endpoint_override=self.client.meta.endpoint_url
        )
        return f"{self.bucket}/{self.prefix}{name}", filesystem

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


class _Ranges(io.RawIOBase):
    """An object as a file to read from, as long as it is the one of an ETag."""

    def __init__(self, client: Any, place: dict[str, str], etag: str, size: int) -> None:
        self._client, self._place, self._etag, self._size, self._position = client, place, etag, size, 0

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
        span = f"bytes={self._position}-{end - 1}"
        try:
            with _explained(self._place["Key"]):
                data = self._fetch(span)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or _status(error) == 412:
                uri = "s3://{Bucket}/{Key}".format(**self._place)
                raise RunError(f"{uri} changed after the plan was made. Give the command again.") from error
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, span: str) -> bytes:
        tries_left = READ_TRIES
        while True:
            answer = self._client.get_object(**self._place, IfMatch=self._etag, Range=span)
            try:
                body: bytes = answer["Body"].read()
                return body
            except BotoCoreError:  # the connection broke, which boto3 does not mend once an answer has begun
                tries_left -= 1
                if not tries_left:
                    raise


@contextlib.contextmanager
def _explained(name: str | None = None) -> Iterator[None]:
    """Turn boto3's errors into S3Error, and the absence of the object `name` into FileNotFoundError."""
    try:
        yield
    except ClientError as error:
        if name is not None and _status(error) == 404:
            raise FileNotFoundError(name) from error
        raise S3Error(str(error)) from error
    except (BotoCoreError, Boto3Error) as error:
        raise S3Error(str(error)) from error


def _status(error: Exception) -> int:
    cause = error if isinstance(error, ClientError) else error.__cause__
    response = cause.response if isinstance(cause, ClientError) else {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
