"""The comparison: what it runs, what it leaves, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import compare
import plot
import pytest
from deltazip.compress.pipeline import compress
from deltazip.compress.plan import Settings


@pytest.fixture
def words(pair: tuple[Path, Path], samples: Path, tmp_path: Path) -> list[str]:
    base, tuned = pair
    settings = Settings(format="int4", group_size=32, num_samples=30)
    compress(base, tuned, tmp_path / "delta", samples, settings)
    return [
        "--base", str(base), "--model", f"tiny={tuned}={samples}={samples}=exact=6",
        "--delta", f"tiny:ours={tmp_path / 'delta'}", "--items", "6", "--samples", "30",
        "--methods", "rtn-4,deltazip-paper-4", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def read(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "table.json").read_text())
    return rows


def test_a_table_and_its_resumption(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    compare.main([*words, "--quick", "--embeddings", "int4", "exact"])
    text = capsys.readouterr().out
    names = [line["row"]["name"] for line in read(out)]
    paper = "deltazip-paper-4"
    assert names == [
        "fine-tune", "base", "ours", "rtn-4", paper, "rtn-4+exact-embeddings",
        f"{paper}+exact-embeddings",
    ]  # fmt: skip
    listed = [row.split("|")[1].strip() for row in text.splitlines()[2:] if row]
    sizes = {line["row"]["name"]: line["row"]["total_bytes"] for line in read(out)}
    assert listed == sorted(names, key=lambda name: -sizes[name])
    assert sizes["base"] == 0
    assert sizes["rtn-4"] < sizes["rtn-4+exact-embeddings"] < sizes["fine-tune"]
    with (out / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == names
    assert float(table[2]["kl_low"]) <= float(table[2]["kl"]) <= float(table[2]["kl_high"])
    assert not any((out / "built").iterdir())

    journal = out / "cells.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 7
    journal.write_text("\n".join([*lines[:3], lines[3][:40]]))  # as an interrupt would leave it
    built: list[str] = []
    real = compare.build

    def spy(pair: Any, method: Any, folder: Path) -> Path:
        built.append(method.name)
        return real(pair, method, folder)

    monkeypatch.setattr(compare, "build", spy)
    before = [line["row"] for line in read(out)]
    compare.main([*words, "--quick", "--embeddings", "int4", "exact"])
    assert built == ["rtn-4", paper, "rtn-4", paper]
    assert [line["row"] for line in read(out)] == before
    compare.main([*words, "--quick", "--embeddings", "int4", "exact"])
    assert len(built) == 4


def test_methods_side_by_side(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare.main([*words, "--quick"])
    alone = [line["row"] for line in read(out)]
    (out / "cells.jsonl").unlink()
    compare.main([*words, "--quick", "--threads", "1", "--jobs", "2"])
    assert [line["row"] for line in read(out)] == alone
    assert len((out / "cells.jsonl").read_text().splitlines()) == len(alone)


def test_generated_answers_are_the_engines_too(words: list[str], tmp_path: Path) -> None:
    answers = []
    for engine in ("torch", "deltazip"):
        compare.main([*words, "--engine", engine, "--methods", "rtn-4", "--keep"])
        rows = [line["row"] for line in read(tmp_path / "out")]
        answers.append([row["right"] for row in rows])
        assert all(row["accuracy"][0] == sum(row["right"]) / 6 for row in rows)
    assert answers[0] == answers[1]
    assert (tmp_path / "out" / "built" / "tiny-rtn-4" / "artifact.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "rtn-4,magic"], "'magic' is none of deltazip-paper-4"),
        (["--delta", "big:x=/none"], "expected MODEL:LABEL=FOLDER"),
        (["--model", "a=b"], "expected NAME=FINETUNED=TRAIN=TEST=METRIC=MAX_NEW_TOKENS"),
        (["--delta", "tiny:x=/none"], "/none: no such file"),
    ],
)
def test_mistakes(words: list[str], more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: .*" + message.replace(".", r"\.")):
        compare.main([*words, "--quick", *more])


def test_at_equal_bytes() -> None:
    rows = [
        {"name": name, "total_bytes": size, "kl": [kl, kl, kl]}
        for name, size, kl in [
            ("deltazip-int2", 100, 0.1), ("deltazip-paper-2", 100, 0.4), ("svd-9", 90, 0.2),
            ("gptq-4", 101, 0.01), ("base", 0, 5.0), ("deltazip-ternary", 80, 0.5),
        ]
    ]  # fmt: skip
    assert compare.at_equal_bytes(rows) == [
        ("deltazip-int2", "svd-9", 0.5),
        ("deltazip-ternary", "base", 0.1),
    ]


def test_the_frontier_by_hand() -> None:
    points = [(3.0, 1.0), (1.0, 4.0), (2.0, 4.5), (2.0, 2.0), (4.0, 1.0)]
    assert plot.frontier(points, lower_is_better=True) == [1, 3, 0]
    assert plot.frontier(points, lower_is_better=False) == [1, 2]


def test_a_plot_shows_every_method(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compare.main([*words, "--quick"])
    table = tmp_path / "out" / "table.json"
    figure = plot.draw(json.loads(table.read_text()), "kl", "total_bytes")
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {"ours", "rtn-4", "deltazip-paper-4"}
    plot.main([str(table), "-o", str(tmp_path / "plot.png"), "--axis", "linear_bits"])
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no row has accuracy"):
        plot.main([str(table), "-o", str(tmp_path / "x.png"), "--metric", "accuracy"])
