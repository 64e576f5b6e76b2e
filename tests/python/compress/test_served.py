"""What the compressor wrote, served by the core, against base + dequantised delta in transformers.

Over tiny models always; over real ones where DELTAZIP_TEST_MODELS is set. Real deltas are made here
from a few samples, or read from DELTAZIP_TEST_DELTAS: folders NAME-FORMAT, such as math-int4.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from deltazip.compress import calibration
from deltazip.compress.pipeline import compress
from deltazip.compress.plan import FORMATS, Settings
from greedy import check_greedy

from .conftest import make_pair

QUESTIONS = {
    "math": [
        "Nina has 40 marbles and gives 15 away. How many are left?",
        "A shelf holds 12 rows of 9 books, and 20 more lie on the floor. How many are there?",
        "Omar makes 6 candles every day for 7 days and sells 10. How many are left?",
        "A train travels 3 hours at 80 km per hour, then 55 km more. How far does it go?",
    ],
    "define": [
        "Define the word 'dodo'.",
        "Define the word 'cannelloni'.",
        "Define the word 'carve'.",
        "Define the word 'cooper'.",
    ],
}


@pytest.fixture(autouse=True)
def _needs_the_tool() -> None:
    if not reference.tool_path().exists():
        pytest.skip(f"{reference.tool_path()} is not built: ninja deltazip_logits")


def relative_error(base: Path, delta: Path, tokens: list[int]) -> float:
    """Of our logits, served from the delta, to those of the merged model."""
    model = reference.load_merged(base, delta, torch.float32)
    (got,) = reference.our_logits(base, [tokens], model.config.vocab_size, "--delta", str(delta))
    return reference.relative_error(got, reference.reference_logits(model, tokens))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_tiny_compressed_variant(format_: str, tied: bool, tmp_path: Path, samples: Path) -> None:
    base, tuned = make_pair(tmp_path, tie_word_embeddings=tied, attention_bias=True)
    settings = Settings(format=format_, group_size=32, num_samples=40)
    compress(base, tuned, tmp_path / "out", samples, settings)
    vocab_size = reference.load(base, torch.float32).config.vocab_size
    tokens = np.random.default_rng(3).integers(0, vocab_size, 90).tolist()
    assert relative_error(base, tmp_path / "out", tokens) <= 1e-4


@pytest.fixture(scope="session")
def real_delta(
    test_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """(name, format) -> a delta of that fine-tune, made once."""
    made: dict[tuple[str, str], Path] = {}

    def delta(name: str, format_: str) -> Path:
        given = os.environ.get("DELTAZIP_TEST_DELTAS")
        if given:
            return Path(given) / f"{name}-{format_}"
        if (name, format_) not in made:
            out = tmp_path_factory.mktemp(f"{name}-{format_}")
            text = out / "calibration.txt"
            text.write_text("\n\n".join(QUESTIONS[name] * 8))
            settings = Settings(format=format_, num_samples=4)
            compress(test_models / "base", test_models / name, out / "delta", text, settings)
            made[name, format_] = out / "delta"
        return made[name, format_]

    return delta


def prompts(folder: Path, name: str) -> list[list[int]]:
    tokenizer = calibration.load_tokenizer(folder)
    return [
        calibration.prompt_ids(
            tokenizer, calibration.Sample(({"role": "user", "content": question},), "")
        )
        for question in QUESTIONS[name]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["int4", "int2", "ternary", "sign"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_real_compressed_variant(
    name: str, format_: str, test_models: Path, real_delta: Callable[[str, str], Path]
) -> None:
    base, delta = test_models / "base", real_delta(name, format_)
    tokens = prompts(base, name)
    assert relative_error(base, delta, tokens[0]) <= 1e-4
    model = reference.load_merged(base, delta, torch.float32)
    check_greedy(base, model, tokens, "--delta", str(delta))
