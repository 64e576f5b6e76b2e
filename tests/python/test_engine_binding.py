"""deltazip._C over a tiny random model: what crosses the border, and what is stopped at it."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deltazip import _C

sys.path.insert(0, str(Path(__file__).parent / "server"))

from serving_support import tiny

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("binding") / "tiny-base")


@pytest.fixture(scope="module")
def delta(base: Path) -> Path:
    return tiny.write_delta(base.parent / "red", base, seed=1, scale=0.05)


def make_config(base: Path, **changes: object) -> _C.EngineConfig:
    settings: dict[str, object] = {
        "base": str(base),
        "num_threads": 2,
        "kv_cache_bytes": 16 << 20,
        "max_batch_tokens": 64,
    }
    return _C.EngineConfig(**(settings | changes))


@pytest.fixture
def engine(base: Path) -> Iterator[_C.Engine]:
    made = _C.Engine(make_config(base))
    yield made
    made.shutdown()
    made.check()


def finish(engine: _C.Engine, num_choices: int) -> list[_C.OutputEvent]:
    """All events until so many choices have ended."""
    events: list[_C.OutputEvent] = []
    give_up = time.monotonic() + PATIENCE_S
    while sum(event.finish is not _C.Finish.NONE for event in events) < num_choices:
        assert time.monotonic() < give_up
        events += engine.poll()
    return events


def generate(
    engine: _C.Engine, prompt: list[int], variant: str = "", **sampling: object
) -> list[int]:
    engine.submit(1, variant, prompt, _C.SamplingParams(**({"temperature": 0.0} | sampling)))
    return [token for event in finish(engine, 1) for token in event.tokens]


def test_every_field_goes_in_by_keyword_and_comes_back() -> None:
    given = {
        "base": "x", "base_name": "b", "device": "cpu", "num_threads": 3,
        "dtype": "float16", "kv_dtype": "bfloat16",
        "kv_cache_bytes": 1 << 40, "max_model_len": 7, "prefix_caching": False,
    }  # fmt: skip
    config = _C.EngineConfig(**given)
    assert {name: getattr(config, name) for name in given} == given
    sampling = _C.SamplingParams(
        seed=2**64 - 1, logit_bias={3: -1.5, 5: 2}, stop_token_ids=(1, 2), top_p=0.5
    )
    assert sampling.seed == 2**64 - 1
    assert sampling.logit_bias == {3: -1.5, 5: 2.0}
    assert sampling.stop_token_ids == [1, 2]
    assert sampling.top_p == 0.5
    sampling.seed = None
    assert sampling.seed is None
    assert _C.SamplingParams(top_k=np.int64(4)).top_k == 4


def test_an_unknown_keyword_is_named() -> None:
    with pytest.raises(TypeError, match="'blok_size'"):
        _C.EngineConfig(blok_size=16)
    with pytest.raises(TypeError, match="'__class__'"):
        _C.SamplingParams(__class__=int)
    with pytest.raises(TypeError):
        _C.EngineConfig("positional")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 2**31),
        ("block_size", -(2**31) - 1),
        ("block_size", 1.5),
        ("block_size", "16"),
        ("block_size", True),
        ("block_size", None),
        ("kv_cache_bytes", 2**63),
        ("prefix_caching", 1),
        ("base", 3),
        ("base", b"bytes"),
    ],
)
def test_a_wrong_config_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"EngineConfig: {field} must be"):
        _C.EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("temperature", "hot"),
        ("temperature", True),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", [1]),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", 7),
        ("max_tokens", 2**40),
    ],
)
def test_a_wrong_sampling_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams: {field} must be"):
        _C.SamplingParams(**{field: value})


def test_errors_are_pythons_own_kinds(engine: _C.Engine) -> None:
    assert issubclass(_C.InvalidArgument, ValueError)
    assert issubclass(_C.NotFound, KeyError)
    sampling = _C.SamplingParams()
    with pytest.raises(_C.NotFound, match="nobody"):
        engine.submit(1, "nobody", [1], sampling)
    with pytest.raises(_C.InvalidArgument, match="prompt is empty"):
        engine.submit(1, "", [], sampling)
    with pytest.raises(_C.InvalidArgument, match="vocabulary"):
        engine.submit(1, "", [10**6], sampling)
    with pytest.raises(_C.InvalidArgument, match="temperature"):
        engine.submit(1, "", [1], _C.SamplingParams(temperature=math.nan))
    with pytest.raises(TypeError):
        engine.submit(1, "", [2**40], sampling)
    with pytest.raises(_C.InvalidArgument, match="/nowhere"):
        _C.Engine(_C.EngineConfig(base="/nowhere"))


def test_it_generates_and_says_what_it_is(engine: _C.Engine, base: Path) -> None:
    first = generate(engine, [5, 6, 7], max_tokens=12, ignore_eos=True)
    assert len(first) == 12
    assert first == generate(engine, [5, 6, 7], max_tokens=12, ignore_eos=True)
    assert all(0 <= token < engine.vocab_size() for token in first)
    assert engine.base_digest() == tiny.base_digest(tiny.load_file(base / "model.safetensors"))
    assert json.loads(engine.model_config_json())["hidden_size"] == 64
    assert engine.device_description().startswith("cpu")
    config = engine.config()
    assert config.base_name == "tiny-base"
    assert config.kv_dtype == config.dtype == "float32"
    assert (config.max_batch_sequences, config.max_variants_per_batch) == (64, 8)
    assert config.max_model_len == 512
    rows = {row.what: row.bytes for row in engine.capacity()}
    assert set(rows) == {"base weights", "scratch", "delta slots", "KV cache", "left"}
    assert sum(rows.values()) == config.memory_budget_bytes


def test_logprobs_cross_the_border(engine: _C.Engine) -> None:
    sampling = _C.SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=0)
    engine.submit(9, "", [5, 6, 7], sampling)
    events = finish(engine, 1)
    prompt = events[0].prompt_logprobs
    assert prompt[0] is None
    assert [entry.token for entry in prompt[1:] if entry is not None] == [6, 7]
    logprobs = [entry for event in events for entry in event.logprobs]
    assert [entry.token for entry in logprobs] == [t for e in events for t in e.tokens]
    for entry in logprobs:
        assert entry.rank == 1
        assert entry.top[0] == (entry.token, entry.logprob)
        assert entry.logprob < 0.0


def test_variants_come_and_go(engine: _C.Engine, delta: Path) -> None:
    info = engine.add_variant("red", str(delta))
    assert (info.name, info.parent, info.state) == ("red", "tiny-base", "disk")
    assert info.content_digest == json.loads(info.manifest_json)["content_digest"]
    assert [v.name for v in engine.variants()] == ["tiny-base", "red"]
    assert len(generate(engine, [5, 6], "red", max_tokens=4, ignore_eos=True)) == 4
    loaded = engine.variants()[1]
    assert (loaded.state, loaded.num_loads, loaded.num_output_tokens) == ("resident", 1, 4)
    assert loaded.load_seconds > 0.0
    with pytest.raises(_C.InvalidArgument, match="already there"):
        engine.add_variant("red", str(delta))
    with pytest.raises(_C.InvalidArgument, match="a variant's name"):
        engine.add_variant("../red", str(delta))
    engine.remove_variant("red")
    give_up = time.monotonic() + PATIENCE_S
    while engine.is_draining("red"):
        assert time.monotonic() < give_up
        time.sleep(0.001)
    with pytest.raises(_C.NotFound):
        engine.submit(2, "red", [1], _C.SamplingParams())


def test_a_waiting_poll_lets_python_run(engine: _C.Engine) -> None:
    polled: list[float] = []

    def wait() -> None:
        start = time.monotonic()
        assert engine.poll(timeout_ms=400) == []
        polled.append(time.monotonic() - start)

    thread = threading.Thread(target=wait)
    thread.start()
    num_turns = 0
    while thread.is_alive():
        num_turns += 1
        time.sleep(0.001)
    assert polled[0] >= 0.39
    assert num_turns > 20


def test_threads_share_an_engine(engine: _C.Engine, delta: Path) -> None:
    engine.add_variant("red", str(delta))

    def submit(first_id: int) -> None:
        for i in range(20):
            variant = "red" if i % 2 else ""
            engine.submit(first_id + i, variant, [5, 6, i], _C.SamplingParams(max_tokens=5))
            if i % 5 == 0:
                engine.cancel(first_id + i)

    threads = [threading.Thread(target=submit, args=(100 * t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    events = finish(engine, 160)
    for thread in threads:
        thread.join()
    ended = [event.request_id for event in events if event.finish is not _C.Finish.NONE]
    assert len(ended) == len(set(ended)) == 160
    stats = engine.stats()
    assert stats.num_requests == stats.num_finished + stats.num_cancelled == 160
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.is_alive


def test_after_shutdown_all_is_said(base: Path) -> None:
    engine = _C.Engine(make_config(base))
    engine.submit(1, "", [1], _C.SamplingParams(max_tokens=500, ignore_eos=True, n=2))
    engine.shutdown()
    finishes = {event.choice: event.finish for event in engine.poll()}
    assert finishes == {0: _C.Finish.CANCELLED, 1: _C.Finish.CANCELLED}
    assert engine.poll(timeout_ms=10_000) == []
    assert not engine.stats().is_alive
    with pytest.raises(_C.InternalError, match="shut down"):
        engine.submit(2, "", [1], _C.SamplingParams())


def test_an_engine_may_be_dropped_at_work(base: Path) -> None:
    for _ in range(3):
        engine = _C.Engine(make_config(base))
        engine.submit(1, "", [1], _C.SamplingParams(max_tokens=500, ignore_eos=True))
        del engine
