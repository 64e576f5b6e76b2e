"""What every request passes first: log, auth, drain, limits. Plain ASGI: streams cost nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltazip.server.auth import OPEN_PATHS, Auth
from deltazip.server.errors import ApiError, ClientGoneError, overloaded, unavailable
from deltazip.server.metrics import Metrics
from deltazip.server.settings import Settings

__all__ = ["Gate", "Guard", "read_body"]

access_log = logging.getLogger("deltazip.access")
logger = logging.getLogger("deltazip.server")

# Scraping and health must work when everything else is at its limit.
_UNLIMITED_PATHS = OPEN_PATHS | {"/metrics"}


@dataclass(slots=True)
class Gate:
    """How many are inside, and whether more may come in."""

    num_active: int = 0
    is_draining: bool = False


class Guard:
    """The outermost application.

    Args:
        app: what answers.
        routes: the known paths; any other is one series in the metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        gate: Gate,
        routes: frozenset[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._routes = routes
        self._gate = gate
        self._auth = Auth(settings.api_key, settings.admin_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # web sockets
            await send({"type": "websocket.close", "code": 1003})
            return
        started = time.monotonic()
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["deltazip.log"] = {}
        scope["deltazip.started"] = started
        self._gate.num_active += 1
        self._metrics.active.set(self._gate.num_active)
        try:
            await self._answer(scope, receive, send_and_note)
        except ApiError as error:
            await error.send(send_and_note)
        except ClientGoneError:
            status = status or 499
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"][:200])
            if status:
                raise  # the answer has begun: only closing the connection is left
            await ApiError(500, "internal error", code="internal_error").send(send_and_note)
        finally:
            self._gate.num_active -= 1
            self._metrics.active.set(self._gate.num_active)
            self._note(scope, status or 499, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        headers = scope["headers"]
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        num_bytes += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if num_bytes > self._settings.max_header_kib * 1024:
            limit = f"{self._settings.max_header_kib:g} KiB"
            raise ApiError(
                431,
                f"expected at most {limit} of headers",
                code="headers_too_large",
                headers=_CLOSE,
            )
        authorization = next((v for n, v in headers if n == b"authorization"), None)
        scope["deltazip.caller"] = self._auth.check(path, authorization)
        if path not in _UNLIMITED_PATHS:
            if self._gate.is_draining:
                error = unavailable("the server is shutting down", "shutting_down")
                error.headers.update(_CLOSE)
                raise error
            if self._gate.num_active > self._settings.max_concurrent_requests:
                limit = str(self._settings.max_concurrent_requests)
                raise overloaded(f"{limit} requests are being answered; try again later")
        await self._app(scope, receive, send)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self._routes else "other"
        if path.startswith("/v1/models/"):
            route = "/v1/models/{id}"
        self._metrics.answered(route, status, seconds)
        if path in _UNLIMITED_PATHS and status == 200:
            return
        client = scope.get("client")
        entry: dict[str, Any] = {
            "method": scope["method"],
            "path": path[:200],
            "status": status,
            "ms": round(seconds * 1000, 1),
            "client": client[0] if client else None,
            **scope["deltazip.log"],
        }
        access_log.info("%s", json.dumps(entry))


_CLOSE = {"Connection": "close"}


async def read_body(request: Request, settings: Settings) -> bytes:
    """The whole body of a request.

    Raises:
        ApiError: 413 if it is too large, 408 if it does not come in time.
        ClientGoneError: it will never come.
    """
    limit = int(settings.max_body_mib * (1 << 20))
    too_large = ApiError(
        413,
        f"expected a body of at most {limit} bytes",
        code="body_too_large",
        headers=_CLOSE,
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    try:
        return await asyncio.wait_for(
            _collect(request.receive, limit, too_large), settings.body_timeout_s
        )
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"no body within {settings.body_timeout_s:g} seconds",
            code="timeout",
            headers=_CLOSE,
        ) from None


async def _collect(receive: Receive, limit: int, too_large: ApiError) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > limit:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
