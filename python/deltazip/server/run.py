"""From settings to a server that listens, and from SIGTERM to exit code 0."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn
from rich.console import Console
from rich.table import Table

from deltazip import _C
from deltazip.server.app import Application, create_app
from deltazip.server.connections import protocol_class
from deltazip.server.errors import unavailable
from deltazip.server.settings import Settings
from deltazip.server.variants import load_at_start

__all__ = ["DrainingServer", "make_server", "serve"]

logger = logging.getLogger("deltazip.server")


class DrainingServer(uvicorn.Server):
    """On SIGTERM: refuses new requests, lets running ones finish for a while, then cancels them."""

    def __init__(self, config: uvicorn.Config, app: Application) -> None:
        super().__init__(config)
        self._app = app
        self._deadline = 0.0
        self.url = ""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one cancels what still runs."""
        del frame
        gate = self._app.state.gate
        if gate.is_draining:
            self._deadline = 0.0
            return
        gate.is_draining = True
        self._deadline = time.monotonic() + self._app.state.settings.shutdown_timeout_s
        logger.info("signal %d: %d requests are finishing", sig, gate.num_active)

    async def on_tick(self, counter: int) -> bool:
        gate = self._app.state.gate
        if gate.is_draining and not self.should_exit:
            if gate.num_active and time.monotonic() > self._deadline:
                logger.warning("cancelling %d requests", gate.num_active)
                self._app.state.engine.cancel_all(
                    unavailable("the server is shutting down", "shutting_down")
                )
                self.should_exit = True
            elif not gate.num_active:
                self.should_exit = True
        return await super().on_tick(counter)

    def _log_started_message(self, listeners: Sequence[socket.SocketType]) -> None:
        host, port = listeners[0].getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"deltazip is ready at {self.url}", flush=True)


def make_server(app: Application) -> DrainingServer:
    """A server for the application; its run() blocks until it has ended."""
    settings = app.state.settings
    config = uvicorn.Config(
        app.asgi,
        host=settings.host,
        port=settings.port,
        http=protocol_class(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=int(settings.max_header_kib * 1024),
    )
    return DrainingServer(config, app)


def _capacity_table(core: _C.Engine) -> Table:
    table = Table(title=f"Capacity on {core.device_description()}", title_justify="left")
    table.add_column("what")
    table.add_column("MiB", justify="right")
    table.add_column("detail", overflow="fold")
    for row in core.capacity():
        table.add_row(row.what, f"{row.bytes / (1 << 20):,.1f}", row.detail)
    for info in core.variants()[1:]:
        detail = f"variant, {info.content_digest[:12]}, {info.state}"
        table.add_row(info.name, f"{info.device_bytes / (1 << 20):,.1f}", detail)
    return table


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def serve(settings: Settings) -> None:
    """Loads everything, prints what it takes, answers until SIGTERM, and exits.

    Raises:
        SystemExit: 0 after a clean end; 1 with a message if something could not be loaded.
    """
    _log_to_stderr(settings.log_level)
    started = time.monotonic()
    try:
        core = _C.Engine(_C.EngineConfig(**settings.engine_options()))
        loaded = load_at_start(core, settings.base, settings.base_name, settings.variants())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"deltazip: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    app = create_app(core, loaded, settings)
    console = Console(stderr=True)
    console.print(_capacity_table(core))
    console.print(f"loaded in {time.monotonic() - started:.1f} s", highlight=False)
    server = make_server(app)
    server.run()
    raise SystemExit(0 if server.started else 1)
