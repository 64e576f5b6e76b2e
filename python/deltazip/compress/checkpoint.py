"""Hugging Face model folders, read one tensor at a time.

The safetensors header is parsed here rather than by the safetensors package because the digest
needs the raw bytes of every dtype, and reading, not mapping, bounds resident memory to one tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_MAX_HEADER_BYTES = 100 << 20
_READ_BYTES = 1 << 22
WEIGHT_DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` is safetensors' name ("BF16"), `offset` counts from the file's
    start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file.

    Raises:
        CheckpointError: the file is truncated or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: header of {length} bytes does not fit a file of {size} bytes"
                )
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    start = 8 + length
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor '{name}' has a malformed entry") from error
        if dtype not in _ITEM_BYTES:
            raise CheckpointError(f"{path}: tensor '{name}' has unknown dtype {dtype}")
        want = math.prod(shape) * _ITEM_BYTES[dtype]
        if end - begin != want or begin < 0 or start + end > size:
            raise CheckpointError(
                f"{path}: tensor '{name}' {dtype} {list(shape)} needs {want} bytes, the header "
                f"gives {begin}..{end} of {size - start} (is the file truncated?)"
            )
        tensors[name] = TensorInfo(name, dtype, shape, path, start + begin, want)
    return tensors, metadata


def read_bytes(info: TensorInfo) -> bytearray:
    data = bytearray(info.num_bytes)
    with info.file.open("rb") as file:
        file.seek(info.offset)
        if file.readinto(data) != info.num_bytes:
            raise CheckpointError(f"{info.file}: tensor '{info.name}' is cut short")
    return data


def hash_bytes(info: TensorInfo) -> bytes:
    """SHA-256 of a tensor's bytes, read in pieces."""
    sha = hashlib.sha256()
    with info.file.open("rb") as file:
        file.seek(info.offset)
        left = info.num_bytes
        while left:
            piece = file.read(min(left, _READ_BYTES))
            if not piece:
                raise CheckpointError(f"{info.file}: tensor '{info.name}' is cut short")
            sha.update(piece)
            left -= len(piece)
    return sha.digest()


class Checkpoint:
    """A model folder: config.json and model.safetensors or its shards.

    Raises:
        CheckpointError: a file is missing or malformed, a shard leaves the folder, or the weights
            are quantised.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        config = self.folder / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{self.folder}: no config.json, is this a model folder?")
        try:
            self.config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{config}: not JSON: {error}") from error
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"].get("quant_method", "unknown")
            raise CheckpointError(
                f"{self.folder}: the checkpoint is quantised ({method}); expected bf16, fp16 or "
                "fp32 weights"
            )
        self.tensors: dict[str, TensorInfo] = {}
        for path in self._files():
            for name, info in read_header(path)[0].items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor '{name}' is in both {self.tensors[name].file} and {path}"
                    )
                self.tensors[name] = info

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            single = self.folder / "model.safetensors"
            if not single.is_file():
                raise CheckpointError(
                    f"{self.folder}: neither model.safetensors nor model.safetensors.index.json"
                )
            return [single]
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: no weight_map in it") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: shard name {name!r} leaves the folder")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{index}: shard {name} is missing")
        return [self.folder / name for name in names]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures") or ["unknown"]
        return str(names[0])

    @property
    def is_tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def weights_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def files_bytes(self) -> int:
        """Size of the weight files, headers included."""
        return sum(path.stat().st_size for path in {i.file for i in self.tensors.values()})

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its own dtype."""
        info = self.tensors[name]
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor '{name}' is {info.dtype}; expected one of BF16, F16, F32"
            )
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=WEIGHT_DTYPES[info.dtype])
        flat = torch.frombuffer(read_bytes(info), dtype=WEIGHT_DTYPES[info.dtype])
        return flat.reshape(info.shape)

    def digest(self) -> str:
        """`base_digest` of docs/delta_format.md: the identity of all the weights, hex."""
        sha = hashlib.sha256()
        infos = [self.tensors[name] for name in sorted(self.tensors, key=str.encode)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for info, content in zip(infos, pool.map(hash_bytes, infos), strict=True):
                shape = ",".join(str(n) for n in info.shape)
                sha.update(f"{info.name}\0{info.dtype}\0{shape}\0".encode() + content)
        return sha.hexdigest()
