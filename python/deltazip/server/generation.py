"""One HTTP request's answers: submitted together, read from one mailbox, turned into text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from deltazip import _C
from deltazip.engine import AsyncEngine, Chunk, EngineDeadError
from deltazip.sampling import SamplingParams
from deltazip.server.errors import ApiError, from_engine, unavailable
from deltazip.server.metrics import VariantTimes
from deltazip.server.variants import Variant
from deltazip.text import ChoiceText

__all__ = ["Answer", "Generation", "Piece", "Usage"]


@dataclass(slots=True)
class Piece:
    """What one choice adds: text, the tokens behind it, and perhaps its end."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[_C.TokenLogprobs]
    finish: str | None = None
    prompt_logprobs: list[_C.TokenLogprobs | None] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """One choice, whole."""

    index: int
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[_C.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[_C.TokenLogprobs | None] = field(default_factory=list)
    finish: str = "stop"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.prompt_logprobs += piece.prompt_logprobs
        if piece.finish is not None:
            self.finish = piece.finish


@dataclass(slots=True)
class Usage:
    """Tokens of one request, counted once however many choices share a prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class _Choice:
    __slots__ = ("index", "is_done", "last_time", "num_cached", "request_id", "text")

    def __init__(self, index: int, request_id: int, text: ChoiceText) -> None:
        self.index = index
        self.request_id = request_id
        self.text = text
        self.is_done = False
        self.last_time = 0.0
        self.num_cached = 0


class Generation:
    """Runs n choices of each prompt. Use as a context manager: leaving cancels what still runs.

    Args:
        variant: who answers.
        prompts: token ids, each with the most tokens that may follow it (0: only score it).
        continues: whether the text goes on from the prompt, or is one of its own.
        started: time.monotonic() of the request's arrival, for the latency to its first token.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        variant: Variant,
        prompts: Sequence[tuple[list[int], int]],
        sampling: SamplingParams,
        times: VariantTimes,
        *,
        priority: int = 0,
        cache_salt: str = "",
        continues: bool = False,
        started: float = 0.0,
    ) -> None:
        self.usage = Usage(prompt_tokens=sum(len(prompt) for prompt, _ in prompts))
        self.variant = variant
        self.num_choices = len(prompts) * sampling.n
        self.mailbox = engine.open()
        self._times = times
        self._started = started or time.monotonic()
        self._choices: dict[tuple[int, int], _Choice] = {}
        self._scores_only = False
        try:
            for position, (prompt, max_tokens) in enumerate(prompts):
                core = sampling.to_core(max(max_tokens, 1), variant.text.stop_token_ids)
                self._scores_only |= max_tokens == 0
                request_id = engine.submit(
                    self.mailbox,
                    variant.core_name,
                    prompt,
                    core,
                    priority=priority,
                    cache_salt=cache_salt,
                )
                for choice in range(sampling.n):
                    text = ChoiceText(
                        variant.text.tokenizer.detokenizer(
                            prompt if continues else (),
                            skip_special_tokens=sampling.skip_special_tokens,
                        ),
                        sampling.stop,
                        sampling.include_stop_str_in_output,
                    )
                    index = position * sampling.n + choice
                    self._choices[request_id, choice] = _Choice(index, request_id, text)
        except Exception as error:
            self.mailbox.close()
            raise from_engine(error) from error

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.mailbox.close()

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """New output of all choices, as it comes, until each has ended.

        Raises:
            ApiError: 500 if a choice failed, 503 if the engine ended.
        """
        num_open = self.num_choices
        while num_open:
            try:
                chunks = await self.mailbox.take()
            except EngineDeadError as error:
                raise from_engine(error) from None
            pieces = []
            for chunk in chunks:
                choice = self._choices[chunk.request_id, chunk.choice]
                if choice.is_done:
                    continue
                piece = self._piece(chunk, choice)
                if piece.finish is not None:
                    num_open -= 1
                pieces.append(piece)
            if pieces:
                yield pieces

    async def answers(self) -> list[Answer]:
        """Every choice, whole, in order."""
        answers = [Answer(index) for index in range(self.num_choices)]
        async for pieces in self.batches():
            for piece in pieces:
                answers[piece.index].add(piece)
        return answers

    def _piece(self, chunk: Chunk, choice: _Choice) -> Piece:
        if chunk.finish == "error":
            raise ApiError(500, chunk.error or "the engine failed", code="engine_error")
        if chunk.finish == "cancelled":
            raise unavailable("the request was cancelled by the server", "cancelled")
        tokens, logprobs = chunk.tokens, chunk.logprobs
        cached = chunk.num_cached_prompt_tokens
        if chunk.choice == 0 and not choice.num_cached and cached:  # told again with every event
            choice.num_cached = cached
            self.usage.cached_tokens += cached
        if tokens:
            self._measure(choice, len(tokens))
        if self._scores_only:
            tokens, logprobs = [], []
        text, num_used = choice.text.push(tokens)
        if chunk.finish is not None:
            text += choice.text.finish()
        # The rest of a text may hold a stop text too.
        finish = "stop" if choice.text.is_stopped else chunk.finish
        if num_used < len(tokens):
            tokens, logprobs = tokens[:num_used], logprobs[:num_used]
        self.usage.completion_tokens += num_used
        if finish is not None:
            choice.is_done = True
            if chunk.finish is None:  # a stop text, unknown to the engine
                self.mailbox.cancel_choice(choice.request_id, chunk.choice)
        return Piece(choice.index, text, tokens, logprobs, finish, chunk.prompt_logprobs)

    def _measure(self, choice: _Choice, num_tokens: int) -> None:
        now = time.monotonic()
        if choice.last_time:
            self._times.next_tokens(now - choice.last_time, num_tokens)
        else:
            self._times.first_token(now - self._started)
        choice.last_time = now
