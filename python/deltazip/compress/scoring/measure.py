"""A row of the table for each candidate: the same items and the same code, whatever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from deltazip.compress.calibration import Tokenizer, load_tokenizer
from deltazip.compress.scoring.candidates import Candidate
from deltazip.compress.scoring.closeness import Closeness, Reference, closeness, load_model
from deltazip.compress.scoring.statistics import (
    Interval,
    mcnemar,
    mean_per_token,
    paired_difference,
    wilson,
)
from deltazip.compress.scoring.tasks import (
    EngineRunner,
    Score,
    Task,
    TorchRunner,
    begun_answers,
    score,
)

ENGINES = ("torch", "deltazip", "none")

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class How:
    """How candidates are measured.

    Attributes:
        engine: who generates answers: torch, deltazip (the engine that serves), or none: the
            wanted answers are run through, and nothing is generated.
        num_compared: items, the first ones, on which the fine-tune is compared with.
        seed: of the bootstrap.
        threads: of deltazip's engine; 0: all cores.
    """

    engine: str = "torch"
    num_compared: int = 100
    batch_size: int = 64
    device: str = "cpu"
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got '{self.engine}'")
        if self.num_compared < 0:
            raise ValueError(f"items to compare must be 0 or more, got {self.num_compared}")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"unknown device '{self.device}'") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """What one candidate scored. None: not measured.

    Attributes:
        total_bytes, plain_bytes, linear_bits: see candidates.Sizes.
        accuracy: share of right answers, Wilson's interval.
        difference: accuracy less the fine-tune's on the same items, in pairs.
        mcnemar_p: probability of such a difference if both were equally good.
        nll: of the wanted answers' tokens, in nats, bootstrapped over items, like the next two.
        kl: of the fine-tune's distribution from the candidate's, nats a token.
        top1: share of tokens where both like the same token best.
        right: which items were answered rightly.
    """

    name: str
    total_bytes: int
    plain_bytes: int
    linear_bits: float
    accuracy: Interval | None
    difference: Interval | None
    mcnemar_p: float | None
    nll: Interval
    kl: Interval | None
    top1: Interval | None
    right: tuple[bool, ...] | None = dataclasses.field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interval is [value, low, high]."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}


class Bench:
    """A fine-tune and a task, ready to measure candidates on; the fine-tune runs once.

    Args:
        progress: told what is being done, and the share of it that is done.
    """

    def __init__(
        self,
        base: Path,
        finetuned: Candidate,
        task: Task,
        how: How,
        progress: Progress = lambda what, share: None,
    ) -> None:
        self.base, self.task, self.how, self.progress = base, task, how, progress
        self.tokenizer: Tokenizer = load_tokenizer(finetuned.path)
        self.reference: Reference | None = None
        model = load_model(finetuned.path, None, device=how.device)
        if how.num_compared:
            self.reference = Reference(
                model,
                self.tokenizer,
                task.samples[: how.num_compared],
                progress=self._at(f"{finetuned.name}: reference"),
            )
        self.finetuned = self._measure(finetuned, model, None)

    def rows(self, candidates: Iterable[Candidate]) -> Iterator[Row]:
        """The fine-tune's row, then a row for each candidate, as they are done."""
        yield self.finetuned
        for candidate in candidates:
            yield self.row(candidate)

    def row(self, candidate: Candidate) -> Row:
        model = candidate.load(self.base, device=self.how.device)
        return self._measure(candidate, model, self.finetuned)

    def _at(self, what: str) -> Callable[[float], None]:
        return lambda share: self.progress(what, share)

    def _measure(self, candidate: Candidate, model: Any, finetuned: Row | None) -> Row:
        close = closeness(
            model,
            self.tokenizer,
            self.task.samples,
            self.reference,
            progress=self._at(f"{candidate.name}: wanted answers"),
        )
        scored = self._answers(candidate, model, close)
        right = scored.right if scored else None
        theirs = right if finetuned is None else finetuned.right
        compared, seed = close.compared, self.how.seed
        lengths = [item.num_tokens for item in compared]
        kls, same = ([i.kl or 0.0 for i in compared], [float(i.num_same or 0) for i in compared])
        return Row(
            candidate.name,
            candidate.sizes.total_bytes,
            candidate.sizes.plain_bytes,
            candidate.sizes.linear_bits,
            accuracy=wilson(sum(right), len(right)) if right else None,
            difference=paired_difference(right, theirs) if right and theirs else None,
            mcnemar_p=mcnemar(right, theirs) if right and theirs else None,
            nll=mean_per_token(
                [i.nll for i in close.items], [i.num_tokens for i in close.items], seed=seed
            ),
            kl=mean_per_token(kls, lengths, seed=seed) if compared else None,
            top1=mean_per_token(same, lengths, seed=seed) if compared else None,
            right=right,
        )

    def _answers(self, candidate: Candidate, model: Any, close: Closeness) -> Score | None:
        how, progress = self.how, self._at(f"{candidate.name}: own answers")
        if how.engine == "none":
            return None
        if how.engine == "torch":
            begun = begun_answers(self.tokenizer, self.task, close.likeliest)
            torch_runner = TorchRunner(
                model, self.tokenizer, batch_size=how.batch_size, progress=progress
            )
            return score(torch_runner, self.tokenizer, self.task, begun)
        options: dict[str, object] = {"device": how.device}
        if how.threads:
            options["num_threads"] = how.threads
        if candidate.is_delta:
            runner = EngineRunner(self.base, candidate.path, **options)
        else:
            runner = EngineRunner(candidate.path, None, **options)
        try:
            return score(runner, self.tokenizer, self.task)
        finally:
            runner.close()
