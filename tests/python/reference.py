"""What transformers computes, and what DeltaZip's forward pass computes, for the same tokens."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

ROOT = Path(__file__).resolve().parents[2]


def make_checkpoint(folder: Path, *, seed: int, dtype: str = "float32", **settings: Any) -> None:
    """Writes a tiny random Llama, as transformers saves it, with biases and norms that matter.

    Args:
        folder: where config.json and model.safetensors go.
        seed: of all weights.
        dtype: of the stored weights.
        settings: any of LlamaConfig's, over the tiny defaults.
    """
    defaults: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**(defaults | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            is_vector = parameter.dim() == 1
            scale = 0.3 if is_vector else 1.5 / parameter.shape[-1] ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + parameter.round() if is_vector else noise)  # norms: about 1
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The folder's model in transformers, on the CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> FloatArray:
    """[tokens, vocab_size], one sequence, from one pass over all of it."""
    logits = model(torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0].float().numpy()


def tool_path() -> Path:
    """The program built by tests/cpp/model; DELTAZIP_BUILD_DIR names its CMake tree."""
    tree = Path(os.environ.get("DELTAZIP_BUILD_DIR", ROOT / "build" / "dev"))
    return tree / "tests" / "cpp" / "model" / "deltazip_logits"


def _run_tool(folder: Path, sequences: Sequence[Sequence[int]], *arguments: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out = Path(scratch, "tokens"), Path(scratch, "out")
        tokens.write_text("".join(" ".join(map(str, each)) + "\n" for each in sequences))
        command = [str(tool_path()), str(folder), "--tokens", str(tokens), "--out", str(out)]
        subprocess.run([*command, *arguments], check=True, timeout=600)
        return out.read_bytes()


def our_logits(
    folder: Path, sequences: Sequence[Sequence[int]], vocab_size: int, *arguments: str
) -> list[FloatArray]:
    """Per sequence [tokens, vocab_size] from DeltaZip; arguments as in logits_tool.cpp."""
    flat = np.frombuffer(_run_tool(folder, sequences, *arguments), np.float32)
    rows = flat.reshape(sum(map(len, sequences)), vocab_size)
    ends = np.cumsum([len(each) for each in sequences])
    return np.split(rows, ends[:-1])


def our_argmax(folder: Path, sequences: Sequence[Sequence[int]], *arguments: str) -> list[IntArray]:
    """Per sequence the likeliest next token after each position, [tokens], from DeltaZip."""
    flat = np.frombuffer(_run_tool(folder, sequences, "--argmax", *arguments), np.int32)
    ends = np.cumsum([len(each) for each in sequences])
    return np.split(flat, ends[:-1])


def relative_error(got: FloatArray, expected: FloatArray) -> float:
    """Norm of the difference over the norm of what was expected."""
    assert got.shape == expected.shape
    difference = np.linalg.norm(got.astype(np.float64) - expected)
    return float(difference / np.linalg.norm(expected.astype(np.float64)))
