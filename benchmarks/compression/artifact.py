"""What a baseline stores: packed arrays in one safetensors file, and the matrices read from it.

The artifact that is counted is the artifact that is scored: compare.py builds the model it scores
from the file it has weighed. Places of kept weights are a bitmap, one bit a weight, which is also
what 2:4 metadata takes; below one in sixteen a list of 16-bit columns is smaller and is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from deltazip import _C
from deltazip.compress.checkpoint import read_header
from deltazip.compress.packed import CODECS
from deltazip.compress.stored import tensor_bytes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Arrays = dict[str, Tensor]


class Coded(Protocol):
    """A compressed matrix: how it is stored, and what it stands for."""

    def arrays(self) -> Arrays: ...
    def meta(self) -> dict[str, Any]: ...
    def dense(self) -> Tensor: ...


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2**bits, `bits` each, one after the other: [bytes] uint8."""
    flat = codes.reshape(-1).to(torch.uint8).cpu().numpy()
    places = np.arange(bits, dtype=np.uint8)
    spread = (flat[:, None] >> places) & 1
    return torch.from_numpy(np.packbits(spread.reshape(-1), bitorder="little"))


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack_bits: [count] uint8."""
    spread = np.unpackbits(data.numpy(), count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return torch.from_numpy((spread.reshape(count, bits) * weights).sum(axis=1, dtype=np.uint8))


@dataclasses.dataclass(frozen=True)
class Plain:
    """Numbers as they are: fp16 factors, norms, embeddings that are not compressed."""

    values: Tensor

    def arrays(self) -> Arrays:
        return {"values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"kind": "plain"}

    def dense(self) -> Tensor:
        return self.values.float()


@dataclasses.dataclass(frozen=True)
class Codes:
    """(step * code - zero) * scale, times `columns` where given; weights not in `kept` are zero.

    Attributes:
        codes: [rows, columns] uint8, below 2**bits.
        scales: [rows or 1, groups]; a group is ceil(columns / groups) neighbouring columns.
        zeros: as scales, uint8 below 2**bits; None: `zero` everywhere.
        kept: [rows, columns] bool; codes of other weights are not stored.
        columns: [columns], a factor for each column.
    """

    codes: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor | None = None
    zero: int = 0
    step: int = 1
    kept: Tensor | None = None
    columns: Tensor | None = None

    def arrays(self) -> Arrays:
        stored = self.codes if self.kept is None else self.codes[self.kept]
        out = {"codes": pack_bits(stored, self.bits), "scales": self.scales}
        if self.zeros is not None:
            out["zeros"] = pack_bits(self.zeros, self.bits)
        if self.kept is not None:
            out["kept"] = pack_bits(self.kept, 1)
        if self.columns is not None:
            out["columns"] = self.columns
        return out

    def meta(self) -> dict[str, Any]:
        facts = {"bits": self.bits, "zero": self.zero, "step": self.step}
        return {"kind": "codes", "shape": list(self.codes.shape), **facts}

    def dense(self) -> Tensor:
        columns = self.codes.shape[1]

        def spread(values: Tensor) -> Tensor:
            group = -(-columns // values.shape[1])
            return values.float().repeat_interleave(group, dim=1)[:, :columns]

        zeros: Tensor | int = self.zero if self.zeros is None else spread(self.zeros)
        values = (self.step * self.codes.float() - zeros) * spread(self.scales)
        if self.columns is not None:
            values *= self.columns.float()
        return values if self.kept is None else values * self.kept

    def split(self, heights: Sequence[int]) -> list[Codes]:
        """The same by runs of rows; `columns` goes with each."""
        ends = list(itertools.accumulate(heights))
        runs = [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]
        return [
            dataclasses.replace(
                self,
                codes=self.codes[run],
                scales=self.scales[run],
                zeros=None if self.zeros is None else self.zeros[run],
                kept=None if self.kept is None else self.kept[run],
            )
            for run in runs
        ]

    @classmethod
    def read(cls, arrays: Arrays, meta: Mapping[str, Any]) -> Codes:
        rows, columns = meta["shape"]
        bits, scales, kept, zeros = meta["bits"], arrays["scales"], None, None
        if "kept" in arrays:
            kept = unpack_bits(arrays["kept"], 1, rows * columns).reshape(rows, columns).bool()
        count = rows * columns if kept is None else int(kept.sum())
        codes = unpack_bits(arrays["codes"], bits, count)
        if kept is not None:
            codes = torch.zeros((rows, columns), dtype=torch.uint8).masked_scatter_(kept, codes)
        if "zeros" in arrays:
            zeros = unpack_bits(arrays["zeros"], bits, scales.numel()).reshape(scales.shape)
        codes = codes.reshape(rows, columns)
        return cls(
            codes, bits, scales, zeros, meta["zero"], meta["step"], kept, arrays.get("columns")
        )


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Some weights in fp16, the others zero.

    Attributes:
        values: [rows, columns] float16, zero where not kept.
        kept: [rows, columns] bool.
    """

    values: Tensor
    kept: Tensor

    def arrays(self) -> Arrays:
        out = {"values": self.values[self.kept]}
        if 16 * len(out["values"]) >= self.kept.numel():
            return out | {"kept": pack_bits(self.kept, 1)}
        places = self.kept.nonzero()[:, 1].to(torch.int32)
        counts = self.kept.sum(dim=1, dtype=torch.int32)
        return out | {"places": places.to(torch.uint16), "counts": counts.to(torch.uint16)}

    def meta(self) -> dict[str, Any]:
        return {"kind": "sparse", "shape": list(self.values.shape)}

    def dense(self) -> Tensor:
        return self.values.float()

    @classmethod
    def read(cls, arrays: Arrays, meta: Mapping[str, Any]) -> Sparse:
        rows, columns = meta["shape"]
        kept = torch.zeros((rows, columns), dtype=torch.bool)
        if "kept" in arrays:
            kept = unpack_bits(arrays["kept"], 1, rows * columns).reshape(rows, columns).bool()
        else:
            row = torch.arange(rows).repeat_interleave(arrays["counts"].to(torch.int64))
            kept[row, arrays["places"].to(torch.int64)] = True
        values = torch.zeros((rows, columns), dtype=torch.float16)
        return cls(values.masked_scatter_(kept, arrays["values"]), kept)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A sum of products left^T right, each [rank, rows] and [rank, columns]."""

    parts: tuple[tuple[Plain | Codes, Plain | Codes], ...]

    def _named(self) -> Iterator[tuple[str, Plain | Codes]]:
        for number, pair in enumerate(self.parts):
            yield from zip((f"left{number}", f"right{number}"), pair, strict=True)

    def arrays(self) -> Arrays:
        return {f"{n}.{key}": a for n, part in self._named() for key, a in part.arrays().items()}

    def meta(self) -> dict[str, Any]:
        return {"kind": "low_rank", "parts": {name: part.meta() for name, part in self._named()}}

    def dense(self) -> Tensor:
        products = [left.dense().mT @ right.dense() for left, right in self.parts]
        return torch.stack(products).sum(dim=0)

    @classmethod
    def read(cls, arrays: Arrays, meta: Mapping[str, Any]) -> LowRank:
        factors: list[Any] = []
        for name, facts in meta["parts"].items():
            own = {
                k.removeprefix(f"{name}."): a for k, a in arrays.items() if k.startswith(f"{name}.")
            }
            factors.append(read_coded(own, facts))
        return cls(tuple(zip(factors[::2], factors[1::2], strict=True)))


def read_coded(arrays: Arrays, meta: Mapping[str, Any]) -> Coded:
    kinds: dict[str, Any] = {"codes": Codes, "sparse": Sparse, "low_rank": LowRank}
    if meta["kind"] == "plain":
        return Plain(arrays["values"])
    coded: Coded = kinds[meta["kind"]].read(arrays, meta)
    return coded


def write_artifact(
    path: Path, coded: Mapping[str, Coded], on_delta: Mapping[str, bool]
) -> tuple[dict[str, int], int]:
    """Writes all matrices into one file.

    Returns bytes of each matrix's arrays, and what deltazip's lossless stage would take off the
    file: deltas on the disk have gone through it, so the artifacts beside them are credited too.

    on_delta: whether a matrix is added to the base's or takes its place. A tensor of the base that
    is in neither is unchanged.
    """
    # Copies: safetensors refuses tensors that share memory, as parts of one sweep do.
    arrays = {
        name: {key: array.cpu().clone().contiguous() for key, array in part.arrays().items()}
        for name, part in coded.items()
    }
    facts = {n: c.meta() | {"on_delta": on_delta[n]} for n, c in coded.items()}
    flat = {f"{name}|{key}": array for name, part in arrays.items() for key, array in part.items()}
    save_file(flat, path, {"matrices": json.dumps(facts, separators=(",", ":"))})
    num_bytes = {
        name: sum(array.numel() * array.element_size() for array in part.values())
        for name, part in arrays.items()
    }
    codec = _C.StreamCodec(CODECS[0])
    streams = ((a, len(codec.encode(tensor_bytes(a), a.element_size()))) for a in flat.values())
    saved = sum(max(0, a.numel() * a.element_size() - size) for a, size in streams)
    return num_bytes, saved


class Artifact:
    """A file of write_artifact, read one matrix at a time."""

    def __init__(self, path: Path) -> None:
        infos, metadata = read_header(path)
        self.path, self._keys = path, list(infos)
        self.matrices: dict[str, Any] = json.loads(metadata["matrices"])

    def apply(self, name: str, base: Tensor) -> Tensor:
        """The variant's tensor in float32."""
        facts = self.matrices.get(name)
        if facts is None:
            return base.float()
        prefix = f"{name}|"
        with safe_open(str(self.path), framework="pt") as file:
            arrays = {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in self._keys
                if key.startswith(prefix)
            }
        dense = read_coded(arrays, facts).dense().reshape(base.shape)
        return base.float() + dense if facts["on_delta"] else dense
