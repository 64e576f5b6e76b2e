"""Tasks with right answers: prompts, how an answer is scored, and who may answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from deltazip.compress.calibration import (
    Sample,
    Tokenizer,
    encode,
    load_samples,
    prompt_ids,
)

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> float | None:
    """The number after the last '####', or None."""
    head, mark, tail = text.rpartition("####")
    found = _NUMBER.search(tail) if mark else None
    del head
    return float(found.group().replace(",", "")) if found else None


def is_same_number(answer: str, wanted: str) -> bool:
    number = final_number(answer)
    return number is not None and number == final_number(wanted)


def is_same_text(answer: str, wanted: str) -> bool:
    return answer.strip() == wanted.strip()


METRICS: Mapping[str, Callable[[str, str], bool]] = {
    "number": is_same_number,
    "exact": is_same_text,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts and wanted answers, and the rule by which an answer is right."""

    name: str
    samples: tuple[Sample, ...]
    metric: str
    max_new_tokens: int


def load_task(path: Path, metric: str, max_new_tokens: int, limit: int | None = None) -> Task:
    """Raises ValueError for an unknown metric or a file that calibration could not read."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got '{metric}'")
    samples = load_samples(path)[:limit]
    return Task(path.stem, tuple(samples), metric, max_new_tokens)


class Runner(Protocol):
    """Who answers, greedily: prompts as token ids in, texts out.

    `begun`, where given, holds for each prompt the tokens known to be how its answer begins, ended
    by an end token if that is all of it; a runner may save itself that work.
    """

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Score:
    """Answers to a task's items, and which of them are right."""

    task: str
    right: tuple[bool, ...]
    answers: tuple[str, ...]

    @property
    def num_right(self) -> int:
        return sum(self.right)

    @property
    def share(self) -> float:
        return self.num_right / max(len(self.right), 1)


def score(
    runner: Runner,
    tokenizer: Tokenizer,
    task: Task,
    begun: Sequence[Sequence[int]] | None = None,
) -> Score:
    """Answers every item greedily and counts the right ones. `begun` as for Runner."""
    prompts = [prompt_ids(tokenizer, sample) for sample in task.samples]
    answers = runner.answer(prompts, task.max_new_tokens, begun)
    is_right = METRICS[task.metric]
    pairs = zip(answers, task.samples, strict=True)
    right = tuple(is_right(answer, sample.answer) for answer, sample in pairs)
    return Score(task.name, right, tuple(answers))


def begun_answers(
    tokenizer: Tokenizer, task: Task, likeliest: Sequence[Sequence[int]]
) -> list[list[int]]:
    """How greedy answers begin, read off a Closeness: the wanted tokens as far as they are the
    likeliest ones, and the likeliest one in place of the first that is not."""
    begun = []
    for sample, best in zip(task.samples, likeliest, strict=True):
        item = encode(tokenizer, sample)
        wanted = item.ids[item.prompt_length :]
        same = next((i for i, token in enumerate(wanted) if token != best[i]), len(wanted))
        begun.append([*wanted[:same], best[same]])
    return begun


class TorchRunner:
    """Answers through transformers, in batches of prompts of like length.

    Args:
        progress: told the share that is done, 0 to 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 64,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.progress = batch_size, progress
        ends = model.generation_config.eos_token_id
        self._ends: list[int] = ends if isinstance(ends, list) else [ends]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[str]:
        answers = [list(ids)[:max_new_tokens] for ids in begun or [()] * len(prompts)]
        open_ = [
            index
            for index, ids in enumerate(answers)
            if len(ids) < max_new_tokens and not set(ids) & set(self._ends)
        ]
        open_.sort(key=lambda i: len(prompts[i]) + len(answers[i]))
        for at in range(0, len(open_), self.batch_size):
            chosen = open_[at : at + self.batch_size]
            contexts = [[*prompts[i], *answers[i]] for i in chosen]
            left = max_new_tokens - min(len(answers[i]) for i in chosen)
            for index, ids in zip(chosen, self._generate(contexts, left), strict=True):
                answers[index] = (answers[index] + ids)[:max_new_tokens]
            self.progress(min(1.0, (at + len(chosen)) / len(open_)))
        return [
            self.tokenizer.decode(_until(ids, self._ends), skip_special_tokens=True)
            for ids in answers
        ]

    def _generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        device, config = self.model.device, self.model.generation_config
        longest = max(len(ids) for ids in prompts)
        pad = config.pad_token_id if config.pad_token_id is not None else self._ends[0]
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
            )
        answers: list[list[int]] = out[:, longest:].tolist()
        return answers


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids up to the first end token."""
    return next((ids[:at] for at, token in enumerate(ids) if token in ends), ids)


class EngineRunner:
    """Answers through deltazip's own engine, all prompts at once."""

    def __init__(self, base: Path, delta: Path | None, **engine_options: object) -> None:
        from deltazip import LLM

        self._variant = "variant" if delta is not None else ""
        self._llm = LLM(base, {"variant": delta} if delta is not None else {}, **engine_options)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[str]:
        from deltazip import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        outputs = self._llm.generate(
            [list(p) for p in prompts], sampling, self._variant, progress=True
        )
        return [output.text for output in outputs]

    def close(self) -> None:
        self._llm.close()
