"""An MLflow server in this process that answers only those who name its user and password, and who was told them."""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from werkzeug.serving import make_server

USER, PASSWORD = "gardener", "s3cret/of@mine"
LOGIN = "gardener:s3cret%2Fof%40mine"  # as a URI has them
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def assert_untold(folder: Path, *texts: str) -> None:
    """Check that neither files below `folder`, nor their names, nor what was said, have user or password."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for secret in ("s3cret", USER, BASIC):
        assert [path for path in files if secret.encode() in path.read_bytes() or secret in str(path)] == []
        assert [text for text in texts if secret in text] == []


@contextlib.contextmanager
def serve_mlflow(folder: Path) -> Iterator[str]:
    """Yield the address; what it keeps lies in `folder`."""
    from mlflow.server import app, handlers

    database = f"sqlite:///{folder}/server.db"
    stores = handlers._tracking_store, handlers._model_registry_store
    handlers._tracking_store = handlers._model_registry_store = None
    handlers.initialize_backend_stores(database, database, (folder / "server-artifacts").as_uri())

    def guarded(environ, start):
        if environ.get("HTTP_AUTHORIZATION") == f"Basic {BASIC}":
            return app.wsgi_app(environ, start)
        start("401 UNAUTHORIZED", [("Content-Type", "text/plain")])
        return [b"who are you?"]

    server = make_server("127.0.0.1", 0, guarded, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        handlers._tracking_store, handlers._model_registry_store = stores
