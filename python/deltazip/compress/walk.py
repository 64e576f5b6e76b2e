"""One compression, from the embedding to the head: the walk of the calibration tokens.

One decoder layer of both models is in memory at a time, and one batch of hidden states. A layer's
linears are compressed in the order in which data meets them, and each is put back as base + delta
before the next one's inputs are taken: what a Hessian sees is what the compressed model will see.
The fine-tune's own hidden states go along, so that each linear is asked for what they lack by then.

Source: Li et al., GPTAQ (2025), for the inputs' drift; the residual stream's is ours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deltazip.compress import calibration, llama
from deltazip.compress.activations import (
    Batch,
    FileStreams,
    HessianSum,
    MemoryStreams,
    Streams,
    make_batches,
)
from deltazip.compress.checkpoint import Checkpoint, CheckpointError
from deltazip.compress.delta_file import Entry, stored_of_matrix
from deltazip.compress.llama import LlamaForward, LlamaShape
from deltazip.compress.pack import DeltaType
from deltazip.compress.plan import EMBEDDING_FORMATS, Settings, linear_types
from deltazip.compress.solve.factor import Factor
from deltazip.compress.solve.solver import Rounded, Spec, round_to_nearest, solve, solve_all
from deltazip.compress.stored import Stored
from deltazip.compress.workspace import Workspace

_ROWS_AT_ONCE = 8192  # of an embedding
_STATES_BYTES = 6 << 30  # of a device's memory that hidden states may take
_SAVE_SECONDS = 60.0  # of work that is lost if a run with states in memory is interrupted

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

    def matrix(self, name: str, solved: Rounded) -> None:
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
        self.which = 0 if self.in_memory else int(workspace.get("hidden", 0))
        self.held: dict[int, MemoryStreams] = {}
        self.saved_at = time.monotonic()
        self.forward = LlamaForward(shape, max(len(ids) for ids in sequences), device)
        self.types = linear_types(shape, settings)

    @property
    def in_memory(self) -> bool:
        """Hidden states stay on a GPU if they take a small part of its memory."""
        width = max(self.shape.hidden, self.shape.num_heads * self.shape.head_dim)
        num_bytes = 3 * 2 * 4 * self.num_rows * width
        return self.device.type != "cpu" and num_bytes <= _STATES_BYTES

    def all_pieces(self, names: set[str]) -> None:
        """Makes every piece that the workspace lacks. `names`: all tensors of the base."""
        num_steps = self.shape.num_layers + 2
        if self.workspace.get("layers") is None:
            self.progress("embedding", 0.0)
            self.embedding()
        for layer in range(int(self.workspace.get("layers")), self.shape.num_layers):
            self.layer(layer, (layer + 1) / num_steps, 1 / num_steps)
        if not self.workspace.has_piece("head"):
            self.progress("final norm and head", (num_steps - 1) / num_steps)
            self.head(names)

    def hidden_states(self, which: int, *, keep: bool) -> Streams:
        """Between layers; two take turns. keep: as they were written last."""
        if not self.in_memory:
            return self.hidden_file(which, keep=keep)
        if which not in self.held:
            self.held[which] = MemoryStreams(self.num_rows, self.shape.hidden, self.device)
            if keep:
                with self.hidden_file(int(self.workspace.get("hidden")), keep=True) as file:
                    self.copy(file, self.held[which])
        return self.held[which]

    def hidden_file(self, which: int, *, keep: bool) -> FileStreams:
        path = self.workspace.folder / f"hidden-{which}"
        return FileStreams(path, self.num_rows, self.shape.hidden, keep=keep)

    def mixed_states(self) -> Streams:
        """What attention gives, before its output projection."""
        width = self.shape.num_heads * self.shape.head_dim
        if self.in_memory:
            return MemoryStreams(self.num_rows, width, self.device)
        return FileStreams(self.workspace.folder / "mixed", self.num_rows, width)

    def copy(self, source: Streams, to: Streams) -> None:
        for batch in self.batches:
            to.write(batch, source.read(batch, self.device))

    def recorded(self, num_layers: int) -> dict[str, int]:
        """What the workspace is to know of the hidden states after so many layers.

        From the last that it knows of, an interrupted run goes on. States in memory are written
        once in a while only, never over those.
        """
        if not self.in_memory:
            return {"hidden": self.which, "layers": num_layers}
        if time.monotonic() - self.saved_at < _SAVE_SECONDS:
            return {}
        spare = 1 - int(self.workspace.get("hidden"))
        with self.hidden_file(spare, keep=False) as file:
            self.copy(self.held[self.which], file)
            file.sync()
        self.saved_at = time.monotonic()
        return {"hidden": spare, "layers": num_layers}

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
        self.which = 0
        self.workspace.save_piece(
            "embedding", piece.entries, piece.stored, piece.report, hidden=0, layers=0
        )

    def round_embedding(self, piece: Piece, base: Tensor, tuned: Tensor) -> Rounded | None:
        """None if it is stored exactly or not at all."""
        type_ = EMBEDDING_FORMATS[self.settings.embedding_format]
        if not type_.is_matrix or torch.equal(base.float(), tuned.float()):
            piece.exact(llama.EMBEDDING, base, tuned)
            return None

        def deltas() -> Iterator[Tensor]:
            for at in range(0, base.shape[0], _ROWS_AT_ONCE):
                rows = slice(at, at + _ROWS_AT_ONCE)
                yield tuned[rows].to(self.device).float() - base[rows].to(self.device).float()

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
            tuned[short] = after_tuning.to(self.device).float()
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
            moved: dict[DeltaType, list[str]] = {}
            for short in (f"{linear}.weight" for linear in linears):
                running[short] = base.pop(short).to(self.device).float()
                if torch.equal(running[short], tuned[short]):
                    piece.unchanged(prefix + short, running[short])
                else:
                    moved.setdefault(self.types[prefix + short], []).append(short)
            if not moved:
                return
            factor = Factor(sums.value(), self.settings.damping)
            for type_, shorts in moved.items():
                settle_alike(type_, shorts, sums, factor)

        def settle_alike(
            type_: DeltaType, shorts: list[str], sums: HessianSum, factor: Factor
        ) -> None:
            spec = Spec(type_, self.settings.group_size, self.settings.lengthening)
            deltas = [self.delta(running[short], tuned[short], sums, factor) for short in shorts]
            try:
                solutions = solve_all(deltas, factor, spec)
            except ValueError as error:
                names = "', '".join(prefix + short for short in shorts)
                raise CompressError(f"tensors '{names}': {error}") from error
            for short, solved in zip(shorts, solutions, strict=True):
                piece.matrix(prefix + short, solved)
                running[short] += solved.compressed

        own = tuned if self.settings.correction else None
        with (
            self.hidden_states(self.which, keep=True) as hidden,
            self.hidden_states(1 - self.which, keep=False) as after,
            self.mixed_states() as mixed,
        ):
            self.walk(running, settle, step, hidden, mixed, after, own)
            after.sync()
        self.which = 1 - self.which
        self.workspace.save_piece(
            f"layer-{layer:03d}", piece.entries, piece.stored, piece.report,
            **self.recorded(layer + 1),
        )  # fmt: skip

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
        with self.hidden_states(self.which, keep=True) as hidden:
            for batch in self.batches:
                states = hidden.read(batch, self.device)
                sums.add(batch, [self.forward.norm(rows, norm) for rows in states])
        factor = Factor(sums.value(), self.settings.damping)
        spec = Spec(type_, self.settings.embedding_group_size, self.settings.lengthening)
        before, wanted = base.float().to(self.device), tuned.float().to(self.device)
        delta = self.delta(before, wanted, sums, factor)
        piece.matrix(llama.HEAD, solve(delta, factor, spec))
