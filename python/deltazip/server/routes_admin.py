"""Health, metrics, and loading and unloading variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from deltazip.server.protocol import LoadRequest, UnloadRequest
from deltazip.server.routes_openai import read

if TYPE_CHECKING:
    from deltazip.server.app import ServerState

__all__ = ["add_routes", "health_problem"]

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def health_problem(state: ServerState) -> str | None:
    """Why requests would not be answered now; None if all is well."""
    if state.engine.failure is not None:
        return f"the engine ended: {state.engine.failure}"
    stats = state.core.stats()
    if not stats.is_alive:
        return f"the engine ended: {stats.failure or 'no reason given'}"
    if stats.seconds_since_progress > state.settings.stall_timeout_s:
        return f"no step for {stats.seconds_since_progress:.0f} seconds with work to do"
    return None


def add_routes(api: FastAPI, state: ServerState) -> None:
    """Adds the operator's endpoints."""

    async def live() -> Response:
        return JSONResponse({"status": "ok"})

    async def health() -> Response:
        problem = "shutting down" if state.gate.is_draining else health_problem(state)
        if problem is not None:
            return JSONResponse({"status": "unavailable", "reason": problem}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics() -> Response:
        return Response(state.metrics.text(), headers={"content-type": _METRICS_TYPE})

    async def load_variant(request: Request) -> Response:
        body = await read(request, LoadRequest, state)
        variant, info = await state.registry.load(state.engine, body.name, body.path)
        request.scope["deltazip.log"]["variant"] = variant.name
        return JSONResponse(
            {
                "id": variant.name,
                "object": "model",
                "created": variant.created,
                "parent": state.registry.base.name,
                "revision": info.content_digest,
                "file_bytes": info.file_bytes,
                "device_bytes": info.device_bytes,
            }
        )

    async def unload_variant(request: Request) -> Response:
        body = await read(request, UnloadRequest, state)
        request.scope["deltazip.log"]["variant"] = body.name[:128]
        is_gone = await state.registry.unload(state.engine, body.name, body.wait_s)
        return JSONResponse({"id": body.name, "status": "unloaded" if is_gone else "draining"})

    for path, answer in (("/health", health), ("/health/live", live)):
        api.add_api_route(path, answer, response_model=None)
        # Some load balancers ask with HEAD.
        api.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    api.add_api_route("/metrics", metrics, response_model=None)
    api.add_api_route("/v1/load_variant", load_variant, methods=["POST"], response_model=None)
    api.add_api_route("/v1/unload_variant", unload_variant, methods=["POST"], response_model=None)
