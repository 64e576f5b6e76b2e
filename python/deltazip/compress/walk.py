"""One compression, from the embedding to the head: the walk of the calibration tokens.

One decoder layer of both models is in memory at a time, and one batch of hidden states. A layer's
linears are compressed in the order in which data meets them, and each is put back as base + delta
before the next one's inputs are taken: what a Hessian sees is what the compressed model will see.
The fine-tune's own hidden states go along, so that each linear is asked for what they lack by then.

Source: Li et al., GPTAQ (2025), for the inputs' drift; the residual stream's is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deltazip.compress import calibration, llama
from deltazip.compress.activations import Batch, HessianSum, Streams, make_batches
from deltazip.compress.checkpoint import Checkpoint, CheckpointError
from deltazip.compress.delta_file import Entry, stored_of_matrix
from deltazip.compress.llama import LlamaForward, LlamaShape
from deltazip.compress.pack import DeltaType
from deltazip.compress.plan import EMBEDDING_FORMATS, Settings, linear_types
from deltazip.compress.solver import Factor, Solved, Spec, round_to_nearest, solve
from deltazip.compress.stored import Stored
from deltazip.compress.workspace import Workspace

_ROWS_AT_ONCE = 8192  # of an embedding

Progress = Callable[[str, float], None]
"""Told what is being done and the share of the whole that is done, 0 to 1."""


class CompressError(ValueError):
    """Compression cannot start or go on; the message says why and what was expected."""


class Models:
    """Base and fine-tune side by side, one tensor at a time."""

    def __init__(self, base: Checkpoint, finetuned: Checkpoint) -> None:
        self.base, self.finetuned = base, finetuned

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Base's and fine-tune's tensor, in their own dtypes, checked to be finite."""
        pair = (self.base.read(name), self.finetuned.read(name))
        for tensor, checkpoint in zip(pair, (self.base, self.finetuned), strict=True):
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor '{name}' holds {bad} values that are NaN or "
                    "infinite"
                )
        return pair


class Piece:
    """What is known of some tensors so far."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.stored: dict[str, Stored] = {}
        self.report: dict[str, Any] = {}

    def unchanged(self, name: str, tensor: Tensor) -> None:
        self.entries[name] = Entry(DeltaType.UNCHANGED, tuple(tensor.shape))

    def exact(self, name: str, base: Tensor, tuned: Tensor) -> None:
        if torch.equal(base.float(), tuned.float()):
            self.unchanged(name, base)
            return
        self.entries[name] = Entry(DeltaType.REPLACED, tuple(base.shape))
        self.stored[name] = Stored.of_tensor(tuned)

    def matrix(self, name: str, solved: Solved) -> None:
        matrix = solved.matrix
        self.entries[name] = Entry(matrix.type, matrix.shape, matrix.group_size)
        self.stored |= stored_of_matrix(name, matrix)
        self.report[name] = {
            "error": round(solved.error, 6),
            "weight_error": round(solved.weight_error, 6),
        }


class Run:
    """One compression, from the embedding to the head."""

    def __init__(
        self,
        models: Models,
        shape: LlamaShape,
        settings: Settings,
        workspace: Workspace,
        sequences: list[tuple[int, ...]],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.models, self.shape, self.settings = models, shape, settings
        self.workspace, self.sequences, self.device = workspace, sequences, device
        self.progress = progress
        self.prefix = calibration.common_prefix(sequences)
        lengths = [len(ids) for ids in sequences]
        self.batches = make_batches(lengths, settings.batch_tokens, self.prefix)
        self.num_rows = self.batches[-1].end
        self.forward = LlamaForward(shape, max(len(ids) for ids in sequences), device)
        self.types = linear_types(shape, settings)

    def all_pieces(self, names: set[str]) -> None:
        """Makes every piece that the workspace lacks. `names`: all tensors of the base."""
        num_steps = self.shape.num_layers + 2
        if not self.workspace.has_piece("embedding"):
            self.progress("embedding", 0.0)
            self.embedding()
        for layer in range(self.shape.num_layers):
            if not self.workspace.has_piece(f"layer-{layer:03d}"):
                self.layer(layer, (layer + 1) / num_steps, 1 / num_steps)
        if not self.workspace.has_piece("head"):
            self.progress("final norm and head", (num_steps - 1) / num_steps)
            self.head(names)

    def hidden_file(self, which: int, *, keep: bool) -> Streams:
        path = self.workspace.folder / f"hidden-{which}"
        return Streams(path, self.num_rows, self.shape.hidden, keep=keep)

    def mixed_file(self) -> Streams:
        """What attention gives, before its output projection."""
        width = self.shape.num_heads * self.shape.head_dim
        return Streams(self.workspace.folder / "mixed", self.num_rows, width)

    # The embedding.

    def embedding(self) -> None:
        piece = Piece()
        base, tuned = self.models.read(llama.EMBEDDING)
        solved = self.round_embedding(piece, base, tuned)
        used = torch.tensor(sorted({token for ids in self.sequences for token in ids}))
        rows = base[used].float()
        wanted = tuned[used].float()
        if solved is not None:
            matrix = dataclasses.replace(
                solved.matrix,
                values=solved.matrix.values[used.numpy()],
                scales=solved.matrix.scales[used.numpy()],
            )
            rows += torch.from_numpy(matrix.dequantize())
        else:
            rows = wanted
        place = {int(token): row for row, token in enumerate(used)}
        sequence = 0
        with self.hidden_file(0, keep=False) as files:
            for batch in self.batches:
                chosen = self.sequences[sequence : sequence + len(batch.lengths)]
                sequence += len(batch.lengths)
                rest = (token for ids in chosen for token in ids[self.prefix :])
                ids = [*chosen[0][: self.prefix], *rest]
                at = [place[token] for token in ids]
                files.write(batch, (rows[at], wanted[at]))
            files.sync()
        self.workspace.save_piece("embedding", piece.entries, piece.stored, piece.report, hidden=0)

    def round_embedding(self, piece: Piece, base: Tensor, tuned: Tensor) -> Solved | None:
        """None if it is stored exactly or not at all."""
        type_ = EMBEDDING_FORMATS[self.settings.embedding_format]
        if not type_.is_matrix or torch.equal(base.float(), tuned.float()):
            piece.exact(llama.EMBEDDING, base, tuned)
            return None

        def deltas() -> Iterator[Tensor]:
            for at in range(0, base.shape[0], _ROWS_AT_ONCE):
                rows = slice(at, at + _ROWS_AT_ONCE)
                yield tuned[rows].float() - base[rows].float()

        energy = sum(float(delta.square().sum(dtype=torch.float64)) for delta in deltas())
        least_scale = self.settings.embedding_step * (energy / base.numel()) ** 0.5
        spec = Spec(type_, self.settings.embedding_group_size)
        solved = round_to_nearest(deltas(), spec, least_scale)
        piece.matrix(llama.EMBEDDING, solved)
        return solved

    # One decoder layer.

    def layer(self, layer: int, done: float, share: float) -> None:
        prefix, piece = llama.layer_prefix(layer), Piece()
        base: dict[str, Tensor] = {}
        tuned: dict[str, Tensor] = {}  # float32, as the fine-tune's own stream needs it
        running: dict[str, Tensor] = {}
        names = [n for n in self.shape.tensors() if n.startswith(prefix)]
        for name in names:
            short = name.removeprefix(prefix)
            before, after_tuning = self.models.read(name)
            tuned[short] = after_tuning.float().to(self.device)
            if short.removesuffix(".weight") in llama.LINEARS:
                base[short] = before
            else:
                piece.exact(name, before, after_tuning)
                running[short] = tuned[short]

        def step(number: int, what: str) -> None:
            self.progress(
                f"layer {layer + 1}/{self.shape.num_layers}: {what}", done + share * number / 5
            )

        def settle(linears: Iterable[str], sums: HessianSum) -> None:
            factor: Factor | None = None
            for linear in linears:
                short = f"{linear}.weight"
                before, wanted = base.pop(short).float().to(self.device), tuned[short]
                if torch.equal(before, wanted):
                    piece.unchanged(prefix + short, before)
                    running[short] = before
                    continue
                factor = factor or Factor(sums.value(), self.settings.damping)
                try:
                    spec = Spec(self.types[prefix + short], self.settings.group_size)
                    solved = solve(self.delta(before, wanted, sums, factor), factor, spec)
                except ValueError as error:
                    raise CompressError(f"tensor '{prefix}{short}': {error}") from error
                piece.matrix(prefix + short, solved)
                running[short] = before.add_(
                    torch.from_numpy(solved.matrix.dequantize()).to(self.device)
                )

        own = tuned if self.settings.correction else None
        which = int(self.workspace.get("hidden", 0))
        with (
            self.hidden_file(which, keep=True) as hidden,
            self.hidden_file(1 - which, keep=False) as after,
            self.mixed_file() as mixed,
        ):
            self.walk(running, settle, step, hidden, mixed, after, own)
            after.sync()
        self.workspace.save_piece(
            f"layer-{layer:03d}", piece.entries, piece.stored, piece.report, hidden=1 - which
        )

    def delta(self, before: Tensor, wanted: Tensor, sums: HessianSum, factor: Factor) -> Tensor:
        """What is compressed: the fine-tune's movement, and what makes up for earlier errors.

        before, wanted: [rows, columns], the base's and the fine-tune's. sums: over the inputs,
        whose Hessian `factor` is of.
        """
        delta = wanted - before
        if self.settings.correction:
            delta += self.settings.correction * factor.weights_for(sums.missing_output(wanted))
        return delta

    def walk(
        self,
        running: Mapping[str, Tensor],
        settle: Callable[[Iterable[str], HessianSum], None],
        step: Callable[[int, str], None],
        hidden: Streams,
        mixed: Streams,
        after: Streams,
        tuned: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One layer over all calibration tokens: from `hidden` to `after`, through `mixed`.

        Args:
            running: norms and biases, and of the linears those that are settled.
            settle: compresses linears given the sums over their inputs, and puts them in `running`.
            tuned: the fine-tune's weights, which its own stream goes through; None leaves that
                stream out.
        """
        forward, device = self.forward, self.device
        weights = (running,) if tuned is None else (running, tuned)  # of each stream
        streams = len(weights)

        def attention_inputs(batch: Batch) -> list[Tensor]:
            norm = running[llama.INPUT_NORM]
            return [forward.norm(states, norm) for states in hidden.read(batch, device, streams)]

        def mlp_inner(states: list[Tensor]) -> list[Tensor]:
            norm = running[llama.MLP_NORM]
            return [
                forward.mlp_inner(forward.norm(rows, norm), own)
                for rows, own in zip(states, weights, strict=True)
            ]

        step(0, "attention inputs")
        sums = HessianSum(self.shape.hidden, device)
        for batch in self.batches:
            sums.add(batch, attention_inputs(batch))
        settle(llama.ATTENTION_INPUTS, sums)

        step(1, "attention output")
        sums = HessianSum(mixed.width, device, self.shape.hidden)
        for batch in self.batches:
            index = batch.padded_index(device)
            out = [
                forward.attention(inputs, own, index)
                for inputs, own in zip(attention_inputs(batch), weights, strict=True)
            ]
            sums.add(batch, out, hidden.read(batch, device, streams))
            mixed.write(batch, out)
        settle((llama.ATTENTION_OUTPUT,), sums)

        step(2, "MLP inputs")
        sums = HessianSum(self.shape.hidden, device)
        for batch in self.batches:
            states = hidden.read(batch, device, streams)
            gathered = mixed.read(batch, device, streams)
            for rows, inputs, own in zip(states, gathered, weights, strict=True):
                rows += forward.attention_output(inputs, own)
            after.write(batch, states)
            sums.add(batch, [forward.norm(rows, running[llama.MLP_NORM]) for rows in states])
        settle(llama.MLP_INPUTS, sums)

        step(3, "MLP output")
        sums = HessianSum(self.shape.intermediate, device, self.shape.hidden)
        for batch in self.batches:
            states = after.read(batch, device, streams)
            sums.add(batch, mlp_inner(states), states)
        settle((llama.MLP_OUTPUT,), sums)

        step(4, "running it compressed")
        for batch in self.batches:
            states = after.read(batch, device, streams)
            for rows, inner, own in zip(states, mlp_inner(states), weights, strict=True):
                rows += forward.mlp_output(inner, own)
            after.write(batch, states)

    # Everything after the last layer, and tensors the model does not use.

    def head(self, names: set[str]) -> None:
        piece = Piece()
        done = set(self.workspace.collect()[0])
        for name in sorted(names - done - {llama.HEAD}):
            piece.exact(name, *self.models.read(name))
        if llama.HEAD in names:
            self.untied_head(piece)
        self.workspace.save_piece("head", piece.entries, piece.stored, piece.report)

    def untied_head(self, piece: Piece) -> None:
        """An lm_head of its own multiplies the last hidden states, so it has a Hessian."""
        base, tuned = self.models.read(llama.HEAD)
        type_ = EMBEDDING_FORMATS[self.settings.embedding_format]
        if not type_.is_matrix or torch.equal(base.float(), tuned.float()):
            piece.exact(llama.HEAD, base, tuned)
            return
        norm = self.models.finetuned.read(llama.FINAL_NORM).float().to(self.device)
        sums = HessianSum(self.shape.hidden, self.device)
        with self.hidden_file(int(self.workspace.get("hidden", 0)), keep=True) as hidden:
            for batch in self.batches:
                states = hidden.read(batch, self.device)
                sums.add(batch, [self.forward.norm(rows, norm) for rows in states])
        factor = Factor(sums.value(), self.settings.damping)
        spec = Spec(type_, self.settings.embedding_group_size)
        before, wanted = base.float().to(self.device), tuned.float().to(self.device)
        delta = self.delta(before, wanted, sums, factor)
        piece.matrix(llama.HEAD, solve(delta, factor, spec))
