"""Objects in S3, or in a store that speaks its protocol. The only boto3."""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs
from boto3.exceptions import Boto3Error
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

CONFLICT_RETRIES = 6
PARTIAL = ".tmp"  # end of the name of a copy that is not whole


class S3Error(OSError):
    """S3 refused a request, or cannot be reached."""


class Bucket:
    """Objects below a prefix of a bucket; endpoint and credentials as boto3 finds them."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        settings = BotoConfig(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "adaptive", "max_attempts": 10},
        )
        with _explained():
            self.client: Any = boto3.client("s3", config=settings)

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
        digest = hashlib.sha256(f"{self.bucket}/{self.prefix}{name}".encode()).hexdigest()[:16]
        path = scratch / digest / Path(name).name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
            with _explained(name):
                self.client.download_file(self.bucket, self.prefix + name, str(temporary))
            temporary.replace(path)
        return path

    def sizes(self, prefix: str) -> dict[str, int]:
        return self._listed("Size", prefix)

    def versions(self, prefix: str) -> dict[str, str]:
        """Return the ETag of every object whose name starts with `prefix`."""
        return self._listed("ETag", prefix)

    def _listed(self, field: str, prefix: str) -> dict[str, Any]:
        listed = self._pages("list_objects_v2", "Contents", prefix)
        return {item["Key"][len(self.prefix) :]: item[field] for item in listed}

    def _pages(self, call: str, entries: str, prefix: str) -> Iterator[dict[str, Any]]:
        with _explained():
            for page in self.client.get_paginator(call).paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                yield from page.get(entries, [])

    def delete(self, name: str) -> None:
        with _explained():
            self.client.delete_object(**self._at(name))

    def delete_below(self, prefix: str) -> None:
        for name in self.sizes(prefix):
            self.delete(name)

    def delete_unfinished(self, prefix: str, spared: str) -> None:
        with _explained():
            # An object named `spared` is small, and never uploaded in parts.
            for upload in self._pages("list_multipart_uploads", "Uploads", prefix):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def free_bytes(self) -> int | None:
        return None

    def arrow(self, name: str) -> tuple[str, pyarrow.fs.FileSystem]:
        filesystem = pyarrow.fs.S3FileSystem(  # each process finds the credentials by itself
            region=self.client.meta.region_name, endpoint_override=self.client.meta.endpoint_url
        )
        return f"{self.bucket}/{self.prefix}{name}", filesystem


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
