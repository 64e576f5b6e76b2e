"""A tiny random Llama folder, its delta files and tokenizers, made with numpy and no network."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "many fine-tunes of one base model are served by one process",
    "SELECT name, count(*) FROM orders WHERE total > 10 GROUP BY name;",
    "a delta is small, the base is large; stop here and go on there",
    "Ünïcödé text: 你好 世界, नमस्ते, 👩‍👩‍👧 and 🚀",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS_ID = 2
F32 = npt.NDArray[np.float32]
# A GPU's attention has kernels for 64, 96, 128 and 256.
HEAD_DIM = 16 if os.environ.get("DELTAZIP_TEST_DEVICE", "cpu") == "cpu" else 64


def write_byte_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """A byte-level BPE of a few hundred tokens; returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[EOS_ID]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return int(tokenizer.get_vocab_size())


def write_sentencepiece_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model with byte fallback and two added chat tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "legacy": False,
        "added_tokens_decoder": {
            "400": {"content": "<|im_start|>", "special": True},
            "401": {"content": "<|im_end|>", "special": True},
            "402": {"content": "<tab>", "special": False},
        },
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_base(folder: Path, *, seed: int = 0, max_positions: int = 512) -> Path:
    """A two-layer Llama of random weights with a byte-level tokenizer."""
    vocab_size = write_byte_tokenizer(folder)
    hidden, inner, layers, heads, kv_heads, head_dim = 64, 96, 2, 4, 2, HEAD_DIM
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> F32:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab_size, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            # Larger than usual, so that answers vary instead of repeating one token.
            f"{layer}.self_attn.o_proj.weight": 4 * matrix(hidden, heads * head_dim),
            f"{layer}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.down_proj.weight": 4 * matrix(hidden, inner),
            f"{layer}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{layer}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": EOS_ID,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _entry(name: str, dtype: str, array: npt.NDArray[np.generic]) -> bytes:
    shape = ",".join(map(str, array.shape))
    digest = hashlib.sha256(array.tobytes()).digest()
    return b"\0".join([name.encode(), dtype.encode(), shape.encode(), digest])


def base_digest(tensors: dict[str, F32]) -> str:
    """docs/delta_format.md, Digests."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(_entry(name, "F32", tensors[name]))
    return sha.hexdigest()


def write_delta(folder: Path, base: Path, *, seed: int = 1, scale: float = 0.1) -> Path:
    """A random delta: norms replaced, every matrix dense_int8 in groups of 32 columns."""
    rng = np.random.default_rng(seed)
    tensors = load_file(base / "model.safetensors")
    manifest: dict[str, dict[str, object]] = {}
    stored: dict[str, npt.NDArray[np.generic]] = {}
    for name, array in sorted(tensors.items()):
        if array.ndim == 1:
            manifest[name] = {"type": "replaced", "shape": list(array.shape)}
            stored[name] = (array + rng.normal(0, scale, array.shape)).astype(np.float32)
            continue
        rows, columns = array.shape
        padded = -(-columns // 32) * 32
        manifest[name] = {"type": "dense_int8", "shape": [rows, columns], "group_size": 32}
        stored[f"{name}.values"] = rng.integers(1, 256, (rows, padded)).astype(np.uint8)
        scales = np.full((rows, -(-columns // 32)), scale / 64, np.float16)
        stored[f"{name}.scales"] = scales
    base_hex = base_digest(tensors)
    sha = hashlib.sha256(b"deltazip.delta.v1\0" + base_hex.encode() + b"\0")
    for name in sorted(manifest):
        row = manifest[name]
        shape = ",".join(map(str, tensors[name].shape))
        parts = [name, str(row["type"]), shape, str(row.get("group_size", 0))]
        sha.update("".join(f"{part}\0" for part in parts).encode())
    for name in sorted(stored):
        dtype = {"uint8": "U8", "float16": "F16", "float32": "F32"}[stored[name].dtype.name]
        sha.update(f"{name}\0{dtype}\0".encode())
        sha.update(hashlib.sha256(stored[name].tobytes()).digest())
    whole = {
        "version": 1,
        "base_digest": base_hex,
        "content_digest": sha.hexdigest(),
        "tensors": manifest,
    }
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "deltazip", "manifest": json.dumps(whole)}
    save_file(stored, folder / "delta.safetensors", metadata=metadata)
    return folder
