"""Named objects behind one small interface: files below a directory, or a bucket in S3. The only boto3 import."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import boto3
import pyarrow.fs
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.errors import ConfigError, RunError

CONFLICT_RETRIES = 6
TEMPORARY = ".tmp"
SPARED_S = 60.0  # for how long a temporary file may still become one that is spared
FAULTS = (OSError, ClientError, BotoCoreError)  # what a store that cannot be reached raises


class Objects(Protocol):
    """Named objects under one root. Every write is atomic: a reader sees the old object, the new one, or none."""

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def write(self, name: str, data: bytes) -> None: ...

    def create(self, name: str, data: bytes) -> bool:
        """Write unless the object exists; False if it does."""

    def swap(self, name: str, expected: bytes, data: bytes) -> bool:
        """Replace the object if it still holds `expected`; False otherwise."""

    def upload(self, name: str, path: Path) -> None: ...

    def local(self, name: str, scratch: Path) -> Path:
        """A local file with the object's content: the object itself, or a copy under `scratch`."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every object whose name starts with `prefix`."""

    def delete(self, name: str) -> None: ...

    def delete_below(self, prefix: str) -> None:
        """Delete every object whose name starts with `prefix`, which ends in a slash."""

    def delete_unfinished(self, prefix: str, spared: str) -> None:
        """Delete what killed writers left below `prefix`, which ends in a slash, except of files named `spared` that
        others may be writing now."""

    def free_bytes(self) -> int | None:
        """Space left, or None where there is no limit to ask for."""


class Directory:
    """Objects as files below a directory, on this machine or a shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, name: str) -> Path:
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise RunError(f"The object name {name!r} leads outside the store {self.root}.")
        return path

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with self._temporary(name) as (temporary, path):
            temporary.write_bytes(data)
            _sync(temporary)
            temporary.replace(path)

    def create(self, name: str, data: bytes) -> bool:
        with self._temporary(name) as (temporary, path):
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            return True

    def swap(self, name: str, expected: bytes, data: bytes) -> bool:
        path = self._path(name)
        if not path.exists():
            return False
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if path.read_bytes() != expected:
                    return False
            except FileNotFoundError:
                return False
            self.write(name, data)
            return True

    def upload(self, name: str, path: Path) -> None:
        with self._temporary(name) as (temporary, target):
            shutil.copyfile(path, temporary)
            _sync(temporary)
            temporary.replace(target)

    def local(self, name: str, scratch: Path) -> Path:
        path = self._path(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        return path

    def sizes(self, prefix: str) -> dict[str, int]:
        folder = self._path(prefix.rpartition("/")[0])
        found = {}
        for parent, _, files in os.walk(folder):  # unlike rglob, at ease with folders that vanish meanwhile
            for path in (Path(parent, file) for file in files if not file.startswith(".")):
                name = path.relative_to(self.root.resolve()).as_posix()
                if name.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        found[name] = path.stat().st_size
        return dict(sorted(found.items()))

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def delete_below(self, prefix: str) -> None:
        shutil.rmtree(self._path(prefix), ignore_errors=True)

    def delete_unfinished(self, prefix: str, spared: str) -> None:
        for folder, _, names in os.walk(self._path(prefix)):
            for name in names:
                path = Path(folder, name)
                if name.endswith(TEMPORARY) and not (name.startswith(f".{spared}.") and _is_young(path)):
                    path.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        existing = self.root.resolve()
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[tuple[Path, Path]]:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            yield temporary, path
        finally:
            temporary.unlink(missing_ok=True)


def _is_young(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime < SPARED_S
    return False


class Bucket:
    """Objects in S3 or a store that speaks its protocol; endpoint and credentials as boto3 finds them."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        settings = BotoConfig(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "adaptive", "max_attempts": 10},
        )
        self.client: Any = boto3.client("s3", config=settings)

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def read(self, name: str) -> bytes:
        with _missing(name):
            body: bytes = self.client.get_object(**self._at(name))["Body"].read()
        return body

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(**self._at(name), Body=data)

    def create(self, name: str, data: bytes) -> bool:
        return self._conditional(name, data, IfNoneMatch="*")

    def swap(self, name: str, expected: bytes, data: bytes) -> bool:
        try:
            with _missing(name):
                current = self.client.get_object(**self._at(name))
        except FileNotFoundError:
            return False
        if current["Body"].read() != expected:
            return False
        return self._conditional(name, data, IfMatch=current["ETag"])

    def _conditional(self, name: str, data: bytes, **condition: str) -> bool:
        for attempt in range(CONFLICT_RETRIES):
            try:
                self.client.put_object(**self._at(name), Body=data, **condition)
                return True
            except ClientError as error:
                if _status(error) == 412:
                    return False
                if _status(error) != 409 or attempt == CONFLICT_RETRIES - 1:  # 409: another write is under way
                    raise
            time.sleep(0.2 * 2**attempt)
        return False

    def upload(self, name: str, path: Path) -> None:
        self.client.upload_file(str(path), **self._at(name))

    def local(self, name: str, scratch: Path) -> Path:
        digest = hashlib.sha256(f"{self.bucket}/{self.prefix}{name}".encode()).hexdigest()[:16]
        path = scratch / digest / Path(name).name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
            with _missing(name):
                self.client.download_file(self.bucket, self.prefix + name, str(temporary))
            temporary.replace(path)
        return path

    def sizes(self, prefix: str) -> dict[str, int]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        objects = (item for page in pages for item in page.get("Contents", []))
        return {item["Key"][len(self.prefix) :]: item["Size"] for item in objects}

    def delete(self, name: str) -> None:
        self.client.delete_object(**self._at(name))

    def delete_below(self, prefix: str) -> None:
        for name in self.sizes(prefix):
            self.delete(name)

    def delete_unfinished(self, prefix: str, spared: str) -> None:
        pages = self.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix
        )
        uploads = (upload for page in pages for upload in page.get("Uploads", []))
        for upload in uploads:  # an object named `spared` is small, and never uploaded in parts
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def free_bytes(self) -> int | None:
        return None

    def arrow(self, name: str) -> tuple[str, pyarrow.fs.FileSystem]:
        """The same place for libraries that read through Arrow; each process finds the credentials by itself."""
        filesystem = pyarrow.fs.S3FileSystem(
            region=self.client.meta.region_name, endpoint_override=self.client.meta.endpoint_url
        )
        return f"{self.bucket}/{self.prefix}{name}", filesystem

    def versions(self, prefix: str) -> dict[str, str]:
        """ETag of every object whose name starts with `prefix`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        return {i["Key"][len(self.prefix) :]: i["ETag"] for page in pages for i in page.get("Contents", [])}


@lru_cache(maxsize=16)
def open_objects(uri: str) -> Directory | Bucket:
    """The objects under a directory path, `file://` or `s3://bucket/prefix`."""
    if uri.startswith("s3://"):
        bucket, _, prefix = uri[5:].partition("/")
        return Bucket(bucket, prefix.rstrip("/") + "/" if prefix.strip("/") else "")
    if "://" in uri and not uri.startswith("file://"):
        raise ConfigError(f"resources.storage_uri is {uri!r}; valid: a directory, or s3://bucket/prefix")
    return Directory(Path(uri.removeprefix("file://")).expanduser().resolve())


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _missing(name: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _status(error) == 404:
            raise FileNotFoundError(name) from error
        raise


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
