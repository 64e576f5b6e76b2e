"""An engine that follows a script: for what a real one does not do on demand.

It has the surface of deltazip._C.Engine. Its answer to a prompt is `script(prompt)`, or else the
prompt's own tokens over and over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace

from deltazip import _C

Script = Callable[[Sequence[int]], Sequence[int]]


class Finish(Enum):
    NONE, STOP, LENGTH, CANCELLED, ERROR = range(5)


@dataclass
class Event:
    request_id: int
    choice: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[SimpleNamespace] = field(default_factory=list)
    prompt_logprobs: list[SimpleNamespace | None] = field(default_factory=list)
    finish: Finish = Finish.NONE
    stop_token: int = -1
    error: str = ""
    num_cached_prompt_tokens: int = 0


@dataclass
class _Run:
    request_id: int
    choice: int
    variant: str
    answer: list[int]
    sampling: _C.SamplingParams
    num_done: int = 0


class FakeEngine:
    """One step makes `tokens_per_step` tokens of every running choice and takes `step_s`."""

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_id: int = 2,
        max_model_len: int = 512,
        step_s: float = 0.0,
        tokens_per_step: int = 1,
        max_waiting: int = 4096,
        script: Script | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._max_model_len = max_model_len
        self.step_s = step_s
        self.tokens_per_step = tokens_per_step
        self.max_waiting = max_waiting
        self.script = script
        self.answers: dict[int, Sequence[int]] = {}  # of single choices, instead of the script's
        self.fails_with = ""  # the next step ends every request with this error
        self.is_stuck = False
        self.num_submitted = 0
        self.num_cancelled = 0
        self.submitted: list[dict[str, object]] = []
        self._runs: dict[tuple[int, int], _Run] = {}
        self._events: list[Event] = []
        self._variants: dict[str, str] = {}
        self._draining: set[str] = set()
        self._failure = ""
        self._is_open = True
        self._changed = threading.Condition()

    # What tests do to it.
    def die(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    @property
    def num_running(self) -> int:
        with self._changed:
            return len(self._runs)

    # The surface of _C.Engine.
    def add_variant(self, name: str, path: str) -> SimpleNamespace:
        if name in self._variants:
            raise _C.InvalidArgument(f"variant '{name}' is already there")
        self._variants[name] = path
        return self.variants()[-1]

    def remove_variant(self, name: str) -> None:
        with self._changed:
            if name not in self._variants:
                raise _C.NotFound(f"unknown variant '{name}'")
            self._draining.add(name)
            self._drain()

    def _drain(self) -> None:
        used = {run.variant for run in self._runs.values()}
        for name in self._draining - used:
            del self._variants[name]
        self._draining &= used

    def is_draining(self, name: str) -> bool:
        return name in self._draining

    def variants(self) -> list[SimpleNamespace]:
        def info(name: str, path: str, parent: str) -> SimpleNamespace:
            return SimpleNamespace(
                name=name,
                path=path,
                parent=parent,
                content_digest=f"{hash(name) & 0xFFFF:064x}",
                state="resident",
                file_bytes=10,
                device_bytes=20,
                num_requests=self.num_submitted,
                num_running=len(self._runs),
                num_waiting=0,
                num_prompt_tokens=0,
                num_output_tokens=0,
                num_loads=1,
                num_evictions=0,
                load_seconds=0.5,
                manifest_json="{}",
            )

        return [info("base", "/base", "")] + [
            info(name, path, "base") for name, path in self._variants.items()
        ]

    def submit(
        self,
        request_id: int,
        variant: str,
        prompt: Sequence[int],
        sampling: _C.SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        with self._changed:
            if variant and (variant not in self._variants or variant in self._draining):
                raise _C.NotFound(f"unknown variant '{variant}'")
            if len(self._runs) + sampling.n > self.max_waiting:
                raise _C.ResourceExhausted(f"the queue is full: {self.max_waiting} requests wait")
            self.submitted.append(
                {"variant": variant, "prompt": list(prompt), "sampling": sampling}
                | {"priority": priority, "cache_salt": cache_salt}
            )
            common = self.script(prompt) if self.script else prompt
            for choice in range(sampling.n):
                answer = list(self.answers.get(choice, common))
                run = _Run(request_id, choice, variant, answer, sampling)
                self._runs[request_id, choice] = run
            self.num_submitted += 1
            self._changed.notify_all()

    def cancel(self, request_id: int, choice: int | None = None) -> None:
        with self._changed:
            for key in [k for k in self._runs if k[0] == request_id and choice in (None, k[1])]:
                del self._runs[key]
                self._events.append(Event(*key, finish=Finish.CANCELLED))
                self.num_cancelled += 1
            self._drain()

    def poll(self, max_events: int = 256, timeout_ms: int = 100) -> list[Event]:
        with self._changed:
            self._changed.wait_for(
                lambda: (self._runs and not self.is_stuck) or self._failure or not self._is_open,
                timeout_ms / 1000,
            )
            if self._failure or not self._is_open:
                return []
            if not self.is_stuck:
                for run in list(self._runs.values()):
                    self._events.append(self._step(run))
                self._drain()
            events, self._events = self._events[:max_events], self._events[max_events:]
        if self.step_s:
            time.sleep(self.step_s)
        return events

    def _step(self, run: _Run) -> Event:
        event = Event(run.request_id, run.choice)
        if self.fails_with:
            event.finish, event.error = Finish.ERROR, self.fails_with
        for _ in range(self.tokens_per_step):
            if event.finish is not Finish.NONE:
                break
            token = run.answer[run.num_done % len(run.answer)]
            run.num_done += 1
            ends = {*run.sampling.stop_token_ids, *({self._eos_id} - {run.sampling.ignore_eos})}
            if token in ends and not run.sampling.ignore_eos:
                event.finish, event.stop_token = Finish.STOP, token
                break
            event.tokens.append(token)
            if run.sampling.logprobs >= 0:
                top = [(token, -0.5), (1, -float("inf"))][: run.sampling.logprobs]
                event.logprobs.append(SimpleNamespace(token=token, logprob=-0.5, rank=1, top=top))
            if run.num_done >= run.sampling.max_tokens:
                event.finish = Finish.LENGTH
        if event.finish is not Finish.NONE:
            del self._runs[run.request_id, run.choice]
        return event

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_steps=1,
            num_prompt_tokens=2,
            num_output_tokens=3,
            num_requests=self.num_submitted,
            num_finished=0,
            num_cancelled=self.num_cancelled,
            num_errors=0,
            seconds_since_progress=1e6 if self.is_stuck and self._runs else 0.0,
            last_step_seconds=self.step_s,
            is_alive=not self._failure,
            failure=self._failure,
            num_waiting=0,
            num_running=len(self._runs),
            num_blocks=10,
            num_free_blocks=10 - len(self._runs),
            num_preemptions=0,
            prefix_hit_tokens=0,
            prefix_query_tokens=0,
        )

    def capacity(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(what="base weights", bytes=1 << 20, detail="scripted")]

    def config(self) -> SimpleNamespace:
        return SimpleNamespace(max_model_len=self._max_model_len)

    def base_digest(self) -> str:
        return "ab" * 32

    def model_config_json(self) -> str:
        return "{}"

    def vocab_size(self) -> int:
        return self._vocab_size

    def device_description(self) -> str:
        return "a script"

    def check(self) -> None:
        pass

    def shutdown(self) -> None:
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
