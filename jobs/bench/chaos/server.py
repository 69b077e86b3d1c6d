"""An S3 on this machine, by moto, that keeps what S3 promises: a condition is checked and the object written in one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.errors import ConfigError

# What a client of it needs; nothing of these is a secret.
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
CLEARED = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_MAX_ATTEMPTS", "AWS_ENDPOINT_URL_S3")
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def atomic_s3() -> Application:
    """Return moto's S3 as a WSGI application that checks a condition and writes the object in one, as S3 does: of
    sixteen writers moto by itself lets two win now and then. It refuses what was damaged on its way, and forgets an
    upload once that is complete, as some endpoints do. Raises ConfigError if moto is not installed."""
    try:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.exceptions import ClientDisconnected
        from werkzeug.wsgi import get_input_stream
    except ImportError as error:
        raise ConfigError(f"bench chaos needs an S3 to do harm to: pip install 'moto[server]' ({error})") from error
    moto: Any = DomainDispatcherApplication(create_backend_app)
    lock, completed = threading.Lock(), set[str]()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            body = get_input_stream(environ).read()
        except ClientDisconnected:
            return refusal("IncompleteBody")(environ, start_response)
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        if environ.get("HTTP_CONTENT_MD5", digest) != digest:
            return refusal("BadDigest")(environ, start_response)
        with lock:
            if environ["REQUEST_METHOD"] == "POST" and "uploadId" in (query := environ["QUERY_STRING"]):
                if query in completed:
                    return refusal("NoSuchUpload", 404)(environ, start_response)
                completed.add(query)
            return list(moto({**environ, "wsgi.input": io.BytesIO(body)}, start_response))

    return answer


def refusal(code: str, status: int = 400) -> Application:
    """Return an answer of S3 that refuses, by its code."""
    from werkzeug import Response

    answer: Application = Response(f"<Error><Code>{code}</Code></Error>", status)
    return answer


@contextlib.contextmanager
def served(application: Application | None = None) -> Iterator[int]:
    """Serve an application (None: an S3 of our own) to many clients side by side while inside; yields its port."""
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    server = make_server("127.0.0.1", 0, application or atomic_s3(), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make_bucket(port: int, name: str) -> None:
    """Make an empty bucket at the server of a port, which asks nobody for a name."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{name}")
    connection.getresponse().read()
    connection.close()
