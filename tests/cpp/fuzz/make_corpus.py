"""Makes seeds for the fuzzers: python tests/cpp/fuzz/make_corpus.py OUT

A folder for each fuzzer, named like it, with a few small files: one delta for each type (so that
mutations stay short), the golden file, and a configuration for each RoPE scaling.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[2] / "data" / "golden_delta.safetensors"
BYTES_PER_32 = {
    "sparse24_int4": 8,
    "sparse24_int2": 4,
    "sparse24_ternary": 5,
    "sparse14_sign": 3,
    "dense_int4": 16,
    "dense_int8": 32,
}
Tensors = dict[str, tuple[str, list[int], bytes]]


def safetensors(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        end = len(data) + len(raw)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def matrix(name: str, kind: str, rows: int, columns: int, group_size: int) -> Tensors:
    blocks = -(-columns // 32)
    groups = -(-columns // group_size)
    tensors: Tensors = {f"{name}.scales": ("F16", [rows, groups], b"\x11\x20" * rows * groups)}
    width = blocks * BYTES_PER_32[kind]
    suffix = "codes" if kind in ("sparse24_ternary", "sparse14_sign") else "values"
    tensors[f"{name}.{suffix}"] = ("U8", [rows, width], b"\x5a" * rows * width)
    if kind in ("sparse24_int4", "sparse24_int2"):
        size = rows * blocks * 4
        tensors[f"{name}.indices"] = ("U8", [rows, blocks * 4], b"\x4e" * size)
    return tensors


def delta(entries: dict[str, dict[str, Any]], tensors: Tensors) -> bytes:
    base = "ab" * 32
    content = hashlib.sha256(f"deltazip.delta.v1\0{base}\0".encode())
    for name in sorted(entries):
        entry = entries[name]
        shape = ",".join(map(str, entry["shape"]))
        content.update(f"{name}\0{entry['type']}\0{shape}\0{entry.get('group_size', 0)}\0".encode())
    for name in sorted(tensors):
        dtype, _, raw = tensors[name]
        content.update(f"{name}\0{dtype}\0".encode() + hashlib.sha256(raw).digest())
    manifest = {
        "version": 1,
        "base_digest": base,
        "content_digest": content.hexdigest(),
        "tensors": entries,
    }
    text = json.dumps(manifest, separators=(",", ":"))
    return safetensors(tensors, {"format": "deltazip", "manifest": text})


def stream(raw: bytes, item_bytes: int) -> bytes:
    """A packed tensor of one chunk, each plane a zstd frame of one raw block (up to 255 bytes)."""
    frames = []
    for plane in range(item_bytes):
        part = raw[plane::item_bytes]
        block = struct.pack("<I", len(part) << 3 | 1)[:3]
        frames.append(b"\x28\xb5\x2f\xfd\x20" + bytes([len(part)]) + block + part)
    return struct.pack(f"<{item_bytes}I", *map(len, frames)) + b"".join(frames)


def packed(entries: dict[str, dict[str, Any]], tensors: Tensors) -> bytes:
    plain = delta(entries, tensors)
    (length,) = struct.unpack("<Q", plain[:8])
    manifest = json.loads(json.loads(plain[8 : 8 + length])["__metadata__"]["manifest"])
    manifest |= {"version": 2, "lossless": {"codec": "zstd"}}
    streams: Tensors = {}
    for name, (dtype, _, raw) in tensors.items():
        data = stream(raw, {"U8": 1, "F32": 4}.get(dtype, 2))
        streams[name] = ("U8", [len(data)], data)
        if name in entries:
            manifest["tensors"][name]["dtype"] = dtype
    return safetensors(streams, {"format": "deltazip", "manifest": json.dumps(manifest)})


def deltas() -> dict[str, bytes]:
    files = {"golden": GOLDEN.read_bytes()}
    for kind in BYTES_PER_32:
        entry: dict[str, Any] = {"type": kind, "shape": [2, 33], "group_size": 32}
        files[kind] = delta({"w": entry}, matrix("w", kind, 2, 33, 32))
        files[f"packed_{kind}"] = packed({"w": entry}, matrix("w", kind, 2, 33, 32))
    for dtype, one in (("F32", b"\0\0\x80\x3f"), ("F16", b"\0\x3c"), ("BF16", b"\x80\x3f")):
        entries: dict[str, dict[str, Any]] = {
            "n": {"type": "replaced", "shape": [3]},
            "u": {"type": "unchanged", "shape": []},
        }
        files[f"replaced_{dtype}"] = delta(entries, {"n": (dtype, [3], one * 3)})
        files[f"packed_{dtype}"] = packed(entries, {"n": (dtype, [3], one * 3)})
    return files


def plain_files() -> dict[str, bytes]:
    return {
        "empty": safetensors({}, {}),
        "one": safetensors({"w": ("F32", [2, 3], bytes(24))}, {}),
        "metadata": safetensors({"w": ("BF16", [1], b"ab")}, {"format": "pt", "k": "é\n"}),
        "dtypes": safetensors(
            {
                "i64": ("I64", [1], bytes(8)),
                "i32": ("I32", [1, 1, 1, 1], bytes(4)),
                "none": ("F32", [0, 5], b""),
                "f16": ("F16", [], bytes(2)),
                "u8": ("U8", [3], b"abc"),
            },
            {},
        ),
    }


def configs() -> dict[str, bytes]:
    base: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": [1, 2],
    }
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
        "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "llama3": {"rope_scaling": llama3},
        "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
        "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    }
    return {name: json.dumps(base | extra).encode() for name, extra in variants.items()}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    corpora = {"safetensors": plain_files(), "delta": deltas(), "config": configs()}
    for target, files in corpora.items():
        folder = out / f"fuzz_{target}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
