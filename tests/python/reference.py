"""What transformers computes, and what DeltaZip's forward pass computes, for the same tokens."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import device
import numpy as np
import numpy.typing as npt
import torch
from deltazip.compress import delta_file
from deltazip.compress.checkpoint import Checkpoint
from deltazip.compress.delta_file import DeltaFile, Entry
from deltazip.compress.pack import DeltaType, QuantizedMatrix
from deltazip.compress.stored import Stored
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
    if not device.IS_CPU:
        settings["head_dim"] = device.HEAD_DIM
    model = LlamaForCausalLM(LlamaConfig(**(defaults | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            is_vector = parameter.dim() == 1
            scale = 0.3 if is_vector else 1.5 / parameter.shape[-1] ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + parameter.round() if is_vector else noise)  # norms: about 1
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def make_finetune(base: Path, folder: Path, *, seed: int, size: float = 0.2) -> None:
    """Writes a checkpoint beside `base` whose every tensor differs, by `size` of its spread."""
    model = load(base, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * size * (0.3 if parameter.dim() == 1 else parameter.std()))
    model.save_pretrained(folder)


def quantize(delta: FloatArray, type_: DeltaType, group_size: int) -> QuantizedMatrix:
    """Magnitude pruning and round to nearest: no compressor, but codes of every kind."""
    rows, columns = delta.shape
    width = -(-columns // group_size) * group_size
    padded = np.pad(delta, ((0, 0), (0, width - columns)))
    kept = None
    if type_.is_sparse:
        fours = padded.reshape(rows, -1, 4)
        count = 1 if type_ is DeltaType.SPARSE14_SIGN else 2
        places = np.argsort(-np.abs(fours), axis=2, kind="stable")[:, :, :2]
        places = np.sort(places[:, :, :count], axis=2)
        keep = np.zeros(fours.shape, bool)
        np.put_along_axis(keep, places, True, axis=2)
        padded = np.where(keep, fours, 0.0).reshape(rows, width)
        first, second = places[:, :, 0], places[:, :, -1]
        kept = (first * (5 - first) // 2 + second - 1).astype(np.uint8)  # the index into PAIRS
        mask = keep.reshape(rows, width)
    else:
        mask = np.ones(padded.shape, bool)
    grouped = padded.reshape(rows, -1, group_size)
    top = {
        DeltaType.SPARSE24_INT4: 7.0,
        DeltaType.SPARSE24_INT2: 3.0,
        DeltaType.SPARSE24_TERNARY: 1.5,
        DeltaType.SPARSE14_SIGN: 1.5,
        DeltaType.DENSE_INT4: 7.0,
        DeltaType.DENSE_INT8: 127.0,
    }[type_]
    scales = np.maximum(np.abs(grouped).max(axis=2) / top, 1e-6).astype(np.float16)
    steps = padded / np.repeat(scales.astype(np.float32), group_size, axis=1)
    if type_ in (DeltaType.SPARSE24_TERNARY, DeltaType.SPARSE14_SIGN):
        values = np.where(steps < 0, -1, 1)
    elif type_ is DeltaType.SPARSE24_INT2:
        values = np.clip(2 * np.round((steps - 1) / 2) + 1, -3, 3)
    else:
        values = np.clip(np.round(steps), -top - 1, top)
    whole = np.where(mask, values, 0).astype(np.int8)[:, :columns]
    if type_ in (DeltaType.SPARSE24_INT4, DeltaType.SPARSE24_INT2):
        assert kept is not None
        return QuantizedMatrix(type_, whole, scales, group_size, kept[:, : -(-columns // 4)])
    return QuantizedMatrix(type_, whole, scales, group_size)


def make_delta(base: Path, finetune: Path, out: Path, types: Sequence[DeltaType]) -> None:
    """Writes out/delta.safetensors; the matrices take the types in turn, vectors are replaced."""
    checkpoint, tuned = Checkpoint(base), Checkpoint(finetune)
    entries: dict[str, Entry] = {}
    stored: dict[str, Stored] = {}
    for index, name in enumerate(sorted(checkpoint.tensors)):
        ours, theirs = checkpoint.read(name).float(), tuned.read(name).float()
        shape = tuple(ours.shape)
        if len(shape) == 1:
            entries[name] = Entry(DeltaType.REPLACED, shape)
            stored[name] = Stored.of_tensor(theirs)
            continue
        type_ = types[index % len(types)]
        group_size = 64 if shape[1] > 64 else 32
        matrix = quantize((theirs - ours).numpy(), type_, group_size)
        entries[name] = Entry(type_, shape, group_size)
        stored |= delta_file.stored_of_matrix(name, matrix)
    out.mkdir(parents=True, exist_ok=True)
    delta_file.write_delta(
        out / delta_file.FILE_NAME,
        base_digest=checkpoint.digest(),
        entries=entries,
        stored=stored,
        base={"name": base.name},
        compressor={"version": "test", "settings": {}, "report": {}},
    )


def load_merged(base: Path, delta: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Base plus the dequantised delta, as one model of transformers."""
    model, file = load(base, torch.float32), DeltaFile(delta)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head comes once
            parameter.copy_(file.apply(name, parameter))
    return model.to(dtype)


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
    """The program built by tests/cpp/model: in PATH, or in the CMake tree DELTAZIP_BUILD_DIR."""
    tree = Path(os.environ.get("DELTAZIP_BUILD_DIR", ROOT / "build" / "dev"))
    installed = shutil.which("deltazip_logits")
    return Path(installed or tree / "tests" / "cpp" / "model" / "deltazip_logits")


def _run_tool(folder: Path, sequences: Sequence[Sequence[int]], *arguments: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out = Path(scratch, "tokens"), Path(scratch, "out")
        tokens.write_text("".join(" ".join(map(str, each)) + "\n" for each in sequences))
        command = [str(tool_path()), str(folder), "--tokens", str(tokens), "--out", str(out)]
        subprocess.run([*command, *device.ARGUMENTS, *arguments], check=True, timeout=600)
        return out.read_bytes()


def our_logits(
    folder: Path, sequences: Sequence[Sequence[int]], vocab_size: int, *arguments: str
) -> list[FloatArray]:
    """Per sequence [tokens, vocab_size] from DeltaZip; arguments as in logits_tool.cpp."""
    flat = np.frombuffer(_run_tool(folder, sequences, *arguments), np.float32)
    rows = flat.reshape(sum(map(len, sequences)), vocab_size)
    ends = np.cumsum([len(each) for each in sequences])
    return np.split(rows, ends[:-1])


def our_greedy(
    folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int, *arguments: str
) -> IntArray:
    """[prompts, num_tokens]: DeltaZip's likeliest tokens, all prompts in one batch."""
    out = _run_tool(folder, prompts, "--generate", str(num_tokens), *arguments)
    return np.frombuffer(out, np.int32).reshape(len(prompts), num_tokens)


def relative_error(got: FloatArray, expected: FloatArray) -> float:
    """Norm of the difference over the norm of what was expected."""
    assert got.shape == expected.shape
    difference = np.linalg.norm(got.astype(np.float64) - expected)
    return float(difference / np.linalg.norm(expected.astype(np.float64)))
