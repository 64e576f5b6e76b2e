"""Base and variants in one batch, with preemption and prefix hits: each answer as if alone.

Always over tiny random models; over real ones too where DELTAZIP_TEST_MODELS is set.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import device
import numpy as np
import pytest
from deltazip import _C

sys.path.insert(0, str(Path(__file__).parent / "server"))

from serving_support import tiny

PATIENCE_S = 300.0
NUM_REQUESTS = 24


@dataclass
class Case:
    variant: str
    prompt: list[int]
    max_tokens: int


@dataclass
class Outcome:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    gaps: dict[int, list[float]] = field(default_factory=dict)  # top-2, of each choice
    stats: _C.EngineStats | None = None


def run(
    base: Path,
    deltas: dict[str, Path],
    cases: Sequence[Case],
    *,
    arrivals_s: float | None,
    options: dict[str, object],
    **settings: object,
) -> Outcome:
    """Greedy answers; the ledgers must hold after.

    Args:
        arrivals_s: the longest time between two requests; None: one after another.
        options: fields of EngineConfig that choose the device.
        settings: others of its fields.
    """
    engine = _C.Engine(_C.EngineConfig(base=str(base), num_threads=2, **(options | settings)))
    for name, path in deltas.items():
        engine.add_variant(name, str(path))
    outcome = Outcome({i: [] for i in range(len(cases))}, {i: [] for i in range(len(cases))})
    rng = random.Random(5)
    left = 0
    give_up = time.monotonic() + PATIENCE_S

    def drain(until: int) -> None:
        nonlocal left
        while left > until:
            assert time.monotonic() < give_up
            for event in engine.poll(timeout_ms=20):
                outcome.tokens[event.request_id] += event.tokens
                tops = [each.top for each in event.logprobs]
                outcome.gaps[event.request_id] += [top[0][1] - top[1][1] for top in tops]
                assert event.finish in (_C.Finish.NONE, _C.Finish.LENGTH), event.error
                left -= event.finish is not _C.Finish.NONE

    for i, case in enumerate(cases):
        sampling = _C.SamplingParams(
            temperature=0.0, max_tokens=case.max_tokens, ignore_eos=True, logprobs=2
        )
        engine.submit(i, case.variant, case.prompt, sampling, priority=rng.randrange(2))
        left += 1
        if arrivals_s is None:
            drain(0)
        elif i >= len(cases) // 2:  # a burst that the cache cannot hold, then stragglers
            time.sleep(rng.random() * arrivals_s)
    drain(0)
    engine.check()
    outcome.stats = engine.stats()
    assert outcome.stats.num_free_blocks == outcome.stats.num_blocks
    engine.shutdown()
    return outcome


def make_cases(rng: random.Random, vocab_size: int, longest: int) -> list[Case]:
    """Base and variants in turn; half of the prompts begin alike."""
    shared = [rng.randrange(3, vocab_size) for _ in range(longest)]
    cases = []
    for i in range(NUM_REQUESTS):
        tail = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, longest // 2))]
        head = shared[: rng.randint(longest // 2, longest)] if i % 2 else []
        cases.append(Case(("", "math", "define")[i % 3], head + tail, rng.randint(20, 60)))
    return cases


def check_mixed_equals_alone(
    base: Path,
    deltas: dict[str, Path],
    cases: list[Case],
    *,
    kv_elements_per_token: int,
    arrivals_s: float,
    options: dict[str, object],
) -> None:
    longest = max(len(case.prompt) + case.max_tokens for case in cases)
    longest = -(-longest // 16) * 16
    kv_bytes_per_token = kv_elements_per_token * device.KV_BYTES
    alone = run(
        base,
        deltas,
        cases,
        arrivals_s=None,
        options=options,
        prefix_caching=False,
        kv_cache_bytes=4 * longest * kv_bytes_per_token,
        max_model_len=longest,
    )
    mixed = run(
        base,
        deltas,
        cases,
        arrivals_s=arrivals_s,
        options=options,
        # Two longest sequences: twenty-four cannot all stay.
        kv_cache_bytes=2 * longest * kv_bytes_per_token,
        max_model_len=longest,
        max_batch_tokens=48,
        block_size=8,
        num_delta_slots=2,
    )
    assert mixed.stats is not None
    assert mixed.stats.num_preemptions > 0
    assert mixed.stats.prefix_hit_tokens > 0
    for i, case in enumerate(cases):
        assert len(mixed.tokens[i]) == len(alone.tokens[i]) == case.max_tokens
    check_same_choices(mixed, alone, cases)
    if options:
        on_cpu = run(
            base,
            deltas,
            cases,
            arrivals_s=None,
            options={},
            kv_cache_bytes=4 * longest * kv_elements_per_token * 4,
            max_model_len=longest,
        )
        check_same_choices(mixed, on_cpu, cases)
    answers = {tuple(tokens) for tokens in alone.tokens.values()}
    assert len(answers) > NUM_REQUESTS // 2, "answers that are all alike prove nothing"


def check_same_choices(got: Outcome, expected: Outcome, cases: list[Case]) -> None:
    """Where two answers part, the choice was a near tie, which rounding may decide."""
    num_parted = 0
    for i, case in enumerate(cases):
        pairs = zip(got.tokens[i], expected.tokens[i], strict=True)
        parted = [at for at, (ours, theirs) in enumerate(pairs) if ours != theirs]
        if parted:
            num_parted += 1
            gap = expected.gaps[i][parted[0]]
            assert gap < device.GAP, (
                f"request {i} of variant '{case.variant}', token {parted[0]}: the gap was {gap:.3f}"
            )
    assert num_parted <= len(cases) // 2


def test_tiny_models(tmp_path: Path, device_options: dict[str, object]) -> None:
    base = tiny.write_base(tmp_path / "base")
    deltas = {
        name: tiny.write_delta(tmp_path / name, base, seed=seed, scale=0.1)
        for seed, name in enumerate(("math", "define"), start=1)
    }
    kv_elements_per_token = 2 * 2 * 2 * tiny.HEAD_DIM  # layers, keys and values, heads, head_dim
    for seed in range(3):
        cases = make_cases(random.Random(seed), 300, 32)
        check_mixed_equals_alone(
            base,
            deltas,
            cases,
            kv_elements_per_token=kv_elements_per_token,
            arrivals_s=0.0005,
            options=device_options,
        )


def round_to_nearest(difference: np.ndarray[Any, Any], type_: Any, group_size: int) -> Any:
    """The plainest compression: the two largest of four, rounded. Good enough to tell apart."""
    from deltazip.compress.pack import PAIRS, DeltaType, QuantizedMatrix

    rows, columns = difference.shape
    groups = -(-columns // group_size)
    padded = np.zeros((rows, groups * group_size), np.float32)
    padded[:, :columns] = difference
    top = 127 if type_ is DeltaType.DENSE_INT8 else 7
    scales = np.abs(padded).reshape(rows, groups, group_size).max(axis=2) / top
    scales = np.maximum(scales, 1e-6).astype(np.float16)
    spread = np.repeat(scales.astype(np.float32), group_size, axis=1)[:, :columns]
    values = np.clip(np.rint(difference / spread), -top, top).astype(np.int8)
    if type_ is DeltaType.DENSE_INT8:
        return QuantizedMatrix(type_, values, scales, group_size)
    fours = values.reshape(rows, columns // 4, 4)
    sizes = np.abs(fours.astype(np.int16))
    pairs = np.stack([sizes[:, :, a] + sizes[:, :, b] for a, b in PAIRS], axis=2)
    kept = pairs.argmax(axis=2).astype(np.uint8)
    mask = np.zeros((len(PAIRS), 4), np.int8)
    for i, pair in enumerate(PAIRS):
        mask[i, list(pair)] = 1
    values = (fours * mask[kept]).reshape(rows, columns)
    return QuantizedMatrix(type_, values, scales, group_size, kept)


def write_real_delta(folder: Path, base: Path, fine_tune: Path) -> Path:
    from deltazip.compress import delta_file
    from deltazip.compress.pack import DeltaType
    from deltazip.compress.stored import Stored
    from safetensors import safe_open

    engine = _C.Engine(_C.EngineConfig(base=str(base), kv_cache_bytes=1 << 28, max_model_len=256))
    digest = engine.base_digest()
    engine.shutdown()
    entries, stored = {}, {}
    with (
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(fine_tune / "model.safetensors", "pt") as new,
    ):
        for name in old.keys():  # noqa: SIM118  (not a dict)
            before, after = old.get_tensor(name), new.get_tensor(name)
            shape = tuple(before.shape)
            if len(shape) == 1:
                entries[name] = delta_file.Entry(DeltaType.REPLACED, shape)
                stored[name] = Stored.of_tensor(after)
                continue
            is_table = "embed" in name
            type_ = DeltaType.DENSE_INT8 if is_table else DeltaType.SPARSE24_INT4
            matrix = round_to_nearest((after.float() - before.float()).numpy(), type_, 64)
            entries[name] = delta_file.Entry(type_, shape, 64)
            stored |= delta_file.stored_of_matrix(name, matrix)
    folder.mkdir()
    path = folder / delta_file.FILE_NAME
    delta_file.write_delta(
        path, base_digest=digest, entries=entries, stored=stored, base={}, compressor={}
    )
    return folder


@pytest.fixture(scope="module")
def real_deltas(test_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("deltas")
    return {
        name: write_real_delta(folder / name, test_models / "base", test_models / name)
        for name in ("math", "define")
    }


@pytest.mark.slow
def test_real_models(
    test_models: Path, real_deltas: dict[str, Path], device_options: dict[str, object]
) -> None:
    cases = make_cases(random.Random(7), 40_000, 48)
    kv_elements_per_token = 30 * 2 * 3 * 64
    check_mixed_equals_alone(
        test_models / "base",
        real_deltas,
        cases,
        kv_elements_per_token=kv_elements_per_token,
        arrivals_s=0.05,
        options=device_options,
    )


@pytest.mark.slow
def test_a_load_does_not_stop_who_runs(
    test_models: Path, real_deltas: dict[str, Path], device_options: dict[str, object]
) -> None:
    settings = {"kv_cache_bytes": 1 << 28, "max_model_len": 1024} | device_options
    config = _C.EngineConfig(base=str(test_models / "base"), **settings)
    engine = _C.Engine(config)
    engine.add_variant("math", str(real_deltas["math"]))
    endless = _C.SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    engine.submit(1, "", [5, 6, 7], endless)
    give_up = time.monotonic() + PATIENCE_S
    while not engine.poll(timeout_ms=20):
        assert time.monotonic() < give_up
    engine.submit(2, "math", [5, 6, 7], endless)
    tokens_while_loading = 0
    while (state := engine.variants()[1].state) != "resident":
        assert time.monotonic() < give_up
        for event in engine.poll(timeout_ms=20):
            tokens_while_loading += len(event.tokens) if state == "loading" else 0
    assert tokens_while_loading >= 2
    engine.shutdown()
