"""Base + delta, put together again: as a Hugging Face folder, or tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from deltazip.compress import llama
from deltazip.compress.checkpoint import WEIGHT_DTYPES, Checkpoint
from deltazip.compress.delta_file import DeltaFile, DeltaFileError
from deltazip.compress.pipeline import TOKENIZER_FILES
from deltazip.compress.stored import (
    Stored,
    atomic_file,
    dtype_name,
    tensor_bytes,
    write_safetensors,
)

_COMPANIONS = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "vocab.json",
               "merges.txt", "tokenizer.jinja")  # fmt: skip


def open_pair(base: Path, delta: Path) -> tuple[Checkpoint, DeltaFile]:
    """A base and a delta that was made from it.

    Raises:
        DeltaFileError: the delta belongs to another base, or covers other tensors.
    """
    checkpoint, file = Checkpoint(base), DeltaFile(delta)
    digest = checkpoint.digest()
    if file.base_digest != digest:
        raise DeltaFileError(
            f"{file.path}: made from the base with digest {file.base_digest[:16]}..., "
            f"{base} has {digest[:16]}..."
        )
    wanted = set(checkpoint.tensors) - ({llama.HEAD} if checkpoint.is_tied else set())
    odd = sorted(wanted ^ set(file.entries))
    if odd:
        where = "missing" if odd[0] in wanted else "not in the base"
        raise DeltaFileError(f"{file.path}: tensor '{odd[0]}' is {where}")
    return checkpoint, file


def merged_tensors(
    base: Checkpoint, delta: DeltaFile | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the variant, one at a time.

    Args:
        delta: None is the base itself.
        dtype: of all tensors; None is the base's own dtype of each.
    """
    for name in sorted(base.tensors):
        tensor = base.read(name)
        want = dtype or tensor.dtype
        is_tied_head = base.is_tied and name == llama.HEAD
        if delta is not None and not is_tied_head:
            tensor = delta.apply(name, tensor)
        yield name, tensor.to(want)


def export(
    base: Path,
    delta: Path,
    out: Path,
    *,
    dtype: str = "base",
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Path:
    """Writes the variant as a Hugging Face folder and returns the path of its weights.

    Args:
        dtype: "base" keeps each tensor in the base's dtype, rounding once; or bf16, fp16, fp32.

    Raises:
        ValueError: the output is there already, or the dtype is unknown.
        DeltaFileError, CheckpointError: base and delta do not fit.
    """
    target = out / "model.safetensors"
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already; remove it or pass --overwrite")
    dtypes = {"base": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got '{dtype}'")
    checkpoint, file = open_pair(base, delta)
    file.verify()
    want = dtypes[dtype]
    out.mkdir(parents=True, exist_ok=True)
    names = [n for n in checkpoint.tensors if not (checkpoint.is_tied and n == llama.HEAD)]
    stored = {}
    for number, name in enumerate(sorted(names)):
        info = checkpoint.tensors[name]
        tensor_dtype = want or WEIGHT_DTYPES[info.dtype]

        def load(
            name: str = name, share: float = number / len(names), to: torch.dtype = tensor_dtype
        ) -> memoryview:
            progress(name, share)
            return tensor_bytes(file.apply(name, checkpoint.read(name)).to(to))

        stored[name] = Stored(dtype_name(tensor_dtype), info.shape, load)
    copy_companions(base, delta, out)
    config = dict(checkpoint.config)
    if want is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(want).removeprefix("torch.")
    with atomic_file(out / "config.json") as handle:
        handle.write(json.dumps(config, indent=2).encode())
    write_safetensors(target, stored, {"format": "pt"})
    return target


def copy_companions(base: Path, delta: Path, out: Path) -> None:
    """Tokenizer and generation settings: the delta's own, else the base's."""
    own = delta if delta.is_dir() else delta.parent
    for name in _COMPANIONS:
        source = next((f / name for f in (own, base) if (f / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, out / name)
