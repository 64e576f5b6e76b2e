"""The commands, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deltazip.cli import COMMANDS, make_app
from deltazip.compress.delta_file import DeltaFile
from typer.testing import CliRunner

APP = make_app(["compress", "inspect", "evaluate", "export"])


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(APP, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_every_command_is_there_and_explains_itself() -> None:
    result = CliRunner().invoke(make_app(), ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout


def test_from_fine_tune_to_score(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    base, tuned = pair
    out = tmp_path / "delta"
    common = ["--format", "int2", "--group-size", 32]
    status, text, errors = run("compress", base, tuned, "-o", out, *common, "--dry-run")
    assert status == 0, errors
    assert "sparse24_int2" in text
    assert not out.exists()
    more = ["--calibration", samples, "--samples", 30]
    status, text, errors = run("compress", base, tuned, "-o", out, *common, *more)
    assert status == 0, errors
    assert "times smaller" in text
    status, text, errors = run("inspect", out, "--verify", "--layers")
    assert status == 0, errors
    assert DeltaFile(out).content_digest in text
    assert "verified" in text
    assert "model.layers.2.mlp.down_proj.weight" in text
    score = ["--tasks", samples, "--items", 8, "--max-new-tokens", 6, "--json"]
    status, text, errors = run("evaluate", base, tuned, out, *score)
    assert status == 0, errors
    result = json.loads(text)
    assert result["items"] == 8
    assert [row["name"] for row in result["rows"]] == ["tuned", "delta"]
    itself, row = result["rows"]
    assert row["accuracy"][0] == sum(row["right"]) / 8
    assert row["accuracy"][1] < row["accuracy"][2]
    assert row["difference"][0] == row["accuracy"][0] - itself["accuracy"][0]
    assert row["kl"][1] <= row["kl"][0] <= row["kl"][2]
    assert abs(itself["kl"][0]) < 1e-6 < row["kl"][0]
    assert row["total_bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert itself["linear_bits"] == 32
    status, text, errors = run("evaluate", base, tuned, out, *score, "--engine", "deltazip")
    assert status == 0, errors
    assert [row["right"] for row in json.loads(text)["rows"]] == [
        row["right"] for row in result["rows"]
    ]
    status, text, errors = run("evaluate", base, tuned, out, base, *score[:-1], "--engine", "none")
    assert status == 0, errors
    assert "tuned" in text
    assert "bits of linears" in text
    elsewhere = ["--engine", "deltazip", "--device", "nowhere"]
    status, text, errors = run("evaluate", base, tuned, out, *score, *elsewhere)
    assert status == 1
    assert "unknown device 'nowhere'" in text + errors
    status, text, errors = run("export", base, out, "-o", tmp_path / "whole")
    assert status == 0, errors
    assert (tmp_path / "whole" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "{base}", "{tuned}", "-o", "{out}"], "--calibration FILE is needed"),
        (["compress", "{base}", "/none", "-o", "{out}"], "fine-tune /none: no such folder"),
        (["compress", "{base}", "{tuned}", "-o", "{out}", "--format", "int3"], "got 'int3'"),
        (["inspect", "{out}"], "no such file"),
        (["inspect", "{base}/model.safetensors"], "not a delta file"),
        (["export", "{base}", "{base}", "-o", "{out}"], "no such file"),
        (["evaluate", "{base}", "{tuned}"], "--tasks FILE is needed"),
        (["evaluate", "{base}", "{tuned}", "--tasks", "/none.jsonl"], "No such file"),
    ],
)
def test_mistakes_are_one_clear_line(
    words: list[str], message: str, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    places = {"base": pair[0], "tuned": pair[1], "out": tmp_path / "out"}
    status, text, errors = run(*(word.format(**places) for word in words))
    assert status == 1
    assert message in (text + errors).replace("\n", " ")
    assert "Traceback" not in text + errors
