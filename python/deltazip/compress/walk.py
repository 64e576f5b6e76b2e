"""One compression, from the embedding to the head: the walk of the calibration tokens.

One decoder layer of both models is in memory at a time, and one batch of hidden states. A layer's
linears are compressed in the order in which data meets them, and each is put back as base + delta
before the next one's inputs are taken: what a Hessian sees is what the compressed model will see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deltazip.compress import calibration, llama
from deltazip.compress.activations import ActivationFile, HessianSum, make_batches
from deltazip.compress.checkpoint import Checkpoint, CheckpointError
from deltazip.compress.delta_file import Entry, Stored, stored_of_matrix
from deltazip.compress.llama import LlamaForward, LlamaShape
from deltazip.compress.pack import DeltaType
from deltazip.compress.plan import EMBEDDING_FORMATS, FORMATS, Settings
from deltazip.compress.solver import Factor, Solved, Spec, round_to_nearest, solve
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
        self.spec = Spec(FORMATS[settings.format], settings.group_size)

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

    def hidden_file(self, which: int, *, keep: bool) -> ActivationFile:
        path = self.workspace.folder / f"hidden-{which}.f32"
        return ActivationFile(path, self.num_rows, self.shape.hidden, keep=keep)

    def mixed_file(self) -> ActivationFile:
        """What attention gives, before its output projection."""
        width = self.shape.num_heads * self.shape.head_dim
        return ActivationFile(self.workspace.folder / "mixed.f32", self.num_rows, width)

    # The embedding.

    def embedding(self) -> None:
        piece = Piece()
        base, tuned = self.models.read(llama.EMBEDDING)
        solved = self.round_embedding(piece, base, tuned)
        used = torch.tensor(sorted({token for ids in self.sequences for token in ids}))
        rows = base[used].float()
        if solved is not None:
            matrix = dataclasses.replace(
                solved.matrix,
                values=solved.matrix.values[used.numpy()],
                scales=solved.matrix.scales[used.numpy()],
            )
            rows += torch.from_numpy(matrix.dequantize())
        else:
            rows = tuned[used].float()
        place = {int(token): row for row, token in enumerate(used)}
        sequence = 0
        with self.hidden_file(0, keep=False) as file:
            for batch in self.batches:
                chosen = self.sequences[sequence : sequence + len(batch.lengths)]
                sequence += len(batch.lengths)
                rest = (token for ids in chosen for token in ids[self.prefix :])
                ids = [*chosen[0][: self.prefix], *rest]
                file.write(batch, rows[[place[token] for token in ids]])
            file.sync()
        self.workspace.save_piece("embedding", piece.entries, piece.stored, piece.report, hidden=0)

    def round_embedding(self, piece: Piece, base: Tensor, tuned: Tensor) -> Solved | None:
        """None if it is stored exactly or not at all."""
        type_ = EMBEDDING_FORMATS[self.settings.embedding_format]
        if not type_.is_matrix or torch.equal(base.float(), tuned.float()):
            piece.exact(llama.EMBEDDING, base, tuned)
            return None
        deltas = (
            (tuned[at : at + _ROWS_AT_ONCE].float() - base[at : at + _ROWS_AT_ONCE].float())
            for at in range(0, base.shape[0], _ROWS_AT_ONCE)
        )
        solved = round_to_nearest(deltas, Spec(type_, self.settings.embedding_group_size))
        piece.matrix(llama.EMBEDDING, solved)
        return solved

    # One decoder layer.

    def layer(self, layer: int, done: float, share: float) -> None:
        prefix, piece = llama.layer_prefix(layer), Piece()
        base: dict[str, Tensor] = {}
        tuned: dict[str, Tensor] = {}
        running: dict[str, Tensor] = {}
        names = [n for n in self.shape.tensors() if n.startswith(prefix)]
        for name in names:
            short = name.removeprefix(prefix)
            base[short], tuned[short] = self.models.read(name)
            if short.removesuffix(".weight") not in llama.LINEARS:
                piece.exact(name, base[short], tuned[short])
                running[short] = tuned[short].float().to(self.device)

        def step(number: int, what: str) -> None:
            self.progress(
                f"layer {layer + 1}/{self.shape.num_layers}: {what}", done + share * number / 5
            )

        def settle(linears: Iterable[str], hessian: HessianSum) -> None:
            moved = [
                n for n in linears if not torch.equal(base[f"{n}.weight"], tuned[f"{n}.weight"])
            ]
            factor = Factor(hessian.value(), self.settings.damping) if moved else None
            for linear in linears:
                short = f"{linear}.weight"
                before = base.pop(short).float().to(self.device)
                delta = tuned.pop(short).float().to(self.device) - before
                if linear not in moved or factor is None:
                    piece.unchanged(prefix + short, before)
                    running[short] = before
                    continue
                try:
                    solved = solve(delta, factor, self.spec)
                except ValueError as error:
                    raise CompressError(f"tensor '{prefix}{short}': {error}") from error
                piece.matrix(prefix + short, solved)
                running[short] = before.add_(
                    torch.from_numpy(solved.matrix.dequantize()).to(self.device)
                )

        which = int(self.workspace.get("hidden", 0))
        with (
            self.hidden_file(which, keep=True) as hidden,
            self.hidden_file(1 - which, keep=False) as after,
            self.mixed_file() as mixed,
        ):
            self.walk(running, settle, step, hidden, mixed, after)
            after.sync()
        self.workspace.save_piece(
            f"layer-{layer:03d}", piece.entries, piece.stored, piece.report, hidden=1 - which
        )

    def walk(
        self,
        running: dict[str, Tensor],
        settle: Callable[[Iterable[str], HessianSum], None],
        step: Callable[[int, str], None],
        hidden: ActivationFile,
        mixed: ActivationFile,
        after: ActivationFile,
    ) -> None:
        """One layer over all calibration tokens: from `hidden` to `after`, through `mixed`.

        settle: compresses linears given the Hessian of their inputs, and puts them in `running`.
        """
        forward, device = self.forward, self.device

        step(0, "attention inputs")
        hessian = HessianSum(self.shape.hidden, device)
        for batch in self.batches:
            hessian.add(forward.norm(hidden.read(batch, device), running[llama.INPUT_NORM]), batch)
        settle(llama.ATTENTION_INPUTS, hessian)

        step(1, "attention output")
        hessian = HessianSum(mixed.width, device)
        for batch in self.batches:
            inputs = forward.norm(hidden.read(batch, device), running[llama.INPUT_NORM])
            out = forward.attention(inputs, running, batch.padded_index(device))
            hessian.add(out, batch)
            mixed.write(batch, out)
        settle((llama.ATTENTION_OUTPUT,), hessian)

        step(2, "MLP inputs")
        hessian = HessianSum(self.shape.hidden, device)
        for batch in self.batches:
            states = hidden.read(batch, device)
            states += forward.attention_output(mixed.read(batch, device), running)
            after.write(batch, states)
            hessian.add(forward.norm(states, running[llama.MLP_NORM]), batch)
        settle(llama.MLP_INPUTS, hessian)

        step(3, "MLP output")
        hessian = HessianSum(self.shape.intermediate, device)
        for batch in self.batches:
            hessian.add(self._mlp_inner(after.read(batch, device), running), batch)
        settle((llama.MLP_OUTPUT,), hessian)

        step(4, "running it compressed")
        for batch in self.batches:
            states = after.read(batch, device)
            states += forward.mlp_output(self._mlp_inner(states, running), running)
            after.write(batch, states)

    def _mlp_inner(self, states: Tensor, running: dict[str, Tensor]) -> Tensor:
        return self.forward.mlp_inner(self.forward.norm(states, running[llama.MLP_NORM]), running)

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
        hessian = HessianSum(self.shape.hidden, self.device)
        with self.hidden_file(int(self.workspace.get("hidden", 0)), keep=True) as hidden:
            for batch in self.batches:
                hessian.add(self.forward.norm(hidden.read(batch, self.device), norm), batch)
        factor = Factor(hessian.value(), self.settings.damping)
        spec = Spec(type_, self.settings.embedding_group_size)
        delta = (tuned.float() - base.float()).to(self.device)
        piece.matrix(llama.HEAD, solve(delta, factor, spec))
