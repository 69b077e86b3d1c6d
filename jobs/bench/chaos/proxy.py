"""A proxy before S3 that does harm: it fails, is too busy, refuses, loses answers, cuts connections and uploads.

A fault befalls requests at a rate, drawn from a seed; or `each` request once, the first time it comes.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal[
    "500",
    "503",
    "refused",  # as S3 says where it means that it is too busy
    "slow",
    "cut",
    "answer lost",
    "answer cut",
    "half upload",
    "silent",
    "damaged",  # one byte, on the way there or back
    "unknown key",
]
FAULTS: tuple[Fault, ...] = ("500", "503", "refused", "slow", "cut", "answer lost", "answer cut", "half upload")
ANSWERS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "refused": (403, "AccessDenied"),
    "unknown key": (403, "InvalidAccessKeyId"),
}
SLOW_S = 0.02
CONDITIONS = ("If-None-Match", "If-Match", "Range")
Request = tuple[str, str]  # method and path


class FaultProxy:
    """Faults on the way to S3 at a port of this machine. `injected` counts them by kind; `requests` are those that
    came, with their headers."""

    def __init__(self, seed: int = 0) -> None:
        self.injected, self.requests = Counter[str](), list[tuple[Request, dict[str, str]]]()
        self.rate, self.kinds = 0.0, FAULTS
        self.befalls: Callable[[Request], bool] = lambda request: True
        self._each: set[tuple[str, ...]] | None = None
        self._draw, self._lock, self._port = random.Random(seed), threading.Lock(), 0
        self.gone = threading.Event()  # ends requests that nobody answers

    @contextlib.contextmanager
    def before(self, port: int) -> Iterator[int]:
        """Stand before S3 at a port while inside; yields the port to use in its place."""
        self._port = port
        server = _Server(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            self.gone.set()
            server.shutdown()
            thread.join()
            server.server_close()

    @contextlib.contextmanager
    def at(self, rate: float, *kinds: Fault) -> Iterator[Counter[str]]:
        """Do harm at a rate while inside; yields the faults so far."""
        self.injected.clear()
        self.requests.clear()
        self.rate, self.kinds = rate, kinds or FAULTS
        try:
            yield self.injected
        finally:
            self.rate = 0.0

    @contextlib.contextmanager
    def each(self, kind: Fault, befalls: Callable[[Request], bool] = lambda request: True) -> Iterator[Counter[str]]:
        """Have every request meet a fault the first time that it comes while inside; yields the faults."""
        self.injected.clear()
        self.requests.clear()
        self.rate, self.kinds, self.befalls, self._each = 1.0, (kind,), befalls, set()
        try:
            yield self.injected
        finally:
            self.rate, self.befalls, self._each = 0.0, lambda request: True, None

    def fault_of(self, request: Request, headers: dict[str, str], body: bytes) -> Fault | None:
        """Return what befalls a request, None if nothing does."""
        with self._lock:
            self.requests.append((request, headers))
            fitting = [kind for kind in self.kinds if body or kind != "half upload"]
            if not fitting or self._draw.random() >= self.rate or not self.befalls(request):
                return None
            if self._each is not None:
                path = re.sub(r"uploadId=[^&]*", "", request[1])
                known = (request[0], path, *(headers.get(name, "") for name in CONDITIONS))
                if known in self._each:
                    return None
                self._each.add(known)
            kind = self._draw.choice(fitting)
            self.injected[kind] += 1
            return kind

    def answer(self, request: Request, headers: dict[str, str], body: bytes) -> http.client.HTTPResponse:
        """Return what S3 answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request(*request, body, headers)
        return connection.getresponse()

    def half(self, request: Request, headers: dict[str, str], body: bytes) -> None:
        """Send S3 half of a request, and hang up."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.putrequest(*request, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body[: len(body) // 2])
        connection.close()


def damaged(content: bytes) -> bytes:
    """Return bytes of which one is another."""
    return content[:-1] + bytes([content[-1] ^ 1])


class _Server(ThreadingHTTPServer):
    """A server that says nothing of clients which hang up."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request, headers = (self.command, self.path), dict(self.headers.items())
            headers.pop("Expect", None)
            fault = proxy.fault_of(request, headers, body)
            if fault in ANSWERS:
                status, code = ANSWERS[fault]
                self.reply(
                    status, [], b"" if self.command == "HEAD" else b"<Error><Code>%s</Code></Error>" % code.encode()
                )
                return
            if fault == "silent":
                proxy.gone.wait(60)
            if fault == "slow":
                time.sleep(SLOW_S)
            if fault == "half upload":
                proxy.half(request, headers, body)
            if fault in ("silent", "cut", "half upload"):
                self.close_connection = True
                return
            if fault == "damaged" and body:
                body = damaged(body)
            answer = proxy.answer(request, headers, body)
            content = answer.read()
            if fault == "damaged" and not body and content:
                content = damaged(content)
            if fault == "answer lost" or (fault == "answer cut" and not content):
                self.close_connection = True
                return
            self.reply(answer.status, answer.getheaders(), content, half=fault == "answer cut")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

        def reply(self, status: int, headers: list[tuple[str, str]], content: bytes, half: bool = False) -> None:
            """Send an answer; with `half`, hang up in the middle of it."""
            self.send_response_only(status)
            given = [(name, value) for name, value in headers if name.lower() not in ("connection", "content-length")]
            size = next((value for name, value in headers if name.lower() == "content-length"), str(len(content)))
            if status in (204, 304):
                size = "0"
            for name, value in [*given, ("Content-Length", size)]:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if half else content)
            self.close_connection = half

    return Handler
