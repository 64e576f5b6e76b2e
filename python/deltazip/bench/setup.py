"""From settings to a running engine with its variants loaded, each stage timed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltazip import _C
from deltazip.bench.modes import NUM_COLD, Plan, load_variants, longest_request
from deltazip.bench.session import Session
from deltazip.bench.shapes import SHAPES, ModelShape, base_tensors
from deltazip.bench.synthetic import (
    DeltaOptions,
    delta_bytes,
    make_base,
    make_deltas,
    slot_bytes,
)

__all__ = ["Setup", "Subject", "num_cores", "open_session", "work_folder"]

_SHARED_MEMORY = Path("/dev/shm")
# A real delta in its slot is padded to the kernels' tiles: at most this much a matrix, and a share.
_PAD_BYTES = 64 << 10
_PAD_SHARE = 1.02
_HOST_DELTAS = NUM_COLD + 2
_GIB = 1 << 30


@dataclass(frozen=True)
class Subject:
    """What is served: a folder or the name of a shape, and real or random deltas.

    Attributes:
        base: folder of a real base, or None for `shape`.
        variants: name -> folder of real deltas. None for `num_random` random ones.
    """

    base: Path | None
    shape: str | None
    variants: Mapping[str, Path]
    num_random: int
    delta: DeltaOptions

    def model(self) -> ModelShape | None:
        if (self.base is None) == (self.shape is None):
            raise ValueError("name either --base FOLDER or --shape NAME")
        if self.shape is None:
            return None
        if self.shape not in SHAPES:
            raise ValueError(f"--shape: expected one of {', '.join(SHAPES)}, got '{self.shape}'")
        return SHAPES[self.shape]

    def num_variants(self, modes: Sequence[str]) -> int:
        """How many take part in the mixes; load mode has NUM_COLD more, the last of real ones."""
        if "load" not in modes or not self.variants:
            return len(self.variants) or self.num_random
        if len(self.variants) <= NUM_COLD:
            raise ValueError(
                f"load mode needs more than {NUM_COLD} of --variant, got {len(self.variants)}"
            )
        return len(self.variants) - NUM_COLD

    def num_files(self, modes: Sequence[str]) -> int:
        """Variants in all."""
        return self.num_variants(modes) + (NUM_COLD if "load" in modes else 0)


@dataclass
class Setup:
    """A session, and how it came about: seconds of each stage, sizes."""

    session: Session
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def work_folder(folder: Path | None, num_bytes: int) -> Iterator[Path]:
    """`folder`, which stays, or a temporary one: in memory where there is room, else on disk.

    Raises:
        ValueError: too little space for `num_bytes` of files.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    shared = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    if shared and min(shutil.disk_usage(shared).free, _available_memory() // 2) < 1.1 * num_bytes:
        shared = None
    home = shared or Path(tempfile.gettempdir())
    free = shutil.disk_usage(home).free
    if free < 1.02 * num_bytes:
        raise ValueError(
            f"{home} has {free / 1e9:.1f} GB free, the files take {num_bytes / 1e9:.1f} GB; "
            f"name another folder with --workdir, or fewer --distinct deltas"
        )
    with tempfile.TemporaryDirectory(prefix="deltazip-bench-", dir=home) as temporary:
        yield Path(temporary)


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def file_bytes(subject: Subject, modes: Sequence[str]) -> int:
    """What random files will take on disk."""
    model = subject.model()
    if model is None:
        assert subject.base is not None
        base, total = base_tensors(subject.base), 0
    else:
        base = {name: (model.dtype, shape) for name, shape in model.tensors().items()}
        total = model.num_bytes()
    if not subject.variants:
        distinct = min(subject.num_files(modes), subject.delta.num_distinct)
        total += distinct * delta_bytes(base, subject.delta)
    return total


def open_session(
    subject: Subject,
    plan: Plan,
    modes: Sequence[str],
    folder: Path,
    device: str,
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> Setup:
    """Makes what is random, starts the engine, adds the variants and loads what fits.

    Args:
        options: fields of `_C.EngineConfig` that override what is chosen here.
        say: told of each stage.
    """
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(name: str, text: str) -> Iterator[None]:
        say(text)
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    model, base = subject.model(), subject.base
    if model is not None:
        base = folder / model.name
        with stage("make_base", f"base of random weights: {model.num_bytes() / 1e9:.2f} GB"):
            make_base(base, model, num_cores())
    assert base is not None
    tensors = base_tensors(base)
    count = subject.num_files(modes)
    num_warm = subject.num_variants(modes)
    each = _delta_size(subject, tensors)
    for name in options:
        if not hasattr(_C.EngineConfig, name):
            raise ValueError(f"--engine: EngineConfig has no field '{name}'")
    config = _config(base, device, plan, modes, num_warm, each) | dict(options)
    with stage("start_engine", f"engine on {device}"):
        session = Session(_C.Engine(_C.EngineConfig(**config)))
    try:
        paths: Mapping[str, Path] = subject.variants
        if count and not paths:
            with stage("make_deltas", f"{count} random {subject.delta.format} deltas"):
                made = make_deltas(
                    folder / f"deltas-{subject.delta.format}-{base.name}", tensors,
                    session.engine.base_digest(), subject.delta, count, num_cores(),
                )  # fmt: skip
            paths = {path.name: path for path in made}
        with stage("add_variants", f"validating {count} deltas of {each / 1e9:.2f} GB"):
            session.add_variants(paths, num_cores(), num_warm)
        infos = [info for info in session.engine.variants() if info.parent]
        _check_slots(session.engine.config(), [info.device_bytes for info in infos])
        with stage("load_variants", "loading them into their slots"):
            load_variants(session, [*session.cold, *session.names], session.engine.vocab_size())
    except BaseException:
        session.close()
        raise
    states = session.states()
    resident = sum(states[info.name] == "resident" for info in infos)
    facts = {
        "base": str(subject.base or subject.shape),
        "base_bytes": sum(i.device_bytes for i in session.engine.variants() if not i.parent),
        "variants": count,
        "variants_resident": resident,
        "distinct_files": len({info.content_digest for info in infos}),
        "delta": {} if subject.variants or not count else vars(subject.delta),
        "delta_device_bytes": max((info.device_bytes for info in infos), default=0),
        "folder": str(folder),
    }
    return Setup(session, seconds, facts)


def _delta_size(subject: Subject, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes that a variant's slot takes at most."""
    if not subject.variants:
        return slot_bytes(tensors, subject.delta)
    files = [p / "delta.safetensors" if p.is_dir() else p for p in subject.variants.values()]
    num_bytes = max(path.stat().st_size for path in files)
    return int(_PAD_SHARE * num_bytes) + _PAD_BYTES * len(tensors)


def _config(
    base: Path, device: str, plan: Plan, modes: Sequence[str], count: int, each: int
) -> dict[str, Any]:
    slots = count + ("load" in modes)  # the cold ones take turns in the last one
    sequences = [plan.prefill_batch if "prefill" in modes else 1]
    if "throughput" in modes:
        sequences.append(min(256, plan.num_requests))
    if "latency" in modes or "load" in modes:
        sequences += plan.batches
    config: dict[str, Any] = {
        "base": str(base),
        "base_name": "base",
        "device": device,
        "max_model_len": longest_request(plan, modes),
        "max_batch_sequences": max(sequences) + ("load" in modes),
        "max_variants_per_batch": max(8, slots),
        "num_delta_slots": max(1, slots),
        "prefix_caching": False,  # prompts are random: a hit would be a flaw of the measurement
    }
    if slots:
        config["delta_budget_bytes"] = slots * each
    if device != "cpu":
        # More rows a step than a CPU can use; and host memory for a few deltas, not for all.
        config |= {"max_batch_tokens": 4096, "host_budget_bytes": _HOST_DELTAS * each}
    return config


def _check_slots(config: _C.EngineConfig, sizes: Sequence[int]) -> None:
    wanted = sum(sorted(sizes, reverse=True)[: config.num_delta_slots])
    if wanted > config.delta_budget_bytes:
        raise ValueError(
            f"{config.num_delta_slots} slots need {wanted / _GIB:.2f} GiB, delta_budget_bytes is "
            f"{config.delta_budget_bytes / _GIB:.2f} GiB; raise it with "
            f"--engine delta_budget_bytes={wanted}"
        )
