"""From a base and a fine-tune to a scored folder: a method's artifact, and the model read from it.

Embeddings, an untied head, norms and biases are treated alike for all methods, since what a paper
leaves in fp16 would otherwise decide the comparison of bytes: see `Options.embeddings`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from artifact import Artifact, Coded, Codes, Plain, write_artifact
from baselines import Context, Method
from deltazip.compress import calibration, llama
from deltazip.compress.activations import HessianSum
from deltazip.compress.checkpoint import Checkpoint
from deltazip.compress.export import copy_companions
from deltazip.compress.llama import LlamaShape
from deltazip.compress.pack import DeltaType
from deltazip.compress.plan import Settings, check_pair
from deltazip.compress.scoring.candidates import SIZE_FILE, is_linear
from deltazip.compress.solve.solver import Spec, round_to_nearest
from deltazip.compress.stored import Stored, dtype_name, tensor_bytes, write_safetensors
from deltazip.compress.walk import Models, Run
from deltazip.compress.workspace import Workspace
from torch import Tensor

ARTIFACT = "artifact.safetensors"
_EMBEDDING_GROUP = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """What all methods have in common.

    Attributes:
        embeddings: int4 rounds the delta of the embedding and of an untied head to four bits, as
            deltazip does; exact keeps the fine-tune's own, as most papers do.
        num_samples, num_tokens: calibration sequences and tokens at most.
        training_steps: of methods that train scales.
        seed: of the calibration sequences' choice, of random dropping and of training.
    """

    embeddings: str = "int4"
    num_samples: int = 1024
    num_tokens: int = 40960
    max_length: int = 1024
    damping: float = 0.01
    training_steps: int = 200
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.embeddings not in ("int4", "exact"):
            raise ValueError(f"embeddings must be int4 or exact, got '{self.embeddings}'")

    def settings(self) -> Settings:
        """For deltazip's own walk."""
        return Settings(
            embedding_format=self.embeddings,
            embedding_group_size=_EMBEDDING_GROUP,
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            max_length=self.max_length,
            damping=self.damping,
            seed=self.seed,
        )


class Pair:
    """A base, its fine-tune and the calibration tokens that every method gets."""

    def __init__(self, base: Path, finetuned: Path, calibration_file: Path, options: Options):
        self.models = Models(Checkpoint(base), Checkpoint(finetuned))
        self.shape: LlamaShape = check_pair(self.models.base, self.models.finetuned)
        self.options = options
        self.sequences = calibration.calibration_sequences(
            calibration.load_tokenizer(finetuned),
            calibration.load_samples(calibration_file),
            num_samples=options.num_samples,
            max_tokens=options.num_tokens,
            max_length=options.max_length,
            seed=options.seed,
        )
        self._shared: dict[str, Coded] | None = None

    @property
    def names(self) -> list[str]:
        base = self.models.base
        return [n for n in sorted(base.tensors) if not (base.is_tied and n == llama.HEAD)]

    def shared(self) -> Mapping[str, Coded]:
        """Everything but the linear layers' weights; the same for all methods, made once."""
        if self._shared is None:
            coded: dict[str, Coded] = {}
            for name in (n for n in self.names if not is_linear(n)):
                base, tuned = self.models.read(name)
                if torch.equal(base.float(), tuned.float()):
                    continue
                is_embedding = name in (llama.EMBEDDING, llama.HEAD)
                rounded = is_embedding and self.options.embeddings == "int4"
                coded[name] = _rounded(base, tuned) if rounded else Plain(tuned)
            self._shared = coded
        return self._shared


def _rounded(base: Tensor, tuned: Tensor) -> Codes:
    """deltazip's own treatment of an embedding."""
    spec = Spec(DeltaType.DENSE_INT4, _EMBEDDING_GROUP)
    matrix = round_to_nearest([tuned.float() - base.float()], spec).matrix
    codes = (torch.from_numpy(matrix.values) + 8).to(torch.uint8)
    return Codes(codes, 4, torch.from_numpy(matrix.scales), zero=8)


class Walk(Run):
    """deltazip's walk of the calibration tokens, with another solver at each stop."""

    def __init__(self, pair: Pair, method: Method, folder: Path) -> None:
        super().__init__(
            pair.models,
            pair.shape,
            pair.options.settings(),
            Workspace(folder / "walk", method.name),
            pair.sequences,
            torch.device(pair.options.device),
            lambda what, share: None,
        )
        self.method = method
        self.context = _context(pair.options)
        self.coded: dict[str, Coded] = {}

    def encode(self) -> dict[str, Coded]:
        self.embedding()
        for number in range(self.shape.num_layers):
            self.encode_layer(llama.layer_prefix(number))
        self.workspace.remove()
        return self.coded

    def encode_layer(self, prefix: str) -> None:
        running: dict[str, Tensor] = {}
        for name in (n for n in self.shape.tensors() if n.startswith(prefix)):
            if not is_linear(name):
                tuned = self.models.read(name)[1]
                running[name.removeprefix(prefix)] = tuned.float().to(self.device)

        def settle(linears: Iterable[str], sums: HessianSum) -> None:
            context = self.context._replace(hessian=sums.value())
            names = [f"{prefix}{linear}.weight" for linear in linears]
            self.coded |= _encode(self.method, self.models, names, context, self.device)
            for name in names:
                dense = self.coded[name].dense()
                if self.method.on_delta:
                    dense = dense + self.models.base.read(name).float()
                running[name.removeprefix(prefix)] = dense.to(self.device)

        with (
            self.hidden_states(self.which, keep=True) as hidden,
            self.hidden_states(1 - self.which, keep=False) as after,
            self.mixed_states() as mixed,
        ):
            self.walk(running, settle, lambda number, what: None, hidden, mixed, after)
            after.sync()
        self.which = 1 - self.which


def _context(options: Options) -> Context:
    generator = torch.Generator().manual_seed(options.seed)
    return Context(torch.empty(0, 0), generator, options.damping)


def _encode(
    method: Method, models: Models, names: list[str], context: Context, device: torch.device
) -> dict[str, Coded]:
    weights = []
    for name in names:
        base, tuned = (tensor.float().to(device) for tensor in models.read(name))
        weights.append(tuned - base if method.on_delta else tuned)
    return dict(zip(names, method.encode(weights, context), strict=True))


def build(pair: Pair, method: Method, folder: Path) -> Path:
    """Writes FOLDER/artifact.safetensors and beside it the whole model, in float32, with size.json.

    Returns the folder, which deltazip evaluate and deltazip's engine read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        coded = dict(pair.shared())
        if method.needs_hessian:
            coded |= Walk(pair, method, folder).encode()
        else:
            context, device = _context(pair.options), torch.device(pair.options.device)
            for name in filter(is_linear, pair.names):
                coded |= _encode(method, pair.models, [name], context, device)
    _write(pair, method, coded, folder)
    if method.trains_scales:
        from training import train_scales

        linears = {n: c for n, c in coded.items() if is_linear(n) and isinstance(c, Codes)}
        options = pair.options
        coded |= train_scales(
            folder, pair.models, linears, pair.sequences,
            steps=options.training_steps, seed=options.seed, device=options.device,
        )  # fmt: skip
        _write(pair, method, coded, folder)
    return folder


def _write(pair: Pair, method: Method, coded: Mapping[str, Coded], folder: Path) -> None:
    on_delta = {n: method.on_delta if is_linear(n) else isinstance(coded[n], Codes) for n in coded}
    num_bytes, saved = write_artifact(folder / ARTIFACT, coded, on_delta)
    file_bytes = (folder / ARTIFACT).stat().st_size
    size = {
        "total_bytes": file_bytes - saved,
        "plain_bytes": file_bytes,
        "linear_bytes": sum(count for name, count in num_bytes.items() if is_linear(name)),
        "embedding_bytes": sum(num_bytes.get(n, 0) for n in (llama.EMBEDDING, llama.HEAD)),
        "method": method.name,
        "options": dataclasses.asdict(pair.options),
    }
    (folder / SIZE_FILE).write_text(json.dumps(size, indent=2) + "\n", encoding="utf-8")
    base, artifact = pair.models.base, Artifact(folder / ARTIFACT)
    stored = {}
    for name in pair.names:

        def load(name: str = name) -> memoryview:
            return tensor_bytes(artifact.apply(name, base.read(name)))

        stored[name] = Stored(dtype_name(torch.float32), base.tensors[name].shape, load)
    copy_companions(base.folder, pair.models.finetuned.folder, folder)
    config = dict(base.config)
    config["dtype" if "dtype" in config else "torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
