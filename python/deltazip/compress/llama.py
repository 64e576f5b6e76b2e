"""The Llama decoder layer in the pieces the compressor stops between, float32.

Weights come as a mapping from names inside the layer ("self_attn.q_proj.weight"), so that a layer
can be half compressed while its next input is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltazip.compress.checkpoint import Checkpoint, CheckpointError

ARCHITECTURES = ("LlamaForCausalLM",)
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = "self_attn.o_proj"
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = "mlp.down_proj"
LINEARS = (*ATTENTION_INPUTS, ATTENTION_OUTPUT, *MLP_INPUTS, MLP_OUTPUT)
INPUT_NORM = "input_layernorm.weight"
MLP_NORM = "post_attention_layernorm.weight"

Weights = Mapping[str, Tensor]


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


class LlamaShape:
    """Numbers of a Llama model, checked, and the tensors it must have.

    Raises:
        CheckpointError: another architecture, or config.json contradicts itself.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import LlamaConfig

        if checkpoint.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{checkpoint.folder}: architecture {checkpoint.architecture}, expected one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        try:
            self.config: Any = LlamaConfig.from_dict(checkpoint.config)
        except Exception as error:
            raise CheckpointError(f"{checkpoint.folder}: config.json: {error}") from error
        config: Any = self.config
        if config.hidden_act != "silu":
            raise CheckpointError(
                f"{checkpoint.folder}: hidden_act is {config.hidden_act}, expected silu"
            )
        self.num_layers = int(config.num_hidden_layers)
        self.hidden = int(config.hidden_size)
        self.intermediate = int(config.intermediate_size)
        self.vocab = int(config.vocab_size)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(config.head_dim)
        self.is_tied = bool(config.tie_word_embeddings)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model, by name; a tied lm_head is none."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        out: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab, self.hidden),
            FINAL_NORM: (self.hidden,),
        }
        if not self.is_tied:
            out[HEAD] = (self.vocab, self.hidden)
        for layer in range(self.num_layers):
            prefix = layer_prefix(layer)
            for norm in (INPUT_NORM, MLP_NORM):
                out[prefix + norm] = (self.hidden,)
            for name, shape in matrices.items():
                out[f"{prefix}{name}.weight"] = shape
                bias = "attention_bias" if name.startswith("self_attn") else "mlp_bias"
                if getattr(self.config, bias, False):
                    out[f"{prefix}{name}.bias"] = shape[:1]
        return out


class LlamaForward:
    """The arithmetic of one layer, in pieces. A batch's rows are its tokens, unpadded."""

    def __init__(self, shape: LlamaShape, longest: int, device: torch.device) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.shape = shape
        positions = torch.arange(longest, device=device)[None]
        rotary = LlamaRotaryEmbedding(config=shape.config).to(device)
        cosine, sine = rotary(torch.zeros(1, device=device), positions)
        self._cosine: Tensor = cosine[0].float()  # [longest, head_dim]
        self._sine: Tensor = sine[0].float()

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: [tokens, hidden]."""
        variance = hidden.square().mean(dim=-1, keepdim=True)
        return hidden * torch.rsqrt(variance + float(self.shape.config.rms_norm_eps)) * weight

    def attention(self, inputs: Tensor, weights: Weights, index: Tensor) -> Tensor:
        """What goes into o_proj: [rows, heads * head_dim].

        inputs: [rows, hidden], normed. index: [sequences, longest], the row of each token, -1 is
        padding.
        """
        shape = self.shape
        # Padding lies after a sequence's tokens, where the causal mask hides it from them.
        taken = index.clamp(min=0)
        heads = []
        for name, count in zip(
            ATTENTION_INPUTS, (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), strict=True
        ):
            out = _linear(inputs, weights, name)[taken]
            split = out.reshape(*out.shape[:2], count, shape.head_dim)
            heads.append(split.transpose(1, 2))
        query, key = (self._rotate(part) for part in heads[:2])
        mixed: Tensor = F.scaled_dot_product_attention(
            query, key, heads[2], is_causal=True, enable_gqa=shape.num_heads != shape.num_kv_heads
        )
        width = shape.num_heads * shape.head_dim
        rows: Tensor = torch.empty((inputs.shape[0], width), device=inputs.device)
        # A row that several sequences share is written by each, with the same.
        rows[index[index >= 0]] = mixed.transpose(1, 2).flatten(2)[index >= 0]
        return rows

    def _rotate(self, heads: Tensor) -> Tensor:
        """heads: [sequences, heads, tokens, head_dim]."""
        length = heads.shape[2]
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return heads * self._cosine[:length] + turned * self._sine[:length]

    def attention_output(self, mixed: Tensor, weights: Weights) -> Tensor:
        return _linear(mixed, weights, ATTENTION_OUTPUT)

    def mlp_inner(self, inputs: Tensor, weights: Weights) -> Tensor:
        """What goes into down_proj: [tokens, intermediate]."""
        gate, up = (_linear(inputs, weights, name) for name in MLP_INPUTS)
        return F.silu(gate) * up

    def mlp_output(self, inner: Tensor, weights: Weights) -> Tensor:
        return _linear(inner, weights, MLP_OUTPUT)


def _linear(inputs: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(inputs, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
