"""A server on loopback, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from deltazip.server.app import Application, create_app
from deltazip.server.run import DrainingServer, make_server
from deltazip.server.settings import Settings
from deltazip.server.variants import load_at_start


@dataclass
class Live:
    """A running server."""

    url: str
    app: Application
    server: DrainingServer
    thread: threading.Thread
    client: httpx.Client

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.client.post(path, json=body, **kwargs)


@contextmanager
def run_server(core: Any, base: Path, **options: Any) -> Iterator[Live]:
    """Serves until the block ends; `options` are settings."""
    settings = Settings(base=base, port=0, **options)
    loaded = load_at_start(core, base, settings.base_name, settings.variants())
    app = create_app(core, loaded, settings)
    server = make_server(app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        try:
            yield Live(server.url, app, server, thread, client)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


def wait_until(condition: Any, timeout_s: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
