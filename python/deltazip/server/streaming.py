"""Answers on the wire: whole or as server-sent events; a vanished client cancels its work."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltazip.engine import Mailbox
from deltazip.server.errors import ApiError, ClientGoneError, unavailable
from deltazip.server.generation import Generation
from deltazip.server.responses import Format, sse_error

__all__ = ["EventStream", "answer_whole"]

logger = logging.getLogger("deltazip.server")

_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@asynccontextmanager
async def _watched(receive: Receive, mailbox: Mailbox, timeout_s: float) -> AsyncIterator[None]:
    """While inside: a disconnect or the time limit ends the mailbox's reader."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        mailbox.fail(ClientGoneError())
        mailbox.close()

    def expire() -> None:
        mailbox.fail(unavailable(f"no answer within {timeout_s:g} seconds", "timeout"))
        mailbox.close()

    watcher = asyncio.create_task(watch())
    timer = asyncio.get_running_loop().call_later(timeout_s, expire)
    try:
        yield
    finally:
        timer.cancel()
        watcher.cancel()


def _log_usage(scope: Scope, generation: Generation, finish: str) -> None:
    scope["deltazip.log"].update(
        prompt_tokens=generation.usage.prompt_tokens,
        output_tokens=generation.usage.completion_tokens,
        finish=finish,
    )


async def answer_whole(
    request: Request, generation: Generation, form: Format, timeout_s: float
) -> Response:
    """Waits for every choice and answers at once.

    Raises:
        ApiError: what ended the request. ClientGoneError: nobody waits any more.
    """
    with generation:
        try:
            async with _watched(request.receive, generation.mailbox, timeout_s):
                answers = await generation.answers()
        except ClientGoneError:
            _log_usage(request.scope, generation, "disconnect")
            raise
    _log_usage(request.scope, generation, answers[0].finish)
    body = json.dumps(form.whole(answers, generation.usage), ensure_ascii=False)
    return Response(body.encode("utf-8", "replace"), media_type="application/json")


class EventStream(Response):
    """A running generation as server-sent events.

    Args:
        include_usage: end with a chunk that tells the usage.
        timeout_s: the longest the whole stream may take, a client that does not read included.
    """

    def __init__(
        self, generation: Generation, form: Format, include_usage: bool, timeout_s: float
    ) -> None:
        super().__init__(headers=_STREAM_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._generation = generation
        self._form = form
        self._include_usage = include_usage
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        finish = "disconnect"
        with self._generation as generation:
            # A client that never reads blocks send(): only cancelling this task gets out of it.
            task = asyncio.current_task()
            assert task is not None
            loop = asyncio.get_running_loop()
            guard = loop.call_later(self._timeout_s + 5, task.cancel)
            try:
                async with _watched(receive, generation.mailbox, self._timeout_s):
                    finish = await self._send_all(send)
            except ClientGoneError:
                pass
            finally:
                guard.cancel()
                _log_usage(scope, generation, finish)

    async def _send_all(self, send: Send) -> str:
        form, generation = self._form, self._generation
        finish = "stop"
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        starts = b"".join(form.start(index) for index in range(generation.num_choices))
        if starts:
            await send({"type": "http.response.body", "body": starts, "more_body": True})
        try:
            async for pieces in generation.batches():
                body = b"".join([form.piece(piece) for piece in pieces])
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                finish = pieces[-1].finish or finish
            end = form.usage(generation.usage) if self._include_usage else b""
        except ApiError as error:
            finish = error.code or "error"
            logger.warning("a stream ended with an error: %s", error.message)
            end = sse_error(error.body())
        end += b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})
        return finish
