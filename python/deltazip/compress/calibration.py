"""What the fine-tune really sees, as token ids: prompts in its chat template, and answers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

PROMPT_KEYS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
MIN_TOKENS = 256


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def __call__(self, text: str, **kwargs: Any) -> Any: ...


class CalibrationError(ValueError):
    """A calibration or task file that cannot be used; the message names the file and the line."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation up to the answer, and the answer. Plain text has no conversation."""

    messages: tuple[dict[str, str], ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """Token ids of prompt and answer; the first `prompt_length` are the prompt's."""

    ids: tuple[int, ...]
    prompt_length: int


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; never fetched from elsewhere."""
    from transformers import AutoTokenizer

    # Cleaning up would take spaces out of decoded text that the model has put there.
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, clean_up_tokenization_spaces=False
    )
    return tokenizer


def load_samples(path: Path) -> list[Sample]:
    """Reads a .jsonl file (prompt and completion, question and answer, messages, or text) or text.

    Raises:
        CalibrationError: the file is missing, a line is not such an object, or there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: {error}") from error
    if path.suffix not in (".jsonl", ".json"):
        samples = [Sample((), text)] if text.strip() else []
    else:
        lines = enumerate(text.splitlines(), 1)
        samples = [_sample(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not samples:
        raise CalibrationError(f"{path}: there is nothing in it")
    return samples


def _sample(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: expected an object, got {type(row).__name__}")
    for prompt_key, answer_key in PROMPT_KEYS:
        if prompt_key in row:
            prompt, answer = row[prompt_key], row.get(answer_key)
            if not isinstance(prompt, str) or not isinstance(answer, str):
                raise CalibrationError(f"{where}: '{prompt_key}' and '{answer_key}' must be text")
            return Sample(({"role": "user", "content": prompt},), answer)
    if isinstance(row.get("text"), str):
        return Sample((), row["text"])
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(sorted(row)) or "none"
        raise CalibrationError(
            f"{where}: expected keys prompt and completion, question and answer, messages, or "
            f"text; got {keys}"
        )
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise CalibrationError(f"{where}: every message needs 'role' and 'content'")
    answer = ""
    if messages[-1]["role"] == "assistant":
        answer = str(messages[-1]["content"])
        messages = messages[:-1]
    return Sample(tuple({k: str(m[k]) for k in ("role", "content")} for m in messages), answer)


def prompt_ids(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    """The prompt as the server would build it: template, its default system message, no answer."""
    return _ids(tokenizer, *_prompt_text(tokenizer, sample))


def _prompt_text(tokenizer: Tokenizer, sample: Sample) -> tuple[str, bool]:
    """The prompt and whether the tokenizer adds its own special tokens to it."""
    if sample.messages and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            list(sample.messages), tokenize=False, add_generation_prompt=True
        )
        return str(text), False
    return "\n".join(message["content"] for message in sample.messages), True


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def encode(tokenizer: Tokenizer, sample: Sample) -> TokenSequence:
    """Prompt and answer as the model reads them while it answers: the end token is not an input."""
    text, add_special_tokens = _prompt_text(tokenizer, sample)
    prompt = _ids(tokenizer, text, add_special_tokens)
    # The answer is tokenised apart, as it is when it is generated after the prompt.
    answer = _ids(tokenizer, sample.answer, False)
    return TokenSequence(tuple(prompt + answer), len(prompt))


def calibration_sequences(
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    num_samples: int,
    max_length: int,
    seed: int,
    max_tokens: int | None = None,
) -> list[tuple[int, ...]]:
    """At most `num_samples` token sequences, chosen by `seed`; long ones are cut into windows.

    Args:
        max_length: tokens of a window.
        max_tokens: no sequence is added once there are so many; None is no limit.

    Raises:
        CalibrationError: there are fewer than 256 tokens in all.
    """
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    sequences: list[tuple[int, ...]] = []
    num_tokens = 0
    for index in order:
        if len(sequences) >= num_samples or (max_tokens is not None and num_tokens >= max_tokens):
            break
        ids = encode(tokenizer, samples[index]).ids
        windows = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
        if samples[index].messages:
            windows = windows[:1]  # the middle of a conversation is no input the model sees
        for window in windows:
            if window and (max_tokens is None or num_tokens < max_tokens):
                sequences.append(window)
                num_tokens += len(window)
    sequences = sequences[:num_samples]
    num_tokens = sum(len(ids) for ids in sequences)
    if num_tokens < MIN_TOKENS:
        raise CalibrationError(
            f"calibration needs at least {MIN_TOKENS} tokens, got {num_tokens} in "
            f"{len(sequences)} samples"
        )
    return sorted(sequences, key=len)


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all sequences begin with, at least one left to each."""
    first, last = min(sequences), max(sequences)
    length = min(len(ids) for ids in sequences) - 1
    return next((i for i in range(length) if first[i] != last[i]), length)
