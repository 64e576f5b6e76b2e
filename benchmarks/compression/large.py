"""Time and memory of compressing a large fine-tune, on a pair that is made for it.

    python benchmarks/compression/large.py --out DIR [--layers 32] [--format int2] [--device cuda]

The base is random, of Llama-2-7B's shape by default; the fine-tune is the base plus a small random
delta; the calibration tokens are random too. Quality means nothing here, the work is the same. The
pair is left in DIR/base and DIR/tuned and is taken again if it is there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from deltazip.compress.checkpoint import Checkpoint
from deltazip.compress.llama import LlamaShape
from deltazip.compress.pipeline import compress
from deltazip.compress.plan import Settings
from torch import Tensor

_WORDS = 512  # of a calibration text
_SPREAD, _MOVED = 0.02, 0.002  # of base weights, and of what the fine-tune adds to them


def write_config(folder: Path, args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    words = {f"w{index}": index for index in range(args.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_pair(out: Path, args: argparse.Namespace) -> None:
    """Both models tensor by tensor, each a safetensors file."""
    folders = [out / "base", out / "tuned"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, args)
    (folders[0] / "model.safetensors").write_bytes(b"\0" * 10)  # for the shape to be readable
    shapes = _shapes(folders[0])
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(args.device).manual_seed(0)
    with (
        (folders[0] / "model.safetensors").open("wb") as base,
        (folders[1] / "model.safetensors").open("wb") as tuned,
    ):
        for file in (base, tuned):
            file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            if len(shape) == 1:
                before = torch.ones(shape, device=args.device)
            else:
                before = _SPREAD * torch.randn(shape, generator=generator, device=args.device)
            after = before + _MOVED * torch.randn(shape, generator=generator, device=args.device)
            base.write(_bytes(before))
            tuned.write(_bytes(after))


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.bfloat16().view(torch.uint8).reshape(-1).cpu().numpy().data
    return data


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.folder = folder
    checkpoint.config = json.loads((folder / "config.json").read_text())
    return LlamaShape(checkpoint).tensors()


def write_texts(path: Path, vocab: int, num_tokens: int) -> Path:
    picks = torch.randint(
        vocab, (-(-num_tokens // _WORDS), _WORDS), generator=torch.Generator().manual_seed(1)
    )
    rows = ({"text": " ".join(f"w{index}" for index in row)} for row in picks.tolist())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--out", type=Path, required=True)
    out.add_argument("--format", default="int2")
    out.add_argument("--device", default="cpu")
    out.add_argument("--tokens", type=int, default=40960)
    for name, value in (
        ("layers", 32), ("hidden", 4096), ("intermediate", 11008), ("heads", 32),
        ("kv-heads", 32), ("vocab", 32000),
    ):  # fmt: skip
        out.add_argument(f"--{name}", type=int, default=value)
    return out


def main() -> None:
    args = parser().parse_args()
    if not (args.out / "tuned" / "tokenizer.json").is_file():
        started = time.monotonic()
        write_pair(args.out, args)
        print(f"made the pair in {time.monotonic() - started:.1f} s", flush=True)
    texts = write_texts(args.out / "texts.jsonl", args.vocab, args.tokens)
    started = time.monotonic()
    told = ["", started]

    def progress(what: str, share: float) -> None:
        stage = what.partition(":")[0]
        if stage != told[0]:
            print(f"{time.monotonic() - started:7.1f} s  {stage}", flush=True)
            told[0] = stage

    result = compress(
        args.out / "base",
        args.out / "tuned",
        args.out / "delta",
        texts,
        Settings(format=args.format, num_tokens=args.tokens),
        device=args.device,
        overwrite=True,
        progress=progress,
    )
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else 0.0
    held = torch.cuda.max_memory_reserved() / 2**30 if args.device.startswith("cuda") else 0.0
    print(
        f"{result.seconds:.1f} s, {result.file_bytes / 1e6:.0f} MB, {result.ratio:.2f} times "
        f"smaller, device memory {peak:.1f} GiB ({held:.1f} held), "
        f"host {result.peak_rss_bytes / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    main()
