"""Tiny models with a tokenizer and a chat template, and a fine-tune of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import make_checkpoint, make_finetune
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROLES = ["system", "user", "assistant", "be", "helpful"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s> system be helpful </s> {% endif %}"
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def add_tokenizer(folder: Path) -> None:
    vocabulary = {
        word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *ROLES, *NUMBERS])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))


def make_pair(folder: Path, **settings: Any) -> tuple[Path, Path]:
    """folder/base and folder/tuned, bf16 as real checkpoints are."""
    base, tuned = folder / "base", folder / "tuned"
    base.mkdir(parents=True)
    make_checkpoint(base, seed=1, **settings)
    make_finetune(base, tuned, seed=2, size=0.05)
    for path in (base, tuned):
        add_tokenizer(path)
    return base, tuned


def write_samples(path: Path, count: int = 60) -> Path:
    generator = torch.Generator().manual_seed(0)

    def words(number: int) -> str:
        picks = torch.randint(len(NUMBERS), (number,), generator=generator)
        return " ".join(NUMBERS[int(i)] for i in picks)

    rows = [{"question": words(3 + i % 9), "answer": words(2 + i % 5)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several threads, a product's sums may be split another way when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tied base and its fine-tune; not to be changed."""
    return make_pair(tmp_path_factory.mktemp("models"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples") / "train.jsonl")
