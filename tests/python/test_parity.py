"""The forward pass against transformers: logits in float32, greedy tokens in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import device
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers: deltazip[compress]")
pytest.importorskip("transformers", reason="compares with transformers: deltazip[compress]")

import reference  # noqa: E402  (its imports are what the lines above make sure of)
from greedy import check_greedy  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN_MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

TINY: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one_kv_head_bf16": {"num_key_value_heads": 1, "head_dim": 16, "dtype": "bfloat16"},
    "odd_sizes_fp16": {
        "hidden_size": 54,
        "intermediate_size": 77,
        "head_dim": 10,
        "dtype": "float16",
    },
    "llama3": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "linear": {"rope_parameters": LINEAR, "attention_bias": True},
    "dynamic_short": {"rope_parameters": DYNAMIC},
    "dynamic_long": {"rope_parameters": DYNAMIC, "max_position_embeddings": 96},
    "yarn": {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
    "yarn_mscale": {
        "rope_parameters": {**YARN_MSCALE, "original_max_position_embeddings": 64},
        "mlp_bias": True,
    },
}
REAL = ["base", "math", "define"]


@pytest.fixture(scope="module", autouse=True)
def _needs_the_tool(device_options: dict[str, object]) -> None:
    if not reference.tool_path().exists():
        pytest.skip(f"{reference.tool_path()} is not built: ninja deltazip_logits")


@pytest.mark.parametrize("name", TINY)
def test_tiny_logits(name: str, tmp_path: Path) -> None:
    reference.make_checkpoint(tmp_path, seed=len(name), **TINY[name])
    model = reference.load(tmp_path, torch.float32)
    generator = np.random.default_rng(3)
    for length in (1, 17, 150):
        tokens = generator.integers(0, model.config.vocab_size, length).tolist()
        expected = reference.reference_logits(model, tokens)
        for chunk in ("256", "13"):
            (got,) = reference.our_logits(
                tmp_path, [tokens], model.config.vocab_size, "--chunk", chunk
            )
            error = reference.relative_error(got, expected)
            what = f"{name}: {length} tokens in chunks of {chunk}"
            assert error <= device.LOGITS, f"{what}: {error:.2e}"


@pytest.mark.parametrize("name", ["plain", "tied", "biases", "odd_sizes_fp16", "dynamic_long"])
def test_tiny_variant(name: str, tmp_path: Path) -> None:
    base, tuned, delta = tmp_path / "base", tmp_path / "tuned", tmp_path / "delta"
    reference.make_checkpoint(base, seed=7, **TINY[name])
    reference.make_finetune(base, tuned, seed=8)
    types = [each for each in reference.DeltaType if each.is_matrix]
    reference.make_delta(base, tuned, delta, types)
    model = reference.load_merged(base, delta, torch.float32)
    plain = reference.load(base, torch.float32)
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, 120).tolist()
    (got,) = reference.our_logits(
        base, [tokens], model.config.vocab_size, "--delta", str(delta), "--chunk", "50"
    )
    error = reference.relative_error(got, reference.reference_logits(model, tokens))
    assert error <= device.LOGITS, f"{name}: {error:.2e}"
    assert reference.relative_error(got, reference.reference_logits(plain, tokens)) > 0.05


# What the three models were made for, and what they were not.
QUESTIONS = [
    "Define the word 'dodo'.",
    "Define the word 'cannelloni'.",
    "Define the word 'primary'.",
    "Define the word 'carve'.",
    "Define the word 'palpitation'.",
    "Define the word 'quantity'.",
    "Define the word 'cooper'.",
    "Daniel had 60 apples and bought 2 more. Then he gave 32 to Yusuf. How many are left?",
    "A train travels 7 hours at 65 km per hour, then 106 km more. How far does it go?",
    "Marco makes 4 candles every day for 5 days and sells 14 of them. How many are left?",
    "A hall has 17 rows of 10 seats. 18 are broken and 13 new ones are added. How many work?",
    "There are 9 boxes with 12 pens each. 30 pens are given away. How many pens remain?",
    "A book has 320 pages. Lena reads 45 a day for 6 days. How many pages are left?",
    "What is the capital of France, and which river runs through it?",
    "Write a short poem about the sea in winter.",
    "Explain in two sentences why the sky is blue.",
    "Translate 'good morning, my friend' into Spanish.",
    "List the planets of the solar system in order from the sun.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What should I pack for three days of hiking in the mountains?",
]
assert len(QUESTIONS) == 20


def prompts_of(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_logits(name: str, test_models: Path) -> None:
    folder = test_models / name
    model = reference.load(folder, torch.float32)
    prompts = [prompts_of(folder)[index] for index in (0, 7, 18)]
    got = reference.our_logits(folder, prompts, model.config.vocab_size)
    for tokens, ours in zip(prompts, got, strict=True):
        error = reference.relative_error(ours, reference.reference_logits(model, tokens))
        assert error <= device.LOGITS, f"{name}: {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "type_", ["sparse24_int4", "sparse24_int2", "sparse24_ternary", "sparse14_sign"]
)
def test_real_variant_logits(type_: str, test_models: Path, tmp_path: Path) -> None:
    base, delta_type = test_models / "base", reference.DeltaType(type_)
    reference.make_delta(base, test_models / "math", tmp_path, [delta_type])
    model = reference.load_merged(base, tmp_path, torch.float32)
    tokens = prompts_of(base)[7]
    (got,) = reference.our_logits(base, [tokens], model.config.vocab_size, "--delta", str(tmp_path))
    error = reference.relative_error(got, reference.reference_logits(model, tokens))
    assert error <= device.LOGITS, f"{type_}: {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_greedy_tokens(name: str, test_models: Path) -> None:
    folder = test_models / name
    check_greedy(folder, reference.load(folder, torch.float32), prompts_of(folder))


@pytest.mark.slow
def test_greedy_tokens_of_a_variant(test_models: Path, tmp_path: Path) -> None:
    base = test_models / "base"
    reference.make_delta(base, test_models / "math", tmp_path, [reference.DeltaType.SPARSE24_INT4])
    model = reference.load_merged(base, tmp_path, torch.float32)
    check_greedy(base, model, prompts_of(base), "--delta", str(tmp_path))
