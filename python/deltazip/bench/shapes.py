"""The shapes of models that benchmarks know by name, and those of a folder's base."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "ModelShape", "base_tensors"]

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "U8": 1}


@dataclass(frozen=True)
class ModelShape:
    """A Llama model's sizes, from which a checkpoint of random weights is made.

    Attributes:
        dtype: safetensors' name of the weights' type.
    """

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    dtype: str
    max_positions: int
    rope_theta: float
    tied: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint: name -> shape."""
        kv = self.hidden // self.num_heads * self.num_kv_heads
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}."
            out |= {
                at + "input_layernorm.weight": (self.hidden,),
                at + "self_attn.q_proj.weight": (self.hidden, self.hidden),
                at + "self_attn.k_proj.weight": (kv, self.hidden),
                at + "self_attn.v_proj.weight": (kv, self.hidden),
                at + "self_attn.o_proj.weight": (self.hidden, self.hidden),
                at + "post_attention_layernorm.weight": (self.hidden,),
                at + "mlp.gate_proj.weight": (self.intermediate, self.hidden),
                at + "mlp.up_proj.weight": (self.intermediate, self.hidden),
                at + "mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        out["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            out["lm_head.weight"] = (self.vocab, self.hidden)
        return out

    def num_bytes(self) -> int:
        return sum(math.prod(s) for s in self.tensors().values()) * ITEM_BYTES[self.dtype]

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": {"F16": "float16", "BF16": "bfloat16"}[self.dtype],
            "vocab_size": self.vocab,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", 32, 4096, 11008, 32000, 32, 32, "F16", 4096, 10000.0, False),
        ModelShape("llama-3-8b", 32, 4096, 14336, 128256, 32, 8, "BF16", 8192, 500000.0, False),
        ModelShape("smollm2-135m", 30, 576, 1536, 49152, 9, 3, "BF16", 8192, 100000.0, True),
        ModelShape("tiny", 2, 128, 352, 512, 4, 2, "BF16", 4096, 10000.0, True),
    )
}


def base_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a checkpoint, from its headers alone."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        out |= {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()}
    if not out:
        raise ValueError(f"{folder}: no .safetensors file")
    return out
