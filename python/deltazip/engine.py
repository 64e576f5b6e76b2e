"""The asyncio face of the compiled engine: one poller thread, one wake-up of the loop per batch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from deltazip import _C

__all__ = ["AsyncEngine", "Chunk", "EngineDeadError", "Mailbox"]

_POLL_MAX_EVENTS = 1024
_POLL_TIMEOUT_MS = 200

logger = logging.getLogger("deltazip.engine")


class EngineDeadError(RuntimeError):
    """The engine's loop has ended; nothing will be answered any more."""


@dataclass(slots=True)
class Chunk:
    """New output of one choice: all that came since its reader last looked.

    Attributes:
        finish: None while it runs, then "stop", "length", "cancelled" or "error".
        stop_token: the token that ended it, -1 if none did.
    """

    request_id: int
    choice: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[_C.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[_C.TokenLogprobs | None] = field(default_factory=list)
    finish: str | None = None
    stop_token: int = -1
    error: str = ""
    num_cached_prompt_tokens: int = 0


class Mailbox:
    """Where the events of one reader's requests wait, merged per choice. Event loop only.

    Its size is bounded by the choices and their max_tokens, however slowly it is read.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self.live: dict[int, int] = {}  # request id -> choices that still run

    def _put(self, event: _C.OutputEvent) -> None:
        key = (event.request_id, event.choice)
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = Chunk(*key)
        chunk.tokens += event.tokens
        if logprobs := event.logprobs:
            chunk.logprobs += logprobs
        if prompt_logprobs := event.prompt_logprobs:
            chunk.prompt_logprobs += prompt_logprobs
        cached = event.num_cached_prompt_tokens
        chunk.num_cached_prompt_tokens = max(chunk.num_cached_prompt_tokens, cached)
        finish = event.finish.name
        if finish != "NONE":
            chunk.finish = finish.lower()
            chunk.stop_token = event.stop_token
            chunk.error = event.error
            left = self.live.get(event.request_id, 0) - 1
            if left > 0:
                self.live[event.request_id] = left
            else:
                self.live.pop(event.request_id, None)
                self._engine._forget(event.request_id)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, failure: BaseException) -> None:
        """Ends the reader: its next take() raises this."""
        if self._failure is None:
            self._failure = failure
        self._wake()

    async def take(self) -> list[Chunk]:
        """Waits for output; all of it, in the order the choices first spoke.

        Raises:
            EngineDeadError: the engine ended. Or whatever fail() was told.
        """
        while not self._chunks:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._failure is not None:
            raise self._failure
        chunks = list(self._chunks.values())
        self._chunks = {}
        return chunks

    def cancel(self, request_id: int) -> None:
        """Stops one request; its blocks come back in the engine's next step."""
        if self.live.pop(request_id, None) is not None:
            self._engine._forget(request_id)
            self._engine.core.cancel(request_id)

    def cancel_choice(self, request_id: int, choice: int) -> None:
        """Stops one choice while its siblings go on. Its end still arrives as a chunk."""
        if request_id in self.live:
            self._engine.core.cancel(request_id, choice)

    def close(self) -> None:
        """Stops whatever still runs. Always call it; more than once is fine."""
        for request_id in list(self.live):
            self.cancel(request_id)
        self._chunks = {}


class AsyncEngine:
    """Owns the poller thread of one `_C.Engine`. Make and use it on one event loop.

    Args:
        core: the compiled engine; close() shuts it down.
    """

    def __init__(self, core: _C.Engine) -> None:
        self.core = core
        self.failure: str | None = None
        self._mailboxes: dict[int, Mailbox] = {}
        self._ids = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._arrived: list[_C.OutputEvent] = []
        self._is_closing = False
        self._slow_calls = ThreadPoolExecutor(1, thread_name_prefix="deltazip-variants")
        self._poller = threading.Thread(target=self._poll, name="deltazip-poll", daemon=True)
        self._poller.start()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._mailboxes)

    def open(self) -> Mailbox:
        """A new, empty mailbox."""
        return Mailbox(self)

    def submit(
        self,
        mailbox: Mailbox,
        variant: str,
        prompt: Sequence[int],
        sampling: _C.SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int:
        """Starts one request, whose chunks go to the mailbox, and returns its id.

        Raises:
            EngineDeadError: the engine ended.
            _C.NotFound: no such variant.
            _C.InvalidArgument: a parameter is over a limit.
            _C.ResourceExhausted: the queue is full.
        """
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        request_id = next(self._ids)
        # Known before it is submitted: its first event may be on its way at once.
        self._mailboxes[request_id] = mailbox
        mailbox.live[request_id] = sampling.n
        try:
            self.core.submit(request_id, variant, prompt, sampling, priority, cache_salt)
        except BaseException:
            self._forget(request_id)
            mailbox.live.pop(request_id, None)
            raise
        return request_id

    async def add_variant(self, name: str, path: str) -> _C.VariantInfo:
        """Validates and advertises a variant, off the event loop, one at a time."""
        return await self._loop.run_in_executor(self._slow_calls, self.core.add_variant, name, path)

    def cancel_all(self, failure: BaseException) -> None:
        """Stops every request; their readers get `failure`."""
        for mailbox in set(self._mailboxes.values()):
            mailbox.fail(failure)
            mailbox.close()

    async def close(self) -> None:
        """Cancels what is left and stops the engine and the poller."""
        self.cancel_all(EngineDeadError("the engine is shutting down"))
        self._is_closing = True
        await self._loop.run_in_executor(None, self.core.shutdown)
        await self._loop.run_in_executor(None, self._poller.join)
        self._slow_calls.shutdown(wait=True)

    def _forget(self, request_id: int) -> None:
        self._mailboxes.pop(request_id, None)

    def _poll(self) -> None:
        failure = "the engine ended"
        try:
            while True:
                events = self.core.poll(_POLL_MAX_EVENTS, _POLL_TIMEOUT_MS)
                if not events:
                    # A closed engine answers at once: without this look it would be a busy loop.
                    if self._is_closing:
                        return
                    stats = self.core.stats()
                    if not stats.is_alive:
                        failure = stats.failure or failure
                        break
                    continue
                with self._lock:
                    is_first = not self._arrived
                    self._arrived += events
                if is_first:
                    self._loop.call_soon_threadsafe(self._dispatch)
        except RuntimeError as error:
            if self._loop.is_closed():
                return
            failure = str(error)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        if not self._is_closing:
            logger.error("the engine's loop ended: %s", failure)
            self._loop.call_soon_threadsafe(self._die, failure)

    def _dispatch(self) -> None:
        with self._lock:
            events, self._arrived = self._arrived, []
        for event in events:
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is not None:  # else: cancelled meanwhile
                mailbox._put(event)

    def _die(self, failure: str) -> None:
        self.failure = failure
        for mailbox in set(self._mailboxes.values()):
            mailbox.fail(EngineDeadError(failure))
        self._mailboxes.clear()
