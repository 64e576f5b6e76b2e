#!/usr/bin/env python3
"""Every method on every fine-tune, scored by the same code, in one table sorted by bytes.

    python benchmarks/compression/compare.py --base BASE --out OUT [--quick] \\
        --model NAME=FINETUNED=TRAIN.jsonl=TEST.jsonl=METRIC=MAX_NEW_TOKENS ... \\
        --delta NAME:LABEL=FOLDER ...

A method compresses the fine-tune with calibration tokens from TRAIN and is scored on TEST: built
into a folder that says what it weighs, measured as `deltazip evaluate` measures, removed. A
finished cell is a line of OUT/cells.jsonl, and the same command goes on after it. OUT/table.json,
.csv and .md hold the table; plot.py draws it. `--quick` runs wanted answers only, no generation.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from assemble import Options, Pair, build
from deltazip.compress.delta_file import DeltaFile
from deltazip.compress.scoring.candidates import Candidate, Sizes, find_candidate
from deltazip.compress.scoring.measure import Bench, How, Row
from deltazip.compress.scoring.tasks import Task, load_task
from methods import METHODS
from plot import is_ours

EXACT_EMBEDDINGS = "+exact-embeddings"
_INTERVALS = ("accuracy", "difference", "nll", "kl", "top1")


@dataclasses.dataclass(frozen=True)
class Model:
    """A fine-tune, what it is calibrated with and what it is scored on."""

    name: str
    finetuned: Path
    calibration: Path
    task: Task


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row to be: a key that says all that it depends on, and how to get its candidate."""

    key: dict[str, Any]
    make: Callable[[], Candidate]


class Journal:
    """Finished cells, a JSON line each; a line that was cut short by an interrupt is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The line of a cell; read anew each time, since other processes may add to it."""
        if not self.path.is_file():
            return None
        texts = self.path.read_text(encoding="utf-8").splitlines()
        lines = (json.loads(text) for text in texts if _is_whole(text))
        return next((line for line in lines if line["key"] == key), None)

    def add(self, line: dict[str, Any]) -> None:
        whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"\n", b"")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _is_whole(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


class Comparison:
    """All cells of one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.out / "cells.jsonl")
        compared = args.items if args.compare is None else args.compare
        engine = "none" if args.quick else args.engine
        self.how = How(
            engine, compared or 1 << 30, args.batch_size, args.device, args.threads, args.seed
        )
        self.options = {
            embeddings: Options(
                embeddings,
                num_samples=args.samples,
                num_tokens=args.tokens,
                training_steps=args.training_steps,
                seed=args.seed,
                device=args.device,
            )
            for embeddings in args.embeddings
        }
        self.models = [parse_model(text, args.items) for text in args.model]
        self.deltas = [parse_delta(text, self.models) for text in args.delta]
        self.methods = select_methods(args.methods)

    def run(self, part: str = "all") -> list[dict[str, Any]]:
        """Measures what is not in the journal. Returns the lines of all cells asked for.

        part: all; given, which is what needs no building; or built, which is the methods.
        """
        lines = []
        for model in self.models:
            bench: Bench | None = None
            for cell in self.cells(model, part):
                line = self.journal.find(cell.key)
                if line is None:
                    if bench is None:
                        finetuned = find_candidate(model.finetuned, "fine-tune")
                        bench = Bench(Path(self.args.base), finetuned, model.task, self.how)
                    line = self.measure(cell, bench)
                lines.append(line)
        return lines

    def measure(self, cell: Cell, bench: Bench) -> dict[str, Any]:
        started = time.monotonic()
        candidate = cell.make()
        built = time.monotonic()
        is_itself = cell.key["method"] == "fine-tune"
        row: Row = bench.finetuned if is_itself else bench.row(candidate)
        line = {
            "key": cell.key,
            "row": row.to_json(),
            "build_seconds": round(built - started, 1),
            "measure_seconds": round(time.monotonic() - built, 1),
            "machine": machine(self.args.device),
        }
        self.journal.add(line)
        if candidate.path.is_relative_to(self.out) and not self.args.keep:
            shutil.rmtree(candidate.path)
        kl = f"KL {row.kl.value:.5f}, " if row.kl else ""
        print(
            f"{cell.key['model']} {row.name}: {row.total_bytes / 1e6:.1f} MB, {kl}"
            f"{line['build_seconds']} + {line['measure_seconds']} s",
            file=sys.stderr,
            flush=True,
        )
        return line

    def cells(self, model: Model, part: str) -> Iterator[Cell]:
        common: dict[str, Any] = {
            "model": model.name,
            "items": len(model.task.samples),
            "compared": min(self.how.num_compared, len(model.task.samples)),
            "engine": self.how.engine,
            "seed": self.how.seed,
        }
        if part != "built":
            yield from self.given(model, common)
        if part != "given":
            yield from self.built(model, common)

    def given(self, model: Model, common: dict[str, Any]) -> Iterator[Cell]:
        """The fine-tune, the base, which takes no bytes, and finished deltas."""

        def nothing() -> Candidate:
            whole = find_candidate(Path(self.args.base), "base")
            sizes = Sizes(0, 0, 0, whole.sizes.num_linear_weights)
            return dataclasses.replace(whole, sizes=sizes)

        itself = partial(find_candidate, model.finetuned, "fine-tune")
        yield Cell(common | {"method": "fine-tune"}, itself)
        yield Cell(common | {"method": "base"}, nothing)
        for name, label, folder in self.deltas:
            if name == model.name:
                facts = {"method": label, "digest": DeltaFile(folder).content_digest}
                yield Cell(common | facts, partial(find_candidate, folder, label))

    def built(self, model: Model, common: dict[str, Any]) -> Iterator[Cell]:
        """The methods, at each treatment of embeddings."""
        for embeddings, options in self.options.items():
            # Calibration tokens are not needed for cells that are done.
            pair = functools.cache(
                partial(Pair, Path(self.args.base), model.finetuned, model.calibration, options)
            )
            for method in self.methods:
                label = method + (EXACT_EMBEDDINGS if embeddings == "exact" else "")
                facts = {"method": label, "options": dataclasses.asdict(options)}
                folder = self.out / "built" / f"{model.name}-{label}"

                def make(
                    method: str = method,
                    get: Callable[[], Pair] = pair,
                    folder: Path = folder,
                    label: str = label,
                ) -> Candidate:
                    return find_candidate(build(get(), METHODS[method], folder), label)

                yield Cell(common | facts, make)


def parse_model(text: str, items: int | None) -> Model:
    parts = text.split("=")
    if len(parts) != 6:
        raise ValueError(
            f"--model {text}: expected NAME=FINETUNED=TRAIN=TEST=METRIC=MAX_NEW_TOKENS"
        )
    name, finetuned, train, test, metric, tokens = parts
    task = load_task(Path(test), metric, int(tokens), items)
    return Model(name, Path(finetuned), Path(train), task)


def parse_delta(text: str, models: Sequence[Model]) -> tuple[str, str, Path]:
    model, colon, rest = text.partition(":")
    label, equals, folder = rest.partition("=")
    if not colon or not equals or model not in {m.name for m in models}:
        raise ValueError(f"--delta {text}: expected MODEL:LABEL=FOLDER, MODEL one of --model's")
    DeltaFile(Path(folder))  # a mistake shows now, not when its turn comes
    return model, label, Path(folder)


def select_methods(names: str) -> list[str]:
    if names == "all":
        return list(METHODS)
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"--methods: '{name}' is none of {', '.join(METHODS)}")
    return chosen


def machine(device: str) -> str:
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [t for t in info.read_text().splitlines() if t.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def write_tables(lines: Sequence[dict[str, Any]], out: Path) -> str:
    """table.json, table.csv and table.md. Returns the last, a table for each model."""
    (out / "table.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        bounds = [f"{key}{end}" for key in _INTERVALS for end in ("", "_low", "_high")]
        writer.writerow(
            ["model", "method", "total_bytes", "plain_bytes", "linear_bits", *bounds, "mcnemar_p"]
        )
        for line in lines:
            row = line["row"]
            values = [v for key in _INTERVALS for v in (row[key] or ("", "", ""))]
            sizes = [row[key] for key in ("total_bytes", "plain_bytes", "linear_bits")]
            head = [line["key"]["model"], row["name"], *sizes]
            writer.writerow([*head, *values, "" if row["mcnemar_p"] is None else row["mcnemar_p"]])
    text = "\n".join(_markdown(name, lines) for name in _names(lines))
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def _names(lines: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["key"]["model"] for line in lines))


def _markdown(model: str, lines: Sequence[dict[str, Any]]) -> str:
    rows = [line["row"] for line in lines if line["key"]["model"] == model]
    rows.sort(key=lambda row: -row["total_bytes"])
    columns = [("KL", "kl", 1, 5), ("top-1, %", "top1", 100, 2), ("NLL", "nll", 1, 4)]
    if any(row["accuracy"] for row in rows):
        columns += [("accuracy, %", "accuracy", 100, 1), ("to fine-tune", "difference", 100, 1)]
    out = [f"| {model} | MB | MB plain | bits | {' | '.join(title for title, *_ in columns)} |"]
    out.append("|---" * (4 + len(columns)) + "|")
    for row in rows:
        cells = [_interval(row[key], scale, digits) for _, key, scale, digits in columns]
        megabytes = " | ".join(f"{row[k] / 1e6:.1f}" for k in ("total_bytes", "plain_bytes"))
        size = f"{megabytes} | {row['linear_bits']:.2f}"
        out.append(f"| {row['name']} | {size} | {' | '.join(cells)} |")
    out += [""] + [
        f"{ours}: KL {ratio:.2f} times that of {other}, the best other of no more bytes"
        for ours, other, ratio in at_equal_bytes(rows)
    ]
    return "\n".join(out) + "\n"


def at_equal_bytes(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """For each delta of ours: the other method of no more bytes that is nearest to the fine-tune.

    Returns ours, the other and ours' KL over the other's. The base, which takes no bytes, is one.
    """
    out = []
    for row in rows:
        if not is_ours(row["name"]) or not row["kl"]:
            continue
        others = [
            other
            for other in rows
            if not is_ours(other["name"])
            and other["kl"]
            and other["total_bytes"] <= row["total_bytes"]
        ]
        if others:
            best = min(others, key=lambda other: other["kl"][0])
            out.append((row["name"], best["name"], row["kl"][0] / max(best["kl"][0], 1e-12)))
    return out


def _interval(interval: Sequence[float] | None, scale: int, digits: int) -> str:
    if interval is None:
        return ""
    value, low, high = (f"{scale * part:.{digits}f}" for part in interval)
    return f"{value} [{low}, {high}]"


def run_parts(words: list[str], comparison: Comparison, jobs: int) -> None:
    """Runs the same command with parts of the methods; all write into one journal.

    Small matrices keep neither a GPU nor many cores busy, so methods run side by side. Cells whose
    process failed are left for the caller, who then shows the error.
    """
    me = [sys.executable, str(Path(__file__).resolve()), *words, "--part", "built", "--jobs", "1"]
    methods = comparison.methods
    parts = [methods[at::jobs] for at in range(min(jobs, len(methods)))]
    processes = [
        subprocess.Popen([*me, "--methods", ",".join(part)], stdout=subprocess.DEVNULL)
        for part in parts
    ]
    comparison.run("given")
    for process in processes:
        process.wait()


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--base", required=True, help="Hugging Face folder")
    out.add_argument("--model", action="append", required=True, help="a fine-tune, see above")
    out.add_argument("--delta", action="append", default=[], help="a finished delta, see above")
    out.add_argument("--methods", default="all", help=f"all, or some of {','.join(METHODS)}")
    out.add_argument(
        "--embeddings",
        nargs="+",
        choices=("int4", "exact"),
        default=["int4"],
        help="of all methods: the delta in four bits, or the fine-tune's own",
    )
    out.add_argument("--quick", action="store_true", help="wanted answers only, no generation")
    out.add_argument("--engine", choices=("torch", "deltazip"), default="torch")
    out.add_argument("--items", type=int, help="of each task, the first so many; all")
    out.add_argument("--compare", type=int, help="items with KL and top-1; all")
    out.add_argument("--samples", type=int, default=1024, help="calibration sequences at most")
    out.add_argument("--tokens", type=int, default=40960, help="calibration tokens at most")
    out.add_argument("--training-steps", type=int, default=200, help="where scales are trained")
    out.add_argument("--batch-size", type=int, default=64)
    out.add_argument("--device", default="cpu")
    out.add_argument("--threads", type=int, default=0, help="0: all cores")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument(
        "--jobs", type=int, default=1, help="processes, each with a part of the methods"
    )
    out.add_argument(
        "--part",
        choices=("all", "given", "built"),
        default="all",
        help="given: fine-tune, base and deltas; built: the methods; no table of a part",
    )
    out.add_argument("--keep", action="store_true", help="leave built models in OUT/built")
    out.add_argument("--out", required=True)
    return out


def main(words: Sequence[str] | None = None) -> None:
    args = parser().parse_args(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        comparison = Comparison(args)
        if args.jobs > 1:
            run_parts(list(sys.argv[1:] if words is None else words), comparison, args.jobs)
        lines = comparison.run(args.part)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.part == "all":
        print(write_tables(lines, comparison.out))


if __name__ == "__main__":
    main()
