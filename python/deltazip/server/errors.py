"""Errors in the shape that OpenAI's clients know."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from deltazip import _C
from deltazip.engine import EngineDeadError

__all__ = ["ApiError", "ClientGoneError", "from_engine", "from_validation", "model_not_found"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads the answer."""


class ApiError(Exception):
    """Ends one request with a status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")

    async def send(self, send: Callable[[Any], Awaitable[None]]) -> None:
        """Answers below the framework, where there is no Response yet."""
        body = self.body()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **self.headers,
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    return ApiError(
        404, f"the model {name[:200]!r} does not exist", code="model_not_found", param="model"
    )


def unavailable(message: str, code: str, retry_after_s: int = 5) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def overloaded(message: str, code: str = "overloaded") -> ApiError:
    return ApiError(429, message, code=code, headers={"Retry-After": "1"})


def from_engine(error: Exception) -> ApiError:
    """What the engine's refusal of a request means over HTTP; its message is for the client."""
    message = str(error.args[0]) if error.args else str(error)
    if isinstance(error, _C.NotFound):
        return ApiError(404, message, code="model_not_found", param="model")
    if isinstance(error, _C.ResourceExhausted):
        return overloaded(message, "queue_full")
    if isinstance(error, (EngineDeadError, _C.InternalError)):
        return unavailable(f"the engine is not running: {message}", "engine_dead")
    if isinstance(error, ValueError):
        return invalid(message)
    raise error


def from_validation(error: ValidationError) -> ApiError:
    """The first problem: which field, what was expected, what came."""
    problem = error.errors(include_url=False, include_context=False)[0]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {message}", code="invalid_json")
    # Parts of a union's location that are types, not fields, start with a capital or a bracket.
    parts = [str(part) for part in problem["loc"]]
    param = ".".join(parts) or None
    if problem["type"] == "missing":
        return invalid(f"{param}: this field is required", param, "missing_field")
    if problem["type"] != "value_error" or ", got " not in message:
        got = repr(problem["input"])
        message += f", got {got if len(got) <= 80 else got[:80] + '...'}"
    return invalid(f"{param}: {message}" if param else message, param)
