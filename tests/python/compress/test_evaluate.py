"""Scores: the rules, forced and generated answers against each other, and closeness by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltazip.compress import calibration
from deltazip.compress.calibration import Sample
from deltazip.compress.pipeline import compress
from deltazip.compress.plan import Settings
from deltazip.compress.scoring import closeness, tasks
from deltazip.compress.scoring.closeness import Reference


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7.0),
        ("#### 1\n#### -1,234.5 dollars", -1234.5),
        ("#### none", None),
        ("42", None),
        ("#### 5 or 6", 5.0),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert tasks.final_number(text) == number


def test_metrics() -> None:
    assert tasks.is_same_number("#### 70", "work\n#### 70")
    assert not tasks.is_same_number("#### 7", "#### 70")
    assert not tasks.is_same_number("70", "#### 70")
    assert tasks.is_same_text(" a b\n", "a b")
    assert not tasks.is_same_text("a  b", "a b")
    with pytest.raises(ValueError, match="one of number, exact, got 'bleu'"):
        tasks.load_task(Path("x.jsonl"), "bleu", 3)


def test_begun_answers_are_greedy_answers(pair: tuple[Path, Path]) -> None:
    """Forced over the wanted answers and continued, or generated: the same texts."""
    tokenizer = calibration.load_tokenizer(pair[1])
    model = closeness.load_model(pair[1], None)
    runner = tasks.TorchRunner(model, tokenizer, batch_size=3)
    prompts = [({"role": "user", "content": text},) for text in ("one two", "three", "four " * 7)]
    free = runner.answer([calibration.prompt_ids(tokenizer, Sample(p, "")) for p in prompts], 12)
    assert all(free)
    wanted = [free[0], free[1].rpartition(" ")[0] + " one", "six seven"]
    samples = tuple(Sample(p, w) for p, w in zip(prompts, wanted, strict=True))
    task = tasks.Task("tiny", samples, "exact", 12)
    close = closeness.closeness(model, tokenizer, samples)
    begun = tasks.begun_answers(tokenizer, task, close.likeliest)
    scored = tasks.score(runner, tokenizer, task, begun)
    assert list(scored.answers) == free
    assert scored.num_right == 1
    assert tasks.score(runner, tokenizer, task) == scored


def test_closeness_by_hand(pair: tuple[Path, Path]) -> None:
    tokenizer = calibration.load_tokenizer(pair[1])
    model, tuned = (closeness.load_model(folder, None) for folder in (pair[0], pair[1]))
    samples = [
        Sample(({"role": "user", "content": "one"},), "two three"),
        Sample(({"role": "user", "content": "one two three four"},), "five"),
    ]
    reference = Reference(tuned, tokenizer, samples)
    close = closeness.closeness(model, tokenizer, samples, reference)
    nll = kl = 0.0
    same = count = 0
    with torch.inference_mode():
        for sample in samples:
            item = calibration.encode(tokenizer, sample)
            ours, theirs = (
                m(torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
                for m in (model, tuned)
            )
            for at, token in enumerate(
                [*item.ids[item.prompt_length :], 2], item.prompt_length - 1
            ):
                nll -= float(ours[at, token])
                kl += float((theirs[at].exp() * (theirs[at] - ours[at])).sum())
                same += int(ours[at].argmax() == theirs[at].argmax())
                count += 1
    assert close.num_tokens == count == 5
    assert close.nll == pytest.approx(nll / 5, rel=1e-4)
    assert close.kl == pytest.approx(kl / 5, rel=1e-3)
    assert close.top1 == same / 5
    part = closeness.closeness(model, tokenizer, samples, Reference(tuned, tokenizer, samples[:1]))
    assert part.nll == close.nll
    assert part.items[0] == close.items[0]
    assert part.kl == pytest.approx((close.items[0].kl or 0.0) / 3)
    with pytest.raises(ValueError, match="reference of 2 items for 1 samples"):
        closeness.closeness(model, tokenizer, samples[:1], reference)
    itself = closeness.closeness(tuned, tokenizer, samples, reference)
    assert itself.kl == pytest.approx(0.0, abs=1e-6)
    assert itself.top1 == 1.0
    alone = closeness.closeness(model, tokenizer, samples)
    assert (alone.nll, alone.kl, alone.top1) == (close.nll, None, None)
    with pytest.raises(ValueError, match="needs an answer"):
        closeness.closeness(model, tokenizer, [Sample(samples[0].messages, "")])


def test_a_delta_is_closer_to_its_fine_tune_than_the_base(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    settings = Settings(format="int4", group_size=32, num_samples=40)
    compress(*pair, tmp_path / "out", samples, settings)
    tokenizer = calibration.load_tokenizer(pair[1])
    items = calibration.load_samples(samples)[:20]
    reference = Reference(closeness.load_model(pair[1], None), tokenizer, items)
    base, variant = (
        closeness.closeness(closeness.load_model(pair[0], delta), tokenizer, items, reference)
        for delta in (None, tmp_path / "out")
    )
    assert base.kl is not None
    assert variant.kl is not None
    assert variant.kl < 0.1 * base.kl
