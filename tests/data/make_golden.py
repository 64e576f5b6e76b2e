"""Makes golden_delta.safetensors and golden_expected.safetensors: python tests/data/make_golden.py

A small delta file with every type, and what each of its matrices means as float32. Written from
docs/delta_format.md alone, with loops and integers instead of the package's own packing, so that
writer and reader are both held against something that shares no code with them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).parent
Array = npt.NDArray[Any]
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
DTYPES = {"uint8": "U8", "float16": "F16", "float32": "F32", "uint16": "BF16"}

# name -> type, rows, columns, group_size. Columns that are no multiple of 4, 32 or the group too.
MATRICES = {
    "model.embed_tokens.weight": ("dense_int4", 7, 70, 64),
    "model.layers.0.self_attn.q_proj.weight": ("sparse24_int4", 6, 96, 32),
    "model.layers.0.mlp.up_proj.weight": ("sparse24_int2", 5, 70, 64),
    "model.layers.1.self_attn.q_proj.weight": ("sparse24_ternary", 9, 130, 64),
    "model.layers.1.mlp.up_proj.weight": ("dense_int8", 3, 33, 32),
    "model.layers.1.mlp.down_proj.weight": ("sparse24_int4", 2, 30, 64),
    "model.layers.1.mlp.gate_proj.weight": ("sparse14_sign", 5, 70, 32),
}
REPLACED = {
    "model.layers.0.input_layernorm.weight": "bfloat16",
    "model.layers.1.input_layernorm.weight": "float16",
    "model.norm.weight": "float32",
}
UNCHANGED = {"lm_head.weight": [7, 70]}


def pack_bits(codes: list[int], bits: int) -> bytes:
    """Codes of `bits` bits each, the first in the lowest bits, little-endian."""
    number = 0
    for i, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        number |= code << (bits * i)
    assert len(codes) * bits % 8 == 0
    return number.to_bytes(len(codes) * bits // 8, "little")


def make_row(
    rng: np.random.Generator, kind: str, columns: int
) -> tuple[dict[str, bytes], list[int]]:
    """One row's stored bytes by suffix, and the integer value of each column."""
    padded = (columns + 31) // 32 * 32
    if kind == "dense_int4":
        codes = rng.integers(0, 16, padded).tolist()
        return {"values": pack_bits(codes, 4)}, [c - 8 for c in codes[:columns]]
    if kind == "dense_int8":
        codes = rng.integers(0, 256, padded).tolist()
        return {"values": pack_bits(codes, 8)}, [c - 128 for c in codes[:columns]]
    values = [0] * padded
    indices, codes = [], []
    for group in range(padded // 4):
        if kind == "sparse14_sign":
            code = int(rng.integers(0, 8))
            codes.append(code)
            values[4 * group + code // 2] = 1 if code % 2 == 0 else -1
            continue
        if kind == "sparse24_ternary":
            code = int(rng.integers(0, 32))
            codes.append(code)
            if code < 8:
                values[4 * group + code // 2] = 1 if code % 2 == 0 else -1
            else:
                d = code - 8
                first, second = PAIRS[d // 4]
                values[4 * group + first] = -1 if d & 1 else 1
                values[4 * group + second] = -1 if d & 2 else 1
            continue
        is_padding = 4 * group >= columns
        first, second = (0, 1) if is_padding else PAIRS[rng.integers(0, 6)]
        indices.append(first | second << 2)
        levels = 16 if kind == "sparse24_int4" else 4
        pair = rng.integers(0, levels, 2).tolist()
        codes += pair
        for place, code in zip((first, second), pair, strict=True):
            values[4 * group + place] = code - 8 if levels == 16 else 2 * code - 3
    if kind in ("sparse24_ternary", "sparse14_sign"):
        return {"codes": pack_bits(codes, 5 if kind == "sparse24_ternary" else 3)}, values[:columns]
    bits = 4 if kind == "sparse24_int4" else 2
    return {"values": pack_bits(codes, bits), "indices": pack_bits(indices, 4)}, values[:columns]


def write(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    """Plain safetensors; widest elements first, so that each is aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name in order:
        raw = tensors[name].tobytes()
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main() -> None:
    rng = np.random.default_rng(20250101)
    stored: dict[str, Array] = {}
    expected: dict[str, Array] = {}
    manifest_tensors: dict[str, dict[str, Any]] = {}
    for name, (kind, rows, columns, group_size) in MATRICES.items():
        num_groups = -(-columns // group_size)
        scales = (rng.standard_normal((rows, num_groups)) * 0.01).astype(np.float16)
        parts: dict[str, list[bytes]] = {}
        weights = np.zeros((rows, columns), np.float32)
        for row in range(rows):
            packed, values = make_row(rng, kind, columns)
            for suffix, raw in packed.items():
                parts.setdefault(suffix, []).append(raw)
            for column, value in enumerate(values):
                weights[row, column] = np.float32(scales[row, column // group_size]) * value
        for suffix, raw_rows in parts.items():
            flat = np.frombuffer(b"".join(raw_rows), np.uint8)
            stored[f"{name}.{suffix}"] = flat.reshape(rows, -1)
        stored[f"{name}.scales"] = scales
        expected[name] = weights
        manifest_tensors[name] = {
            "type": kind, "shape": [rows, columns], "group_size": group_size,
        }  # fmt: skip
    for name, kind in REPLACED.items():
        exact = (1 + rng.standard_normal(12)).astype(np.float32)
        if kind == "bfloat16":  # the upper half of a float32
            bits = exact.view(np.uint32) >> 16
            stored[name] = bits.astype(np.uint16)
            expected[name] = (bits << 16).astype(np.uint32).view(np.float32)
        else:
            stored[name] = exact.astype(kind)
            expected[name] = stored[name].astype(np.float32)
        manifest_tensors[name] = {"type": "replaced", "shape": [12]}
    for name, shape in UNCHANGED.items():
        manifest_tensors[name] = {"type": "unchanged", "shape": shape}

    base_digest = hashlib.sha256(b"the golden base").hexdigest()
    content = hashlib.sha256(b"deltazip.delta.v1\0" + base_digest.encode() + b"\0")
    for name in sorted(manifest_tensors):
        entry = manifest_tensors[name]
        sizes = ",".join(map(str, entry["shape"]))
        fields = (name, entry["type"], sizes, str(entry.get("group_size", 0)))
        content.update("".join(field + "\0" for field in fields).encode())
    for name in sorted(stored):
        content.update(f"{name}\0{DTYPES[stored[name].dtype.name]}\0".encode())
        content.update(hashlib.sha256(stored[name].tobytes()).digest())
    manifest = {
        "version": 1,
        "base_digest": base_digest,
        "content_digest": content.hexdigest(),
        "tensors": manifest_tensors,
        "base": {"name": "golden"},
        "compressor": {"version": "0", "settings": {}, "report": {}},
    }
    metadata = {"format": "deltazip", "manifest": json.dumps(manifest)}
    write(FOLDER / "golden_delta.safetensors", stored, metadata)
    write(FOLDER / "golden_expected.safetensors", expected, {})


if __name__ == "__main__":
    main()
