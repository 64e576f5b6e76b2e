"""Fixtures of the server's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from deltazip.tokenizer import Tokenizer, load_tokenizer
from serving_support import tiny
from serving_support.fake_core import FakeEngine
from serving_support.live import Live, run_server


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base with its tokenizer and chat template."""
    return tiny.write_base(tmp_path_factory.mktemp("models") / "tiny-base")


@pytest.fixture(scope="session")
def tiny_deltas(tiny_base: Path) -> dict[str, Path]:
    """Two deltas of tiny_base: name -> folder."""
    return {
        name: tiny.write_delta(tiny_base.parent / name, tiny_base, seed=seed)
        for seed, name in enumerate(("red", "blue"), start=1)
    }


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base)


@pytest.fixture
def fake(tokenizer: Tokenizer) -> FakeEngine:
    """An engine that answers with the prompt's own tokens."""
    return FakeEngine(vocab_size=tokenizer.vocab_size)


@pytest.fixture
def live(fake: FakeEngine, tiny_base: Path) -> Iterator[Live]:
    """A server over the scripted engine, with small limits."""
    with run_server(
        fake,
        tiny_base,
        base_name="tiny",
        max_body_mib=0.25,
        max_n=4,
        max_prompts=4,
        max_choices=8,
        max_stops=4,
        max_stop_chars=32,
        max_logit_bias=8,
        max_logprobs=5,
        max_messages=16,
        max_header_kib=8,
    ) as server:
        yield server
