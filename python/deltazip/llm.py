"""Offline batches: a base and its compressed fine-tunes in this process, without a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar, cast

from deltazip import _C
from deltazip.sampling import SamplingParams
from deltazip.text import ChoiceText, VariantText, message_text

__all__ = ["LLM", "Completion", "RequestOutput", "TokenLogprob"]

_POLL_MAX_EVENTS = 1024
_POLL_TIMEOUT_MS = 200

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log probability.

    Attributes:
        rank: 1 is the likeliest token.
        top: token id -> log probability, of the likeliest tokens.
    """

    token: int
    logprob: float
    rank: int
    top: dict[int, float]


@dataclass(slots=True)
class Completion:
    """One answer to one prompt.

    Attributes:
        finish_reason: "stop" or "length".
        logprobs: one per token, when asked for.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class RequestOutput:
    """All answers to one prompt.

    Attributes:
        variant: who answered; "" is the base.
        prompt: the text as given or rendered; None if the prompt was token ids.
        outputs: n answers, in order.
        prompt_logprobs: one per prompt token, the first None, when asked for.
        num_cached_tokens: prompt tokens whose KV was found in the prefix cache.
    """

    variant: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first answer."""
        return self.outputs[0].text


@dataclass(slots=True)
class _Job:
    output: RequestOutput
    sampling: SamplingParams
    core_sampling: _C.SamplingParams
    texts: list[ChoiceText]
    is_done: list[bool]


def _logprob(entry: _C.TokenLogprobs) -> TokenLogprob:
    return TokenLogprob(entry.token, entry.logprob, entry.rank, dict(entry.top))


class LLM:
    """A base model and compressed fine-tunes of it, answering batches of prompts.

    Not thread-safe: one batch at a time. Use as a context manager, or call close().

    Args:
        base: folder of the base model, in Hugging Face layout, with a tokenizer.
        variants: name -> folder of a compressed fine-tune (delta.safetensors).
        engine_options: further fields of `_C.EngineConfig`: device, dtype, num_threads,
            kv_cache_bytes, max_model_len, max_batch_sequences and others.

    Raises:
        ValueError: a folder or an option is not valid; it is named.

    Example:
        >>> with LLM("base", {"sql": "deltas/sql"}) as llm:
        ...     for output in llm.generate(["SELECT"], SamplingParams(temperature=0), "sql"):
        ...         print(output.text)
    """

    def __init__(
        self,
        base: str | PathLike[str],
        variants: Mapping[str, str | PathLike[str]] | None = None,
        **engine_options: object,
    ) -> None:
        self._base_text = VariantText.load(str(base))
        self._engine = _C.Engine(_C.EngineConfig(base=str(base), **engine_options))
        self._texts: dict[str, VariantText] = {}
        self._next_id = 1
        self._max_model_len = self._engine.config().max_model_len
        try:
            for name, path in (variants or {}).items():
                self.add_variant(name, path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engine. More than once is fine."""
        self._engine.shutdown()

    def add_variant(self, name: str, path: str | PathLike[str]) -> None:
        """Validates a compressed fine-tune and makes it known under `name`.

        Raises:
            ValueError: the name is taken, or the folder is not valid for this base.
        """
        text = VariantText.load(str(path), self._base_text)
        self._engine.add_variant(name, str(path))
        self._texts[name] = text

    def remove_variant(self, name: str) -> None:
        """Forgets a variant and frees what it takes.

        Raises:
            KeyError: there is no such variant.
        """
        self._text(name)
        self._engine.remove_variant(name)
        self._texts.pop(name, None)

    @property
    def variants(self) -> list[str]:
        """The names that generate() and chat() take, besides "" for the base."""
        return list(self._texts)

    def variant_info(self) -> list[_C.VariantInfo]:
        """What the engine knows of each variant, the base first."""
        return self._engine.variants()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        variant: str | Sequence[str] = "",
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continues each prompt.

        Args:
            prompts: texts, or lists of token ids; one, or many.
            sampling: for all prompts, or one for each. Default: SamplingParams().
            variant: for all prompts, or one for each; "" is the base.
            progress: show a progress bar.

        Returns:
            One output per prompt, in order.

        Raises:
            KeyError: there is no such variant.
            ValueError: a prompt or parameter is out of range; nothing was run.
            RuntimeError: the engine failed on a request.
        """
        many = _as_prompts(prompts)
        names = _one_each(variant, len(many), str, "variant")
        params = _one_each(sampling or SamplingParams(), len(many), SamplingParams, "sampling")
        jobs = []
        for prompt, name, one in zip(many, names, params, strict=True):
            text = self._text(name)
            is_text = isinstance(prompt, str)
            ids = text.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            shown = str(prompt) if is_text else None
            jobs.append(self._job(name, shown, ids, one, text, continues=True))
        return self._run(jobs, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        variant: str | Sequence[str] = "",
        *,
        add_generation_prompt: bool = True,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers each conversation, by the variant's own chat template.

        Args:
            messages: one conversation, or many; each message has 'role' and 'content'.
            sampling: as for generate().
            variant: as for generate().
            add_generation_prompt: end the prompt with the opening of the assistant's turn.
            progress: show a progress bar.

        Returns:
            One output per conversation, in order.

        Raises:
            KeyError: there is no such variant.
            ValueError: no chat template, a bad message, or a parameter out of range.
            RuntimeError: the engine failed on a request.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        many = cast("Sequence[Sequence[Message]]", [messages] if is_one else messages)
        names = _one_each(variant, len(many), str, "variant")
        params = _one_each(sampling or SamplingParams(), len(many), SamplingParams, "sampling")
        jobs = []
        for conversation, name, one in zip(many, names, params, strict=True):
            text = self._text(name)
            plain = [_plain(message) for message in conversation]
            ids = text.encode_chat(plain, add_generation_prompt=add_generation_prompt)
            shown = text.tokenizer.decode(ids, skip_special_tokens=False)
            jobs.append(self._job(name, shown, ids, one, text, continues=False))
        return self._run(jobs, progress)

    def _text(self, name: str) -> VariantText:
        if name == "":
            return self._base_text
        if name not in self._texts:
            raise KeyError(f"no variant {name!r}; expected one of {sorted(self._texts)} or ''")
        return self._texts[name]

    def _job(
        self,
        variant: str,
        prompt: str | None,
        ids: list[int],
        sampling: SamplingParams,
        text: VariantText,
        *,
        continues: bool,
    ) -> _Job:
        left = self._max_model_len - len(ids)
        wanted = sampling.max_tokens if sampling.max_tokens is not None else max(left, 1)
        if not ids:
            raise ValueError("prompt: expected at least one token, got none")
        if wanted > left:
            raise ValueError(
                f"the context is {self._max_model_len} tokens; the prompt has {len(ids)} "
                f"and max_tokens is {wanted}"
            )
        output = RequestOutput(variant, prompt, ids, [Completion(i) for i in range(sampling.n)])
        context = ids if continues else ()
        skip = sampling.skip_special_tokens
        texts = [
            ChoiceText(
                text.tokenizer.detokenizer(context, skip_special_tokens=skip),
                sampling.stop,
                sampling.include_stop_str_in_output,
            )
            for _ in range(sampling.n)
        ]
        core = sampling.to_core(wanted, text.stop_token_ids)
        return _Job(output, sampling, core, texts, [False] * sampling.n)

    def _run(self, jobs: list[_Job], progress: bool) -> list[RequestOutput]:
        waiting = deque(jobs)
        running: dict[int, _Job] = {}
        advance, finish = _progress_bar(len(jobs)) if progress else (lambda: None, lambda: None)
        try:
            while waiting or running:
                self._submit(waiting, running)
                events = self._engine.poll(_POLL_MAX_EVENTS, _POLL_TIMEOUT_MS)
                if not events and not (stats := self._engine.stats()).is_alive:
                    raise RuntimeError(f"the engine ended: {stats.failure or 'it was closed'}")
                for event in events:
                    job = running.get(event.request_id)
                    if job is None or job.is_done[event.choice]:
                        continue
                    if self._take(event, job) and event.finish is _C.Finish.NONE:
                        # A stop text, unknown to the engine. Other choices go on.
                        self._engine.cancel(event.request_id, event.choice)
                    if all(job.is_done):
                        del running[event.request_id]
                        advance()
        finally:
            for request_id in running:
                self._engine.cancel(request_id)
            finish()
        return [job.output for job in jobs]

    def _submit(self, waiting: deque[_Job], running: dict[int, _Job]) -> None:
        while waiting:
            job = waiting[0]
            try:
                self._engine.submit(
                    self._next_id,
                    job.output.variant,
                    job.output.prompt_token_ids,
                    job.core_sampling,
                )
            except _C.ResourceExhausted:
                if not running:
                    raise
                return  # the queue is full: when some have ended
            running[self._next_id] = waiting.popleft()
            self._next_id += 1

    def _take(self, event: _C.OutputEvent, job: _Job) -> bool:
        """Adds an event to its job; whether its choice is done."""
        finish = event.finish.name
        if finish in ("ERROR", "CANCELLED"):
            raise RuntimeError(event.error or "the engine cancelled a request")
        output, completion = job.output, job.output.outputs[event.choice]
        output.num_cached_tokens = max(output.num_cached_tokens, event.num_cached_prompt_tokens)
        if entries := event.prompt_logprobs:
            output.prompt_logprobs = [None if e is None else _logprob(e) for e in entries]
        tokens = event.tokens
        text = job.texts[event.choice]
        piece, num_used = text.push(tokens)
        completion.token_ids += tokens[:num_used]
        if job.sampling.logprobs is not None:
            completion.logprobs = completion.logprobs or []
            completion.logprobs += [_logprob(entry) for entry in event.logprobs[:num_used]]
        if finish != "NONE":
            piece += text.finish()
            completion.finish_reason = finish.lower()
        if text.is_stopped:
            completion.finish_reason = "stop"
        completion.text += piece
        job.is_done[event.choice] = bool(completion.finish_reason)
        return job.is_done[event.choice]


def _plain(message: Message) -> dict[str, Any]:
    if "role" not in message or "content" not in message:
        raise ValueError(f"messages: expected 'role' and 'content', got {sorted(message)}")
    return {**message, "content": message_text(message["content"])}


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items


def _one_each(value: T | Sequence[T], count: int, kind: type[T], name: str) -> Iterable[T]:
    if isinstance(value, kind):
        return [value] * count
    many = list(cast("Sequence[T]", value))
    if len(many) != count:
        raise ValueError(f"{name}: expected one, or one for each of {count}, got {len(many)}")
    return many


def _progress_bar(total: int) -> tuple[Callable[[], None], Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress("generating", *columns, console=Console(stderr=True))
    task = bar.add_task("generating", total=total)
    bar.start()
    return (lambda: bar.advance(task)), bar.stop
