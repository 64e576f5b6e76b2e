"""How close a variant is to its fine-tune, token by token over wanted answers, through torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltazip.compress.activations import make_batches
from deltazip.compress.calibration import Sample, Tokenizer, TokenSequence, encode
from deltazip.compress.export import merged_tensors, open_pair

_BATCH_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class ItemCloseness:
    """Sums over the tokens of one wanted answer, the end token included.

    Attributes:
        nll: of the wanted tokens, in nats.
        kl: of the reference's distributions from the variant's, in nats; None: not compared.
        num_same: tokens where both like the same token best; None: not compared.
        is_exact: every token is the likeliest one: greedy decoding would give this answer.
        likeliest: the likeliest token at each place.
    """

    num_tokens: int
    nll: float
    kl: float | None
    num_same: int | None
    is_exact: bool
    likeliest: tuple[int, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Closeness:
    """What `closeness` found, item by item. Its means are over tokens; None: nothing compared."""

    items: tuple[ItemCloseness, ...]

    @property
    def compared(self) -> list[ItemCloseness]:
        return [item for item in self.items if item.kl is not None]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def nll(self) -> float:
        return sum(item.nll for item in self.items) / self.num_tokens

    @property
    def exact(self) -> float:
        """Share of answers whose every token is the likeliest one."""
        return sum(item.is_exact for item in self.items) / len(self.items)

    @property
    def kl(self) -> float | None:
        items = self.compared
        return sum(i.kl or 0.0 for i in items) / sum(i.num_tokens for i in items) if items else None

    @property
    def top1(self) -> float | None:
        items = self.compared
        same = sum(i.num_same or 0 for i in items)
        return same / sum(i.num_tokens for i in items) if items else None

    @property
    def likeliest(self) -> tuple[tuple[int, ...], ...]:
        return tuple(item.likeliest for item in self.items)


class Reference:
    """A fine-tune's last hidden states on some items: what many variants are compared with.

    They are kept rather than the logits, which are as many times larger as the vocabulary is than
    the hidden state; the head is applied again where they are needed, with the same result.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        samples: Sequence[Sample],
        *,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._head, self._device = model.lm_head, model.device
        states: dict[int, Tensor] = {}
        encoded = _encode(tokenizer, samples)
        with torch.inference_mode():
            for chosen in _batches(encoded):
                hidden = _answer_states(model, [encoded[i] for i in chosen])
                states |= dict(zip(chosen, (h.cpu() for h in hidden), strict=True))
                progress(len(states) / len(encoded))
        self._states = [states[i] for i in range(len(encoded))]

    def __len__(self) -> int:
        return len(self._states)

    def logits(self, index: int) -> Tensor:
        """[answer tokens + 1, vocabulary] float32, on the model's device."""
        logits: Tensor = self._head(self._states[index].to(self._device)).float()
        return logits


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
    reference: Reference | None = None,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> Closeness:
    """Runs prompts with their wanted answers through `model`.

    Args:
        reference: of the first of `samples`, or of all of them; those are compared with it.

    Raises:
        ValueError: a sample has no answer, or the reference is of more samples than there are.
    """
    if reference is not None and len(reference) > len(samples):
        raise ValueError(f"a reference of {len(reference)} items for {len(samples)} samples")
    encoded = _encode(tokenizer, samples)
    end = end_token(model)
    items: dict[int, ItemCloseness] = {}
    with torch.inference_mode():
        for chosen in _batches(encoded):
            states = _answer_states(model, [encoded[i] for i in chosen])
            for index, hidden in zip(chosen, states, strict=True):
                ours = model.lm_head(hidden).float()
                is_compared = reference is not None and index < len(reference)
                theirs = reference.logits(index) if reference is not None and is_compared else None
                items[index] = _compare(encoded[index], end, ours, theirs)
            progress(len(items) / len(encoded))
    return Closeness(tuple(items[i] for i in range(len(items))))


def _compare(item: TokenSequence, end: int, ours: Tensor, theirs: Tensor | None) -> ItemCloseness:
    """ours, theirs: [answer tokens + 1, vocabulary] logits."""
    wanted = (*item.ids[item.prompt_length :], end)
    log_probs = ours.log_softmax(dim=-1)
    best = log_probs.argmax(dim=-1)
    likeliest = tuple(best.tolist())
    nll = -float(log_probs[torch.arange(len(wanted)), list(wanted)].sum())
    kl, num_same = None, None
    if theirs is not None:
        wanted_probs = theirs.log_softmax(dim=-1)
        kl = float((wanted_probs.exp() * (wanted_probs - log_probs)).sum())
        num_same = int((best == wanted_probs.argmax(dim=-1)).sum())
    return ItemCloseness(len(wanted), nll, kl, num_same, likeliest == wanted, likeliest)


def _encode(tokenizer: Tokenizer, samples: Sequence[Sample]) -> list[TokenSequence]:
    if not samples or any(not sample.answer for sample in samples):
        raise ValueError("every item needs an answer to be compared on")
    return [encode(tokenizer, sample) for sample in samples]


def _batches(encoded: Sequence[TokenSequence]) -> Iterator[list[int]]:
    """Items of like length, by number."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    at = 0
    for batch in make_batches([len(encoded[i].ids) for i in order], _BATCH_TOKENS):
        yield order[at : at + len(batch.lengths)]
        at += len(batch.lengths)


def _answer_states(model: Any, items: Sequence[TokenSequence]) -> list[Tensor]:
    """Per item, the hidden states that predict its answer: [answer tokens + 1, hidden]."""
    ids = torch.zeros((len(items), max(len(item.ids) for item in items)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        mask[row, : len(item.ids)] = 1
    device = model.device
    hidden = model.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    # Only where an answer is predicted: the head's product with the vocabulary is most of the work.
    return [hidden[row, item.prompt_length - 1 : len(item.ids)] for row, item in enumerate(items)]
