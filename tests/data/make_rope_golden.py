"""Writes rope_golden.json: cosines and sines as transformers computes them.

Run in an environment with torch and transformers: python tests/data/make_rope_golden.py
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HEAD_DIM = 16
MAX_POSITIONS = 4096
POSITIONS = [0, 1, 7, 500, 4095]

# name -> rope parameters as config.json of transformers 5 has them
CASES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default_theta_500000": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic_short": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic_long": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    },
    "yarn_untruncated": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.25,
    },
}
LONG_LENGTH = 6000


def main() -> None:
    out: dict[str, object] = {"head_dim": HEAD_DIM, "max_positions": MAX_POSITIONS, "cases": []}
    cases: list[dict[str, object]] = []
    for name, parameters in CASES.items():
        config = LlamaConfig(
            hidden_size=HEAD_DIM * 2,
            num_attention_heads=2,
            head_dim=HEAD_DIM,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters=dict(parameters),
        )
        positions = list(POSITIONS)
        length = MAX_POSITIONS
        if name.endswith("_long"):
            length = LONG_LENGTH
            positions.append(LONG_LENGTH - 1)
        rotary = LlamaRotaryEmbedding(config)
        cos, sin = rotary(torch.zeros(1), torch.tensor([positions]))
        half = HEAD_DIM // 2
        cases.append(
            {
                "name": name,
                "rope_parameters": parameters,
                "length": length,
                "positions": positions,
                "cos": cos[0, :, :half].tolist(),
                "sin": sin[0, :, :half].tolist(),
            }
        )
    out["cases"] = cases
    path = Path(__file__).with_name("rope_golden.json")
    path.write_text(json.dumps(out, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
