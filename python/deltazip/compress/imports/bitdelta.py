"""A BitDelta artifact, read as the checkpoint that it makes of its base."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from deltazip.compress import llama
from deltazip.compress.checkpoint import (
    WEIGHT_DTYPES,
    CheckpointError,
    TensorInfo,
    read_bytes,
    read_header,
)
from deltazip.compress.imports.derived import DerivedCheckpoint, read_tensor
from deltazip.compress.pack import DeltaType, QuantizedMatrix

_GROUP_SIZE = 64


class BitDeltaCheckpoint(DerivedCheckpoint):
    """A BitDelta artifact over its base: a sign for each weight of a linear, one scale for all.

    `NAME.mask` is int32 [in / 32, out], bit i of word k the sign of input 32 k + i (1 is plus),
    `NAME.coeff` a number, and other weights stand as they are. BitDelta saves this dictionary by
    torch.save; it is read here as a safetensors file, since a pickle may run code.
    Source: Liu et al., BitDelta (2024), section 3, and the layout of its published code's files.

    Raises:
        CheckpointError: the file is not such a dictionary, or does not fit the base.
    """

    def __init__(self, base: Path, file: Path) -> None:
        if file.suffix in (".pt", ".pth", ".bin"):
            raise CheckpointError(
                f"{file}: a pickle may run code and is not read; where you trust it, make it a "
                "safetensors file: safetensors.torch.save_file({k: v.contiguous() for k, v in "
                "torch.load(FILE, weights_only=True).items()}, OUT)"
            )
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        super().__init__(base, file, [file])
        self.signs: dict[str, tuple[TensorInfo, float]] = {}
        self.whole: dict[str, TensorInfo] = {}
        infos, _ = read_header(file)
        for key, info in infos.items():
            if key.endswith(".mask"):
                self._claim_signs(key, info, infos.get(f"{key[:-5]}.coeff"))
            elif not key.endswith(".coeff"):
                self._claim_whole(key, info)
        if not self.signs:
            raise CheckpointError(f"{file}: no '.mask' in it, is this a BitDelta file?")

    def _claim_signs(self, key: str, mask: TensorInfo, coeff: TensorInfo | None) -> None:
        name = key.removesuffix(".mask") + ".weight"
        if name not in self.tensors or len(self.tensors[name].shape) != 2:
            raise CheckpointError(f"{self.source}: '{key}' is for a linear the base does not have")
        rows, columns = self.tensors[name].shape
        if mask.dtype != "I32" or mask.shape != (columns // 32, rows) or columns % 32:
            raise CheckpointError(
                f"{self.source}: '{key}' is {mask.dtype} {list(mask.shape)}, expected I32 "
                f"{[columns // 32, rows]}"
            )
        value = math.nan
        if coeff is not None and coeff.dtype in WEIGHT_DTYPES and math.prod(coeff.shape) == 1:
            value = float(read_tensor(coeff))
        if not math.isfinite(value):
            raise CheckpointError(f"{self.source}: '{key[:-5]}.coeff' must be one finite number")
        self.signs[name] = (mask, value)

    def _claim_whole(self, name: str, info: TensorInfo) -> None:
        if name == llama.HEAD and self.is_tied:
            return  # the tied tensor may stand under both names
        want = self.tensors[name].shape if name in self.tensors else None
        if want != info.shape or info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{self.source}: '{name}' is {info.dtype} {list(info.shape)}, the base "
                + ("does not have it" if want is None else f"has {list(want)}")
            )
        self.whole[name] = info

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Signs and one scale are a dense matrix of 4 bits, exactly (the scale as fp16 has it)."""
        if name not in self.signs:
            return None
        mask, coeff = self.signs[name]
        words = np.frombuffer(read_bytes(mask), "<i4").reshape(mask.shape)
        bits = np.ascontiguousarray(words.T).view(np.uint8)  # [out, in / 8], low bits first
        values = np.unpackbits(bits, axis=1, bitorder="little").astype(np.int8) * np.int8(2)
        values -= np.int8(1)
        if coeff < 0:
            values = -values
        groups = -(-values.shape[1] // _GROUP_SIZE)
        scales = np.full((values.shape[0], groups), abs(coeff), np.float16)
        return QuantizedMatrix(DeltaType.DENSE_INT4, values, scales, _GROUP_SIZE)

    def read(self, name: str) -> torch.Tensor:
        if name in self.whole:
            return read_tensor(self.whole[name])
        matrix = self.quantized(name)
        before = super().read(name)
        return before if matrix is None else before.float() + torch.from_numpy(matrix.dequantize())
