"""Delta-Compress: from a full fine-tune to a small delta file.

Needs torch and transformers: `pip install deltazip[compress]`.
"""

from __future__ import annotations


def set_num_threads(num_threads: int) -> None:
    """Threads of torch's products; 0 leaves torch's own choice, all cores."""
    import torch

    if num_threads > 0:
        torch.set_num_threads(num_threads)
