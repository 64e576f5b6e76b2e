"""The application: its state, and the table of routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deltazip import _C
from deltazip.engine import AsyncEngine
from deltazip.server import routes_admin, routes_openai
from deltazip.server.errors import ApiError
from deltazip.server.guard import Gate, Guard
from deltazip.server.metrics import Metrics
from deltazip.server.settings import Settings
from deltazip.server.variants import Variant, VariantRegistry

__all__ = ["Application", "ServerState", "create_app"]

P = ParamSpec("P")
T = TypeVar("T")


class ServerState:
    """What the routes share. `engine` exists while the application runs."""

    def __init__(self, core: _C.Engine, loaded: list[Variant], settings: Settings) -> None:
        self.core = core
        self.settings = settings
        self.registry = VariantRegistry(loaded, settings.allow_load_root, settings.max_variants)
        self.metrics = Metrics(core, loaded[0].name, settings.max_metric_variants)
        self.max_model_len = core.config().max_model_len
        self.vocab_size = core.vocab_size()
        self.base_digest = core.base_digest()
        self.gate = Gate()
        self.engine: AsyncEngine
        self._text_workers = ThreadPoolExecutor(4, thread_name_prefix="deltazip-text")

    async def off_loop(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Templates and tokenizers may take long: never on the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_workers, partial(work, *args, **kwargs))

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.engine = AsyncEngine(self.core)
        try:
            yield
        finally:
            await self.engine.close()
            self._text_workers.shutdown(wait=False, cancel_futures=True)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(
        error.status_code,
        str(error.detail),
        code=codes.get(error.status_code),
        headers=error.headers,
    ).response()


@dataclass(frozen=True, slots=True)
class Application:
    """The server as an ASGI application, with its parts for whoever runs it."""

    asgi: Guard
    api: FastAPI
    state: ServerState


def create_app(core: _C.Engine, loaded: list[Variant], settings: Settings) -> Application:
    """The whole server as one ASGI application.

    Args:
        core: the running engine; the application shuts it down when it ends.
        loaded: from variants.load_at_start, the base first.
    """
    state = ServerState(core, loaded, settings)
    api = FastAPI(
        title="DeltaZip",
        lifespan=state.lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            RequestValidationError: _http_error,
        },
    )
    api.state.server = state
    routes_openai.add_routes(api, state)
    routes_admin.add_routes(api, state)
    paths = frozenset(getattr(route, "path", "") for route in api.routes)
    return Application(Guard(api, settings, state.metrics, state.gate, paths), api, state)
