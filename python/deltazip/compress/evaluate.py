"""How close a compressed variant is to its fine-tune, token by token, through torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltazip.compress.activations import make_batches
from deltazip.compress.calibration import Sample, Tokenizer, TokenSequence, encode
from deltazip.compress.export import merged_tensors, open_pair

_BATCH_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Closeness:
    """Means over the tokens of the wanted answers, the end token included.

    Attributes:
        nll: of the wanted answer, in nats a token.
        exact: share of answers whose every token is the likeliest one: greedy would give them.
        kl: of the reference's distribution from the variant's, nats a token; None: no reference.
        top1: share of tokens where both like the same token best; None: no reference.
        likeliest: per item, the likeliest token at each place of the wanted answer.
    """

    num_tokens: int
    num_answers: int
    nll: float
    exact: float
    kl: float | None
    top1: float | None
    likeliest: tuple[tuple[int, ...], ...] = dataclasses.field(repr=False)


def load_model(
    base: Path, delta: Path | None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The variant (or, without a delta, the model in `base`) as a transformers model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype, local_files_only=True)
    if delta is not None:
        checkpoint, file = open_pair(base, delta)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in merged_tensors(checkpoint, file, torch.float32):
                if name in parameters:
                    parameters[name].copy_(tensor)
    return model.to(device).eval()


def end_token(model: Any) -> int:
    """The token that ends an answer."""
    ends = model.generation_config.eos_token_id
    return int(ends[0] if isinstance(ends, list) else ends)


def closeness(
    model: Any,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    reference: Any | None = None,
    *,
    num_compared: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Closeness:
    """Runs prompts with their wanted answers through `model` and, where given, `reference`.

    Args:
        num_compared: items that `reference` is run on, the first ones; None is all.

    Raises:
        ValueError: a sample has no answer.
    """
    if any(not sample.answer for sample in samples):
        raise ValueError("every item needs an answer to be compared on")
    encoded = [encode(tokenizer, sample) for sample in samples]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    sums = _Sums(end_token(model), len(samples) if num_compared is None else num_compared)
    at = 0
    with torch.inference_mode():
        for batch in make_batches([len(encoded[i].ids) for i in order], _BATCH_TOKENS):
            chosen = order[at : at + len(batch.lengths)]
            at += len(chosen)
            items = [encoded[i] for i in chosen]
            ours = _answer_logits(model, items)
            compared = [row for row, i in enumerate(chosen) if i < sums.num_compared]
            theirs = dict.fromkeys(range(len(chosen)))
            if reference is not None and compared:
                logits = _answer_logits(reference, [items[row] for row in compared])
                theirs |= dict(zip(compared, logits, strict=True))
            for row, index in enumerate(chosen):
                sums.add(index, items[row], ours[row], theirs[row])
            progress(at / len(order))
    return sums.means(len(samples))


class _Sums:
    def __init__(self, end: int, num_compared: int) -> None:
        self.end, self.num_compared = end, num_compared
        self.nll = self.kl = 0.0
        self.num_tokens = self.num_right = self.num_same = self.num_compared_tokens = 0
        self.likeliest: dict[int, tuple[int, ...]] = {}

    def add(self, index: int, item: TokenSequence, ours: Tensor, theirs: Tensor | None) -> None:
        """ours, theirs: [answer tokens + 1, vocabulary]."""
        wanted = [*item.ids[item.prompt_length :], self.end]
        log_probs = ours.log_softmax(dim=-1)
        best = log_probs.argmax(dim=-1)
        self.likeliest[index] = tuple(best.tolist())
        self.num_right += self.likeliest[index] == tuple(wanted)
        self.num_tokens += len(wanted)
        self.nll -= float(log_probs[torch.arange(len(wanted)), wanted].sum())
        if theirs is not None:
            wanted_probs = theirs.log_softmax(dim=-1)
            self.kl += float((wanted_probs.exp() * (wanted_probs - log_probs)).sum())
            self.num_same += int((best == wanted_probs.argmax(dim=-1)).sum())
            self.num_compared_tokens += len(wanted)

    def means(self, num_answers: int) -> Closeness:
        compared = self.num_compared_tokens
        return Closeness(
            self.num_tokens,
            num_answers,
            self.nll / self.num_tokens,
            self.num_right / num_answers,
            self.kl / compared if compared else None,
            self.num_same / compared if compared else None,
            tuple(self.likeliest[i] for i in range(num_answers)),
        )


def _answer_logits(model: Any, items: Sequence[TokenSequence]) -> list[Tensor]:
    """Per item, the logits that predict its answer: [answer tokens + 1, vocabulary] float32."""
    ids = torch.zeros((len(items), max(len(item.ids) for item in items)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        mask[row, : len(item.ids)] = 1
    device = model.device
    hidden = model.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    # The head only where an answer is predicted: the vocabulary is most of the work.
    return [
        model.lm_head(hidden[row, item.prompt_length - 1 : len(item.ids)]).float().cpu()
        for row, item in enumerate(items)
    ]
