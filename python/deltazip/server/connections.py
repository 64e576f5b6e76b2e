"""Limits below HTTP: how many connections, and how long and how large a request's head may be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from deltazip.server.settings import Settings

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as HttpProtocol
else:
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as HttpProtocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as HttpProtocol

__all__ = ["protocol_class"]

_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


def protocol_class(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's own protocol with the limits of the settings around it."""
    max_head_bytes = int(settings.max_header_kib * 1024)

    class GuardedProtocol(HttpProtocol):
        """Whoever opens connections without ever sending a request does not keep them."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._num_head_bytes = 0
            self._head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.abort()
            else:
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is before and (before is None or before.response_complete):
                self._num_head_bytes += len(data)
                if self._num_head_bytes > max_head_bytes and not self.transport.is_closing():
                    self.transport.write(_HEAD_TOO_LARGE)
                    self.transport.close()
                elif self._head_timer is None:
                    self._await_head()
            else:
                self._num_head_bytes = 0
                self._stop_timer()

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(settings.head_timeout_s, self._give_up)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _give_up(self) -> None:
            self._head_timer = None
            self.transport.abort()

    return GuardedProtocol
