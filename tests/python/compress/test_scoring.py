"""Intervals against values by hand, and what counts as a candidate's bytes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from deltazip.compress.delta_file import FILE_NAME
from deltazip.compress.pipeline import compress
from deltazip.compress.plan import Settings
from deltazip.compress.scoring import candidates, statistics
from deltazip.compress.scoring.candidates import CandidateError, find_candidate
from deltazip.compress.scoring.measure import Bench, How
from deltazip.compress.scoring.tasks import load_task


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2)
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (81, 263, 0.255293, 0.366210),  # Newcombe (1998), table I
    ],
)
def test_wilson_by_hand(right: int, items: int, low: float, high: float) -> None:
    got = statistics.wilson(right, items)
    assert got == pytest.approx((right / items, low, high), abs=2e-4)


def test_wilson_refuses_nonsense() -> None:
    for right, items in ((0, 0), (4, 3), (-1, 3)):
        with pytest.raises(ValueError, match=f"got {right} of {items}"):
            statistics.wilson(right, items)


def test_paired_difference_by_hand() -> None:
    ours = [True] * 6 + [False] * 4
    theirs = [True] * 5 + [False] + [True] * 3 + [False]
    got = statistics.paired_difference(ours, theirs)  # better 1, worse 3
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert got == pytest.approx((-0.2, -2 / 12 - half, -2 / 12 + half), abs=1e-6)
    same = statistics.paired_difference(ours, ours)
    assert same.value == 0.0
    assert same.high == -same.low == pytest.approx(1.959964 / 12)  # agreement is not certainty
    with pytest.raises(ValueError, match="got 2 and 1"):
        statistics.paired_difference([True, False], [True])


def test_mcnemar_by_hand() -> None:
    ours = [True] * 9 + [False] * 1 + [True] * 7
    theirs = [False] * 9 + [True] * 1 + [True] * 7
    assert statistics.mcnemar(ours, theirs) == pytest.approx(2 * (1 + 10) / 2**10)
    assert statistics.mcnemar(theirs, ours) == statistics.mcnemar(ours, theirs)
    assert statistics.mcnemar(ours, ours) == 1.0


def test_a_mean_per_token_weighs_items_by_their_tokens() -> None:
    got = statistics.mean_per_token([2.0, 30.0], [1, 3], seed=1)
    assert got == (8.0, 2.0, 10.0)  # both the same item, once in four draws each
    assert statistics.mean_per_token([3.0, 6.0, 9.0], [1, 2, 3]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        statistics.mean_per_token([1.0], [])


def test_bootstrap_intervals_cover_the_truth() -> None:
    """Of items whose tokens go together: about 95 of 100 intervals hold the mean, 1."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        lengths = generator.integers(2, 20, 60)
        sums = generator.exponential(1.0, 60) * lengths
        interval = statistics.mean_per_token(sums.tolist(), lengths.tolist(), seed=seed)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


def test_sizes_are_of_files(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    out = tmp_path / "out"
    compress(*pair, out, samples, Settings(format="int2", group_size=32, num_samples=30))
    delta = find_candidate(out)
    assert delta.is_delta
    assert delta.sizes.total_bytes == (out / FILE_NAME).stat().st_size
    (out / "tokenizer_config.json").write_text("{}")
    grown = find_candidate(out, "grown")
    assert (grown.name, grown.sizes.total_bytes) == ("grown", delta.sizes.total_bytes + 2)
    plain = tmp_path / "plain"
    settings = Settings(format="int2", group_size=32, num_samples=30)
    compress(*pair, plain, samples, settings, lossless="none")
    unpacked = find_candidate(plain).sizes
    assert unpacked.plain_bytes == unpacked.total_bytes == (plain / FILE_NAME).stat().st_size
    assert delta.sizes.total_bytes < delta.sizes.plain_bytes
    assert delta.sizes.plain_bytes == pytest.approx(
        unpacked.total_bytes, rel=0.2
    )  # but for headers
    assert delta.sizes.linear_bits == unpacked.linear_bits
    weights, linear = 0, 0
    for rows, columns in 3 * [(48, 48), (16, 48), (16, 48), (48, 48), (80, 48), (80, 48), (48, 80)]:
        weights += rows * columns
        padded = -(-columns // 32) * 32
        linear += rows * (padded // 4 + 2 * padded // 32)
    assert delta.sizes.num_linear_weights == weights
    assert delta.sizes.linear_bytes == linear
    whole = find_candidate(pair[1])
    assert not whole.is_delta
    assert whole.sizes.linear_bits == 32.0  # a tiny fine-tune is stored in float32
    assert whole.sizes.total_bytes == (pair[1] / "model.safetensors").stat().st_size


def test_a_whole_model_declares_its_bytes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(pair[1], folder)
    declared = folder / candidates.SIZE_FILE
    declared.write_text(json.dumps({"total_bytes": 900, "linear_bytes": 500}))
    assert find_candidate(folder).sizes.total_bytes == 900
    assert find_candidate(folder).sizes.linear_bytes == 500
    declared.write_text(json.dumps({"total_bytes": 900}))
    with pytest.raises(CandidateError, match="expected total_bytes and linear_bytes"):
        find_candidate(folder)
    declared.write_text(json.dumps({"total_bytes": 900, "linear_bytes": 901}))
    with pytest.raises(CandidateError, match="linear_bytes is 901, expected 0 to all bytes, 900"):
        find_candidate(folder)
    with pytest.raises(CandidateError, match=r"a model folder with config\.json"):
        find_candidate(tmp_path)


def test_rows_pair_candidates_with_the_fine_tune(pair: tuple[Path, Path], samples: Path) -> None:
    """The fine-tune as a candidate of its own ties with itself; the base is further away."""
    task = load_task(samples, "exact", 8, 12)
    bench = Bench(pair[0], find_candidate(pair[1]), task, How(num_compared=6))
    found = [find_candidate(pair[1], "again"), find_candidate(pair[0])]
    itself, again, base = bench.rows(found)
    assert itself.accuracy == again.accuracy
    assert again.difference is not None
    assert again.difference.value == 0.0
    assert again.mcnemar_p == 1.0
    assert again.nll == itself.nll
    assert again.kl is not None
    assert base.kl is not None
    assert abs(again.kl.value) < 1e-6 < base.kl.low
    quick = Bench(pair[0], find_candidate(pair[1]), task, How(engine="none", num_compared=6))
    row = quick.row(found[1])
    assert (row.accuracy, row.difference, row.right) == (None, None, None)
    assert (row.nll, row.kl) == (base.nll, base.kl)
    with pytest.raises(ValueError, match="one of torch, deltazip, none, got 'jax'"):
        How(engine="jax")
