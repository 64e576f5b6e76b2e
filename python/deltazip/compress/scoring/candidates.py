"""What can be scored: a delta folder, or a whole model that says how many bytes it stands for.

A whole model that was compressed and written out again is as large as the fine-tune. `size.json`
beside its weights states what it would take as an artifact; without one its weight files count.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from deltazip.compress import llama
from deltazip.compress.checkpoint import Checkpoint, TensorInfo
from deltazip.compress.delta_file import FILE_NAME, DeltaFile
from deltazip.compress.scoring.closeness import load_model

SIZE_FILE = "size.json"
_LINEAR = re.compile(
    r"model\.layers\.\d+\.(" + "|".join(re.escape(name) for name in llama.LINEARS) + r")\.weight"
)


class CandidateError(ValueError):
    """A folder that cannot be scored; the message names it and what was expected."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Where an artifact's bytes are.

    Attributes:
        total_bytes: everything in the folder: embeddings, norms, scales, headers, tokenizer.
        plain_bytes: the same without the lossless stage: what is served.
        linear_bytes: of the decoder layers' linear weights: codes, places, scales, as served.
        num_linear_weights: of the model, whether they moved or not.
    """

    total_bytes: int
    plain_bytes: int
    linear_bytes: int
    num_linear_weights: int

    @property
    def linear_bits(self) -> float:
        """Bits of a weight of a linear layer."""
        return 8.0 * self.linear_bytes / self.num_linear_weights


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A folder to be scored: `is_delta`, or a whole model."""

    name: str
    path: Path
    is_delta: bool
    sizes: Sizes

    def load(self, base: Path, *, device: str = "cpu") -> Any:
        """As a transformers model in float32."""
        if self.is_delta:
            return load_model(base, self.path, device=device)
        return load_model(self.path, None, device=device)


def is_linear(name: str) -> bool:
    """Whether a tensor is a weight of one of the decoder layers' linear layers."""
    return _LINEAR.fullmatch(name) is not None


def find_candidate(path: Path, name: str = "") -> Candidate:
    """What lies in a folder, or in a lone delta file, and its sizes.

    Raises:
        CandidateError: neither a delta nor a model is there, or size.json contradicts itself.
        DeltaFileError, CheckpointError: what is there is malformed.
    """
    name = name or path.name
    if path.is_file() or (path / FILE_NAME).is_file():
        return Candidate(name, path, True, _delta_sizes(path))
    if not (path / "config.json").is_file():
        raise CandidateError(f"{path}: expected {FILE_NAME} or a model folder with config.json")
    return Candidate(name, path, False, _whole_sizes(path))


def _delta_sizes(path: Path) -> Sizes:
    file = DeltaFile(path)
    linears = [name for name in file.entries if is_linear(name)]
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    total = sum(f.stat().st_size for f in files)
    saved = sum(file.decoded_bytes(name) - file.stored_bytes(name) for name in file.entries)
    return Sizes(
        total,
        total + saved,
        sum(file.decoded_bytes(name) for name in linears),
        sum(file.entries[name].shape[0] * file.entries[name].shape[1] for name in linears),
    )


def _whole_sizes(path: Path) -> Sizes:
    checkpoint = Checkpoint(path)
    linears: list[TensorInfo] = [i for n, i in checkpoint.tensors.items() if is_linear(n)]
    num_weights = sum(info.shape[0] * info.shape[1] for info in linears)
    declared = path / SIZE_FILE
    if not declared.is_file():
        own = checkpoint.files_bytes
        return Sizes(own, own, sum(info.num_bytes for info in linears), num_weights)
    try:
        content = json.loads(declared.read_text(encoding="utf-8"))
        total, linear = int(content["total_bytes"]), int(content["linear_bytes"])
        plain = int(content.get("plain_bytes", total))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CandidateError(
            f"{declared}: expected total_bytes and linear_bytes, got {error!r}"
        ) from error
    if total < 0 or not 0 <= linear <= plain:
        raise CandidateError(
            f"{declared}: linear_bytes is {linear}, expected 0 to all bytes, {plain}"
        )
    return Sizes(total, plain, linear, num_weights)
