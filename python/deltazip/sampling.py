"""How a request is to be answered: the parameters of LLM.generate and of the server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltazip import _C

__all__ = ["SamplingParams"]

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names and meanings of the OpenAI API and its usual extensions.

    Args:
        n: how many answers to one prompt.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this much probability; 1 is off.
        top_k: the k likeliest tokens; 0 is off.
        min_p: tokens at least this likely relative to the likeliest; 0 is off.
        repetition_penalty: divides the logits of tokens already seen; 1 is off.
        presence_penalty: taken from the logits of tokens already put out.
        frequency_penalty: the same, times how often.
        seed: same seed, same output, whatever else runs; answer i draws from seed + i.
        logit_bias: token id -> what is added to its logit.
        stop: texts that end the output.
        stop_token_ids: tokens that end the output.
        include_stop_str_in_output: leave the stop text in.
        ignore_eos: go on after the model's own end token.
        min_tokens: no end before so many tokens.
        max_tokens: length limit of each answer; None is all that fits.
        logprobs: alternatives to report per token; None is no logprobs at all, 0 only the chosen.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ValueError: a parameter is out of range; it is named.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{item.name}: expected a finite number, got {value}")
        self._need("n", self.n >= 1, "at least 1")
        self._need("temperature", self.temperature >= 0, "0 or more")
        self._need("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        self._need("top_k", -1 <= self.top_k <= _MAX_INT32, "0 (off) or more")
        self._need("min_p", 0 <= self.min_p <= 1, "0 to 1")
        self._need("repetition_penalty", self.repetition_penalty > 0, "more than 0")
        self._need("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2")
        self._need("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2")
        self._need("stop", all(self.stop), "no empty text")
        self._need("min_tokens", 0 <= self.min_tokens <= _MAX_INT32, "0 or more")
        if self.max_tokens is not None:
            self._need("max_tokens", 1 <= self.max_tokens <= _MAX_INT32, "at least 1")
            self._need("min_tokens", self.min_tokens <= self.max_tokens, "at most max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._need(name, value is None or 0 <= value <= 100, "0 to 100")

    def _need(self, name: str, is_met: bool, expected: str) -> None:
        if not is_met:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def to_core(self, max_tokens: int, stop_token_ids: Sequence[int] = ()) -> _C.SamplingParams:
        """The engine's own form.

        Args:
            max_tokens: what `max_tokens` comes to for this prompt.
            stop_token_ids: further ends of the variant, which `ignore_eos` turns off.
        """
        from deltazip import _C

        ends = [] if self.ignore_eos else stop_token_ids
        return _C.SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            min_p=self.min_p,
            top_k=max(self.top_k, 0),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed % 2**64,
            logit_bias=dict(self.logit_bias),
            stop_token_ids=sorted({*self.stop_token_ids, *ends}),
            ignore_eos=self.ignore_eos,
            min_tokens=min(self.min_tokens, max_tokens),
            max_tokens=max_tokens,
            logprobs=-1 if self.logprobs is None else self.logprobs,
            prompt_logprobs=-1 if self.prompt_logprobs is None else self.prompt_logprobs,
        )
